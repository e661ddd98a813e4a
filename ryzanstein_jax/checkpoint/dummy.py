"""Random weights made on the devices: the same model at every mesh width, with nothing to fetch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ryzanstein_jax.checkpoint.layout import Layout, layout_of
from ryzanstein_jax.checkpoint.quantize import DTYPES, LARGEST, SCALE, ZERO
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import RULES, PaddedSizes, named_sharding

#: Axes that a product sums over, by the end of a parameter's path; the others sum over the last one.
_INPUT_DIMS = {"out.kernel": 3}


def dummy_params(
    spec: ModelSpec,
    sizes: PaddedSizes,
    params: Mapping[str, ParamSpec],
    mesh: Mesh,
    seed: int = 0,
) -> dict[str, jax.Array]:
    """Path -> random array, sharded over the mesh.

    Values depend on the seed and the path alone: they are drawn in the canonical layout and padded with
    zeros, so that every width computes the same model. Kernels are uniform with variance 1 / fan-in, norms
    neutral, biases small. Quantized kernels hold the same values, rounded.
    """
    made: dict[tuple[object, ...], Callable[[np.uint32], jax.Array]] = {}
    arrays = {}
    for path, param in params.items():
        layout = layout_of(path, param, spec, sizes)
        sharding = named_sharding(mesh, param.axes, RULES[sizes.sharding])
        leaf = path.rsplit(".", 1)[-1]
        fan_in = math.prod(layout.canonical[-_INPUT_DIMS.get(".".join(path.split(".")[-2:]), 1) :])
        largest = next((LARGEST[kind] for kind, dtype in DTYPES.items() if dtype == param.dtype), 0.0)
        if path.endswith(SCALE):
            kernel = path.removesuffix(SCALE)
            largest = next(LARGEST[kind] for kind, dtype in DTYPES.items() if dtype == params[kernel].dtype)
            canonical = layout_of(kernel, params[kernel], spec, sizes).canonical
            fan_in = math.prod(canonical[-_INPUT_DIMS.get(".".join(kernel.split(".")[-2:]), 1) :])
        key = (layout.shape, layout.canonical, param.axes, param.dtype, leaf, fan_in, largest)
        if key not in made:
            if path.endswith(SCALE):
                made[key] = _constant(layout, param, fan_in**-0.5 * math.sqrt(3) / largest, sharding)
            elif path.endswith(ZERO):
                made[key] = _constant(layout, param, 0, sharding)
            elif largest:
                made[key] = _random(layout, param, largest / math.sqrt(3), sharding)
            elif leaf == "scale":
                made[key] = _constant(layout, param, 1.0 - spec.norm_offset, sharding)
            else:
                made[key] = _random(layout, param, 0.02 if leaf == "bias" else fan_in**-0.5, sharding)
        arrays[path] = made[key](np.uint32(zlib.crc32(f"{seed}/{path}".encode())))
    return arrays


def _random(
    layout: Layout, param: ParamSpec, deviation: float, sharding: NamedSharding
) -> Callable[[np.uint32], jax.Array]:
    def draw(key: np.uint32) -> jax.Array:
        bits = jnp.full(layout.canonical, key, jnp.uint32)
        for dim in range(bits.ndim):
            bits = _mix(bits ^ (jax.lax.broadcasted_iota(jnp.uint32, layout.canonical, dim) + jnp.uint32(1)))
        # The upper 24 bits are exact in float32; uniform over [-limit, limit) has that deviation.
        unit = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
        values = unit * (deviation * math.sqrt(3))
        whole = jnp.issubdtype(param.dtype, jnp.integer)
        return layout.expand(jnp.round(values) if whole else values).astype(param.dtype)

    return jax.jit(draw, out_shardings=sharding)


def _mix(bits: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer. Good enough for weights that mean nothing, and each device makes its own part;
    jax.random takes many times as long to compile and to run on a CPU.
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _constant(
    layout: Layout, param: ParamSpec, value: float, sharding: NamedSharding
) -> Callable[[np.uint32], jax.Array]:
    def fill(key: np.uint32) -> jax.Array:
        del key
        return layout.expand(jnp.full(layout.canonical, value, param.dtype))

    return jax.jit(fill, out_shardings=sharding)
