"""Random weights made on the devices: the same model at every mesh width, with nothing to fetch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ryzanstein_jax.checkpoint.layout import Layout, layout_of
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import MEGATRON_RULES, PaddedSizes, named_sharding

#: Axes that a product sums over, by the end of a parameter's path; the others sum over the last one.
_INPUT_DIMS = {"out.kernel": 3}


def dummy_params(
    spec: ModelSpec,
    sizes: PaddedSizes,
    params: Mapping[str, ParamSpec],
    mesh: Mesh,
    rules: dict[str, str | None] = MEGATRON_RULES,
    seed: int = 0,
) -> dict[str, jax.Array]:
    """Path -> random array, sharded over the mesh.

    Values depend on the seed and the path alone: they are drawn in the canonical layout and padded with
    zeros, so that every width computes the same model. Kernels are uniform with variance 1 / fan-in, norms
    neutral, biases small.
    """
    root = jax.random.key(seed)
    made: dict[tuple[object, ...], Callable[[jax.Array], jax.Array]] = {}
    arrays = {}
    for path, param in params.items():
        layout = layout_of(path, param, spec, sizes)
        sharding = named_sharding(mesh, param.axes, rules)
        leaf = path.rsplit(".", 1)[-1]
        fan_in = math.prod(layout.canonical[-_INPUT_DIMS.get(".".join(path.split(".")[-2:]), 1) :])
        key = (layout.shape, layout.canonical, param.axes, param.dtype, leaf == "scale", leaf == "bias", fan_in)
        if key not in made:
            if leaf == "scale":
                made[key] = _constant(layout, param, 1.0 - spec.norm_offset, sharding)
            else:
                made[key] = _random(layout, param, 0.02 if leaf == "bias" else fan_in**-0.5, sharding)
        arrays[path] = made[key](jax.random.fold_in(root, zlib.crc32(path.encode())))
    return arrays


def _random(
    layout: Layout, param: ParamSpec, deviation: float, sharding: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    def draw(key: jax.Array) -> jax.Array:
        # Uniform with that deviation: half the price of normal numbers.
        limit = deviation * math.sqrt(3)
        values = jax.random.uniform(key, layout.canonical, jnp.float32, -limit, limit)
        return layout.expand(values.astype(param.dtype))

    return jax.jit(draw, out_shardings=sharding)


def _constant(
    layout: Layout, param: ParamSpec, value: float, sharding: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    def fill(key: jax.Array) -> jax.Array:
        del key
        return layout.expand(jnp.full(layout.canonical, value, param.dtype))

    return jax.jit(fill, out_shardings=sharding)
