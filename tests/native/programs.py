"""A program that calls a kernel, and what it takes: for tests that run it in several threads and processes."""

from __future__ import annotations

import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ryzanstein_jax.attention import attend
from ryzanstein_jax.batch import Bucket, attention_plan
from ryzanstein_jax.sharding import make_mesh
from tests.ragged import Ragged


@functools.cache
def step() -> Ragged:
    bucket = Bucket(8, 192, 4, 200)
    return Ragged(
        [0, 511, 63, 64, 200],
        [(0, 32), (63, 33), (400, 100)],
        slots=2,
        queries=2,
        head_dim=32,
        stale=0.0,
        bucket=bucket,
    )


def arguments() -> tuple[jax.Array, ...]:
    """On two devices, as the program takes them."""
    mesh, given = make_mesh(2), step()
    heads, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "tp"), PartitionSpec()))
    rest = (jax.device_put(x, heads) for x in (given.q, given.k, given.v, given.keys, given.values))
    return (jax.device_put(given.flat, everywhere), *rest)


def lowered() -> jax.stages.Lowered:
    layout = step().layout

    def run(flat, *arrays):
        return attend(*arrays, attention_plan(layout.unpack(flat)), scale=0.2)[0]

    with jax.set_mesh(make_mesh(2)):
        return jax.jit(run).lower(*arguments())
