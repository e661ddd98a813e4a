"""Where the memory of a device goes: computed before anything is allocated, never guessed. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil

from ryzanstein_jax.errors import MemoryBudgetError
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.model.spec import ModelSpec

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
            f"memory per device: {size_text(self.weights)} weights + {size_text(self.temporaries)} temporaries + "
            f"{size_text(self.logits)} logits + {size_text(self.kv_cache)} KV cache ({self.num_pages} pages, "
            f"{self.num_tokens} tokens) = {size_text(self.weights + self.temporaries + self.logits + self.kv_cache)} "
            f"of {size_text(self.budget)} budget, {size_text(self.total)} in all"
        )


def host_bytes() -> int:
    """Memory of this host, or the control group's limit of it, in bytes."""
    total = psutil.virtual_memory().total
    try:
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or no limit ("max")
    return total


def resolve_dtype(dtype: str, checkpoint_dtype: str, platform: str) -> np.dtype:
    """The dtype that "auto" stands for: the checkpoint's, but float32 on a CPU, where it is the fastest."""
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else checkpoint_dtype
    # numpy itself has no bfloat16.
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def resolve_kv_dtype(kv_cache_dtype: str, dtype: np.dtype) -> np.dtype:
    """The dtype of the KV cache that a setting stands for, beside activations of `dtype`; uint8 has float8's bits."""
    if kv_cache_dtype == "auto":
        return dtype
    return np.dtype("uint8" if kv_cache_dtype == "fp8" else kv_cache_dtype)


def resolve_fraction(memory_fraction: float | None, platform: str) -> float:
    """The share of a device's memory that None stands for."""
    return memory_fraction or (0.25 if platform == "cpu" else 0.9)


def plan_memory(
    *,
    spec: ModelSpec,
    sizes: PaddedSizes,
    dtype: np.dtype,
    total: int,
    memory_fraction: float,
    weights: int,
    temporaries: int,
    logits: int,
    page_size: int,
    max_model_len: int,
    max_num_seqs: int,
    num_pages: int | None = None,
    kv_cache_dtype: str = "auto",
) -> MemoryPlan:
    """Gives what the weights and temporaries leave of the budget to pages of KV cache.

    No more pages are made than `max_num_seqs` sequences of `max_model_len` tokens can fill.

    Raises:
        MemoryBudgetError: the weights, or the pages of one sequence of `max_model_len`, do not fit. The
            message holds the sum and the nearest setting that fits.
    """
    budget = int(total * memory_fraction)
    page = sizes.page_bytes(spec, page_size, resolve_kv_dtype(kv_cache_dtype, dtype).itemsize)
    left = budget - weights - temporaries - logits
    needed = -(-max_model_len // page_size) + 1
    sum_text = (
        f"{size_text(weights)} weights + {size_text(temporaries)} temporaries + {size_text(logits)} logits "
        f"of a budget of {size_text(budget)} per device (memory_fraction={memory_fraction:g} of {size_text(total)})"
    )
    if left < 2 * page:
        remedy = _nearest_width(spec, dtype, budget - temporaries - logits, sizes.width, total, memory_fraction)
        raise MemoryBudgetError(
            f"the model does not fit: {sum_text} leaves {size_text(left)}, and KV cache takes at least "
            f"{size_text(2 * page)}. {remedy}"
        )
    # Whether pages of 8 bits would be enough, where their number is not the user's.
    helps = num_pages is None and left // sizes.page_bytes(spec, page_size, 1) >= needed
    if num_pages is None:
        num_pages = min(left // page, max_num_seqs * (needed - 1) + 1)
    if num_pages * page > left:
        raise MemoryBudgetError(
            f"num_pages={num_pages} takes {size_text(num_pages * page)} of KV cache, but {sum_text} leaves "
            f"{size_text(left)}. Use num_pages={left // page}, or less"
        )
    if num_pages < needed:
        fits = (num_pages - 1) * page_size
        smaller = 'kv_cache_dtype="int8", ' if helps else ""
        raise MemoryBudgetError(
            f"one sequence of max_model_len={max_model_len} needs {needed} pages of KV cache, "
            f"{size_text(needed * page)}; {sum_text} leaves {num_pages} pages. Use max_model_len={fits}, or less, "
            f"{smaller}a larger memory_fraction, or more devices"
        )
    return MemoryPlan(total, budget, weights, temporaries, logits, page, num_pages, page_size)


def _nearest_width(spec: ModelSpec, dtype: np.dtype, room: int, width: int, total: int, memory_fraction: float) -> str:
    """What to change so that the weights fit."""

    def weights(width: int) -> int:
        return PaddedSizes.of(spec, width).weight_bytes_per_device(spec, dtype.itemsize)

    for wider in (2, 4, 8, 16, 32, 64):
        if wider > width and weights(wider) < 0.95 * room:
            return f"Use tensor_parallel_size={wider}, or a device with more memory"
    fraction = (weights(width) + (total * memory_fraction - room)) / total * 1.1
    if memory_fraction < fraction <= 1:
        return f"Use memory_fraction={min(1.0, fraction):.2f}"
    quantized = "" if spec.quantization else ' or quantization="int8",'
    return f"Use a smaller dtype or model,{quantized} or devices with more memory"


def size_text(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / _GIB:.2f} GiB" if abs(count) >= _GIB else f"{count / _MIB:.1f} MiB"
