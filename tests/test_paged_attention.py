"""The kernel for GPUs, interpreted: the same numbers as the portable path, over ragged plans."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax.attention import TILE, attend, attend_by_kernel, has_kernel
from ryzanstein_jax.batch import attention_plan
from ryzanstein_jax.kv_cache import QuantizedPages, quantize
from ryzanstein_jax.native import KERNELS_VARIABLE
from ryzanstein_jax.paged_attention import Schedule
from tests.ragged import Ragged
from tests.support import quick_compiles

#: Decode tokens by position, and prompt chunks by (first position, length).
STEPS = {
    "decodes": ([0, 511, 63, 64, 200], []),
    "both": ([37, 250], [(0, TILE), (63, TILE + 1), (129, 1)]),
}


def scratch(pages, value):
    """Pages whose first, which nobody owns, holds that."""
    if isinstance(pages, QuantizedPages):
        return pages._replace(scales=pages.scales.at[0].set(value))
    return pages.at[0].set(value)


def run(step, *, window=None, softcap=None, cache_dtype=None, **sizes):
    """What the kernel and the portable path give for the step's tokens, and the tokens that are no padding."""
    given = Ragged(*step, **sizes, stale=1.0)
    pages = [given.keys, given.values]
    if cache_dtype is not None:
        quantized = (quantize(jnp.asarray(x), cache_dtype) for x in pages)
        pages = [QuantizedPages(numbers, scales[..., 0]) for numbers, scales in quantized]

    def both(flat, q, k, v, keys, values):
        fields = attention_plan(given.layout.unpack(flat))
        settings = {"scale": q.shape[-1] ** -0.5, "window": window, "softcap": softcap}
        out, keys, values = attend(q, k, v, keys, values, fields, **settings)
        # Of the page that nobody owns, which padding is written to, nothing may come through.
        keys, values = scratch(keys, jnp.nan), scratch(values, jnp.nan)
        return attend_by_kernel(q, keys, values, fields, **settings, interpret=True), out

    with quick_compiles():
        found, wanted = jax.jit(both)(given.flat, given.q, given.k, given.v, *pages)
    return np.asarray(found, np.float32), np.asarray(wanted, np.float32), given.real


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("slots", "queries", "head_dim", "window", "softcap"),
    [(2, 4, 16, None, None), (1, 3, 32, 40, None), (2, 1, 16, None, 4.0), (1, 8, 16, 100, 30.0)],
)
def test_as_the_portable_path(step, slots, queries, head_dim, window, softcap):
    found, wanted, real = run(
        STEPS[step], slots=slots, queries=queries, head_dim=head_dim, window=window, softcap=softcap
    )
    np.testing.assert_allclose(found[real], wanted[real], atol=2e-5)
    padding = np.delete(found, real, axis=0)
    assert len(padding) and not padding.any(), "of padding the results are zero, whatever lies in page 0"


def test_half_precision():
    found, wanted, real = run(STEPS["both"], slots=1, queries=4, head_dim=32, dtype=jnp.bfloat16)
    np.testing.assert_allclose(found[real], wanted[real], atol=3e-2)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [("float32", "int8"), ("bfloat16", "uint8")])
def test_a_cache_of_8_bits(dtype, cache_dtype):
    tolerance = 2e-5 if dtype == "float32" else 3e-2
    for step in STEPS.values():
        found, wanted, real = run(
            step, slots=2, queries=3, head_dim=16, dtype=jnp.dtype(dtype), cache_dtype=jnp.dtype(cache_dtype)
        )
        np.testing.assert_allclose(found[real], wanted[real], atol=tolerance)
        padding = np.delete(found, real, axis=0)
        assert len(padding) and not padding.any()


@pytest.mark.parametrize("tile", [1, TILE])
@pytest.mark.parametrize("queries", [1, 3, 4, 8, 12, 16])
def test_a_schedule_covers_the_heads_and_fits_a_gpu(queries, tile):
    for tiles, slots, head_dim, positions in [(1, 8, 128, 8192), (128, 1, 64, 300), (9, 2, 256, 16)]:
        for itemsize in (2, 4):
            found = Schedule.of(tiles, tile, slots, queries, head_dim, positions, itemsize)
            assert found.heads * found.groups >= queries and found.heads & (found.heads - 1) == 0
            rows = tile * found.heads
            assert 16 <= rows <= 128 and found.block >= 16, "what matrix units do at least, and registers hold at most"
            assert found.splits & (found.splits - 1) == 0 and (tile == 1 or found.splits == 1)
            # Queries, and the keys and values on their way, of 99 KiB of shared memory on the smallest of these GPUs.
            held = 2 if tile > 1 else 1
            assert (rows + 2 * held * found.block) * head_dim * itemsize <= 96 << 10
    alone = Schedule.of(1, 1, 8, 4, 128, 8192, 2)
    assert 8 * alone.splits >= 132, "one sequence keeps all multiprocessors of an H100 busy"


def test_gpus_and_heads_that_have_the_kernel(monkeypatch):
    def on(kind):
        mesh = SimpleNamespace(abstract_device=kind and SimpleNamespace(device_kind=kind))
        monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
        return has_kernel

    assert on("NVIDIA H100 80GB HBM3")(128) and on("NVIDIA A100-SXM4-80GB")(64)
    assert not on("NVIDIA H100 80GB HBM3")(96), "Triton's arrays have powers of two only"
    assert not on("cpu")(128) and not on(None)(128)
    monkeypatch.setenv(KERNELS_VARIABLE, "portable")
    assert not on("NVIDIA H100 80GB HBM3")(128)
