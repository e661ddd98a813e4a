"""Where the memory of a device goes: computed before anything is allocated, never guessed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from ryzanstein_jax.errors import MemoryBudgetError
from ryzanstein_jax.kv_cache import bytes_per_page
from ryzanstein_jax.model.decoder import Decoder
from ryzanstein_jax.model.params import param_specs
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes, partition_spec

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """The sum for one device, in bytes.

    Attributes:
        total: memory of the device.
        budget: share of it that the engine may take.
        weights: its shard of the parameters.
        temporaries: most that any compiled program takes besides its arguments and results.
        logits: two steps' logits and inputs, which live between programs.
        page_bytes: one page of KV cache.
        num_pages: pages of KV cache.
        page_size: tokens per page.
    """

    total: int
    budget: int
    weights: int
    temporaries: int
    logits: int
    page_bytes: int
    num_pages: int
    page_size: int

    @property
    def kv_cache(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds; page 0 is scratch."""
        return (self.num_pages - 1) * self.page_size

    def __str__(self) -> str:
        return (
            f"memory per device: {_size(self.weights)} weights + {_size(self.temporaries)} temporaries + "
            f"{_size(self.logits)} logits + {_size(self.kv_cache)} KV cache ({self.num_pages} pages, "
            f"{self.num_tokens} tokens) = {_size(self.weights + self.temporaries + self.logits + self.kv_cache)} "
            f"of {_size(self.budget)} budget, {_size(self.total)} in all"
        )


def device_bytes(sharers: int, device: jax.Device) -> int:
    """Memory of one device; `sharers` CPU devices, of however many processes, share the host's, or the control
    group's limit of it.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    total = psutil.virtual_memory().total
    try:
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or no limit ("max")
    return total // sharers


def weight_bytes(shapes: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes of these sharded arrays on one device."""
    total = 0
    for shape in shapes:
        local = shape.sharding.shard_shape(shape.shape) if shape.sharding is not None else shape.shape
        total += int(np.prod(local, dtype=np.int64)) * jnp.dtype(shape.dtype).itemsize
    return total


def plan_memory(
    *,
    spec: ModelSpec,
    sizes: PaddedSizes,
    dtype: jnp.dtype,
    total: int,
    memory_fraction: float,
    weights: int,
    temporaries: int,
    logits: int,
    page_size: int,
    max_model_len: int,
    max_num_seqs: int,
    num_pages: int | None = None,
) -> MemoryPlan:
    """Gives what the weights and temporaries leave of the budget to pages of KV cache.

    No more pages are made than `max_num_seqs` sequences of `max_model_len` tokens can fill.

    Raises:
        MemoryBudgetError: the weights, or the pages of one sequence of `max_model_len`, do not fit. The
            message holds the sum and the nearest setting that fits.
    """
    budget = int(total * memory_fraction)
    page = bytes_per_page(spec, sizes, page_size, dtype)
    left = budget - weights - temporaries - logits
    needed = -(-max_model_len // page_size) + 1
    sum_text = (
        f"{_size(weights)} weights + {_size(temporaries)} temporaries + {_size(logits)} logits "
        f"of a budget of {_size(budget)} per device (memory_fraction={memory_fraction:g} of {_size(total)})"
    )
    if left < 2 * page:
        remedy = _nearest_width(spec, dtype, budget - temporaries - logits, sizes.width, total, memory_fraction)
        raise MemoryBudgetError(f"the model does not fit: {sum_text}. {remedy}")
    if num_pages is None:
        num_pages = min(left // page, max_num_seqs * (needed - 1) + 1)
    if num_pages * page > left:
        raise MemoryBudgetError(
            f"num_pages={num_pages} takes {_size(num_pages * page)} of KV cache, but {sum_text} leaves "
            f"{_size(left)}. Use num_pages={left // page}, or less"
        )
    if num_pages < needed:
        fits = (num_pages - 1) * page_size
        raise MemoryBudgetError(
            f"one sequence of max_model_len={max_model_len} needs {needed} pages of KV cache, "
            f"{_size(needed * page)}; {sum_text} leaves {num_pages} pages. Use max_model_len={fits}, or less, "
            "a larger memory_fraction, or more devices"
        )
    return MemoryPlan(total, budget, weights, temporaries, logits, page, num_pages, page_size)


def _nearest_width(spec: ModelSpec, dtype: jnp.dtype, room: int, width: int, total: int, memory_fraction: float) -> str:
    """What to change so that the weights fit."""
    size = spec.num_parameters() * jnp.dtype(dtype).itemsize
    for wider in (2, 4, 8, 16, 32, 64):
        if wider > width and size / wider < 0.95 * room:
            return f"Use tensor_parallel_size={wider}, or a device with more memory"
    fraction = (size / width + (total * memory_fraction - room)) / total * 1.1
    if memory_fraction < fraction <= 1:
        return f"Use memory_fraction={min(1.0, fraction):.2f}"
    return "Use a smaller dtype or model, or devices with more memory"


def memory_analysis(compiled: jax.stages.Compiled) -> Any:
    """XLA's account of a compiled program, in bytes on one device.

    Raises:
        MemoryBudgetError: this backend keeps none, so memory could only be guessed.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise MemoryBudgetError("this JAX backend does not tell what a program takes; give num_pages")
    return analysis


@dataclass(frozen=True)
class Footprint:
    """What a model takes on one device of a mesh, in values; times the dtype's size they are bytes.

    Attributes:
        width: devices of the mesh.
        weights: parameters on one device.
        kv_values: cached values per token on one device.
        padding: parameters added so that the sizes divide, as a share of the model's own.
    """

    width: int
    weights: int
    kv_values: int
    padding: float


def footprint(spec: ModelSpec, width: int) -> Footprint:
    """The footprint at one width, from the shapes alone: no devices are needed."""
    sizes = PaddedSizes.of(spec, width)
    total = local = 0
    for param in param_specs(Decoder(spec, sizes, jnp.dtype("float32"))).values():
        size = int(np.prod(param.shape, dtype=np.int64))
        sharded = "tp" in partition_spec(param.axes)
        total, local = total + size, local + (size // width if sharded else size)
    real = spec.num_parameters()
    kv = 2 * spec.num_layers * sizes.heads.num_slots // width * spec.head_dim
    return Footprint(width, local, kv, (total - real) / real)


def host_peak_bytes() -> int:
    """Most memory that this process has held so far."""
    try:
        import resource
    except ImportError:  # not on Windows
        return psutil.Process(os.getpid()).memory_info().rss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if abs(count) >= _GIB else f"{count / _MIB:.1f} MiB"
