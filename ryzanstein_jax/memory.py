"""What devices have and programs take, as JAX tells it. The sum is made in `budget`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from ryzanstein_jax.budget import MemoryPlan as MemoryPlan
from ryzanstein_jax.budget import host_bytes
from ryzanstein_jax.budget import plan_memory as plan_memory
from ryzanstein_jax.errors import MemoryBudgetError
from ryzanstein_jax.model.decoder import Decoder
from ryzanstein_jax.model.params import param_specs
from ryzanstein_jax.model.quantization import QUANTIZATIONS, array_bytes
from ryzanstein_jax.model.sizes import vector_bytes
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes, partition_spec


def device_bytes(sharers: int, device: jax.Device) -> int:
    """Memory of one device; `sharers` CPU devices share the host's, or the control group's limit of it."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_bytes() // sharers


def weight_bytes(shapes: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes of these sharded arrays on one device."""
    total = 0
    for shape in shapes:
        local = shape.sharding.shard_shape(shape.shape) if shape.sharding is not None else shape.shape
        total += array_bytes(local, jnp.dtype(shape.dtype))
    return total


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
        int8_bytes, int4_bytes, fp8_bytes: bytes of the weights on one device with `quantization="int8"` and so on, and
            the rest in float32.
        kv_values: cached values per token on one device.
        kv_8bit_bytes: bytes of them with `kv_cache_dtype="int8"` or `"fp8"`, scales included.
        padding: parameters added so that the sizes divide, as a share of the model's own.
    """

    width: int
    weights: int
    int8_bytes: int
    int4_bytes: int
    fp8_bytes: int
    kv_values: int
    kv_8bit_bytes: int
    padding: float


def footprint(spec: ModelSpec, width: int) -> Footprint:
    """The footprint at one width, from the shapes alone: no devices are needed."""
    quantized = {}
    for name, quantization in QUANTIZATIONS.items():
        one = spec.replace(quantization=quantization)
        quantized[f"{name}_bytes"] = PaddedSizes.of(one, width).weight_bytes_per_device(one, 4)
    spec = spec.replace(quantization=None)
    sizes = PaddedSizes.of(spec, width)
    total = local = 0
    for param in param_specs(Decoder(spec, sizes, jnp.dtype("float32"))).values():
        size = int(np.prod(param.shape, dtype=np.int64))
        sharded = "tp" in partition_spec(param.axes)
        total, local = total + size, local + (size // width if sharded else size)
    real = spec.num_parameters()
    vectors = 2 * spec.num_layers * sizes.heads.num_slots // width
    return Footprint(
        width=width,
        weights=local,
        kv_values=vectors * spec.head_dim,
        kv_8bit_bytes=vectors * vector_bytes(spec.head_dim, 1),
        padding=(total - real) / real,
        **quantized,
    )


def host_peak_bytes() -> int:
    """Most memory that this process has held so far."""
    try:
        import resource
    except ImportError:  # not on Windows
        return psutil.Process(os.getpid()).memory_info().rss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
