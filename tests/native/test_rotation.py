"""Rotation of queries and keys, and the writes to their pages, by one kernel: as by XLA's operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ryzanstein_jax import kv_cache, native
from ryzanstein_jax.kv_cache import KV_AXES, QuantizedPages
from ryzanstein_jax.model.layers import apply_rope, rope_tables
from ryzanstein_jax.model.rotation import rotate_and_store
from ryzanstein_jax.model.spec import RopeSpec
from ryzanstein_jax.sharding import make_mesh, named_sharding
from tests.native.processors import PROCESSORS, on

PAGES, PAGE = 6, 16
#: Tokens on both sides of a task; the first are padding, which goes to the page that nobody reads.
TOKENS = 19
SLOTS = np.concatenate([[0, 0], np.random.default_rng(0).permutation(np.arange(PAGE, PAGES * PAGE))[: TOKENS - 2]])


def operands(slots, queries, head_dim, dtype, width=1):
    rng = np.random.default_rng(queries)
    mesh = make_mesh(width)
    qkv = jnp.asarray(rng.standard_normal((TOKENS, slots, queries + 2, head_dim)), dtype)
    pages = [
        jax.device_put(
            jnp.asarray(rng.standard_normal((PAGES, slots, PAGE, head_dim)), dtype), named_sharding(mesh, KV_AXES)
        )
        for _ in range(2)
    ]
    rope = RopeSpec(tuple(10000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2))), scale=1.1)
    tables = rope_tables(rope, jnp.asarray(np.arange(TOKENS) * 37))
    qkv = jax.device_put(qkv, NamedSharding(mesh, PartitionSpec(None, "tp")))
    return mesh, (qkv, *tables, jnp.asarray(SLOTS, jnp.int32), *pages)


@jax.jit
def by_operations(qkv, cos, sin, slots, keys, values):
    rotated = apply_rope(qkv[:, :, :-1], cos, sin)
    return (
        rotated[:, :, :-1],
        kv_cache.write(keys, rotated[:, :, -1], slots),
        kv_cache.write(values, qkv[:, :, -1], slots),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("slots", "queries", "head_dim", "width", "lanes"),
    [
        *((3, 3, 64, 1, lanes) for lanes in PROCESSORS),
        *((2, 4, 128, 2, lanes) for lanes in PROCESSORS),
        (1, 1, 32, 1, max(PROCESSORS)), (4, 2, 96, 4, max(PROCESSORS)), (2, 1, 24, 1, min(PROCESSORS)),
    ],
)  # fmt: skip
def test_the_same_as_by_operations(slots, queries, head_dim, width, lanes, dtype):
    mesh, given = operands(slots, queries, head_dim, dtype, width)
    wanted = [np.asarray(part, np.float32) for part in by_operations(*given)]
    before = [np.asarray(part, np.float32) for part in given[-2:]]
    with on(lanes), jax.set_mesh(mesh):
        run = jax.jit(rotate_and_store, donate_argnums=(4, 5)).lower(*given).compile()
        found = run(*given)
    assert "ryzanstein.RotateAndStore" in run.as_text()
    assert [part.dtype for part in found] == [dtype] * 3
    tolerance = {"atol": 1e-5} if dtype == "float32" else {"rtol": 2**-7, "atol": 1e-3}
    np.testing.assert_allclose(np.asarray(found[0], np.float32), wanted[0], **tolerance)
    for pages, expected, old in zip(found[1:], wanted[1:], before, strict=True):
        got = np.asarray(pages, np.float32)
        np.testing.assert_allclose(got[1:], expected[1:], **tolerance)
        written = np.zeros((PAGES, PAGE), bool)
        written[SLOTS // PAGE, SLOTS % PAGE] = True
        np.testing.assert_array_equal(got.swapaxes(1, 2)[~written], old.swapaxes(1, 2)[~written])


def test_pages_are_written_where_they_lie():
    mesh, given = operands(3, 3, 64, "float32")
    places = [pages.unsafe_buffer_pointer() for pages in given[-2:]]
    with jax.set_mesh(mesh):
        compiled = jax.jit(rotate_and_store, donate_argnums=(4, 5)).lower(*given).compile()
        found = compiled(*given)
    assert [pages.unsafe_buffer_pointer() for pages in found[1:]] == places
    assert " copy(" not in compiled.as_text()


def test_pages_that_are_used_again_stay_as_they_are():
    mesh, given = operands(3, 3, 64, "float32")
    before = [np.asarray(pages).copy() for pages in given[-2:]]
    with jax.set_mesh(mesh):
        _, keys, values = jax.jit(rotate_and_store)(*given)
    for pages, old, new in zip(given[-2:], before, (keys, values), strict=True):
        np.testing.assert_array_equal(pages, old)
        assert (np.asarray(new) != old).any()


def test_what_it_does_not_take(monkeypatch):
    mesh, (qkv, cos, sin, slots, keys, values) = operands(1, 1, 64, "float32")
    run = functools.partial(rotate_and_store, slots_T=slots)
    assert run(qkv, cos, sin, keys=keys, values=values) is None, "no mesh: nobody says that it is for a CPU"
    with jax.set_mesh(mesh):
        assert run(qkv, cos[:, :16], sin[:, :16], keys=keys, values=values) is None, "only a part of a head turns"
        assert run(qkv.astype("bfloat16"), cos, sin, keys=keys, values=values) is None
        scaled = QuantizedPages(keys.astype("int8"), keys[..., 0])
        assert run(qkv, cos, sin, keys=scaled, values=scaled) is None
        narrow = qkv[..., :8], cos[:, :4], sin[:, :4]
        assert run(*narrow, keys=keys[..., :8], values=values[..., :8]) is None or native.lanes() < 8
        monkeypatch.setenv(native.KERNELS_VARIABLE, "portable")
        assert run(qkv, cos, sin, keys=keys, values=values) is None
