"""Attention on CPUs by a kernel, for vectors of all widths that are here: against numpy and the portable path."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax import native
from ryzanstein_jax.attention import TILE, attend, attend_by_native, native_kernel
from ryzanstein_jax.batch import Bucket, attention_plan
from ryzanstein_jax.kv_cache import QuantizedPages, floats, quantize
from ryzanstein_jax.native import KERNELS_VARIABLE
from ryzanstein_jax.native.attention import Attention
from ryzanstein_jax.sharding import make_mesh
from tests.native.processors import PROCESSORS, on
from tests.ragged import Ragged
from tests.support import quick_compiles

WIDEST = max(PROCESSORS)
#: Decode tokens by position, and prompt chunks by (first position, length).
DECODES = [0, 511, 63, 64, 200, 15]
CHUNKS = [(0, TILE), (63, TILE + 1), (129, 1), (400, 112)]
BUCKET = Bucket(8, 192, 4, 200)
#: Lanes, slots, queries, head_dim, page size, window, softcap, dtype.
SETTINGS: list[tuple[Any, ...]] = [
    (16, 2, 3, 64, 16, None, None, "float32"),
    (16, 1, 4, 96, 16, 50, None, "float32"),
    (16, 2, 1, 16, 32, 1, 4.0, "float32"),
    (16, 1, 2, 256, 16, None, None, "bfloat16"),
    (16, 1, 3, 80, 64, 300, 30.0, "bfloat16"),
    (8, 2, 3, 64, 8, None, None, "float32"),
    (8, 1, 2, 96, 16, 50, 30.0, "bfloat16"),
    (4, 2, 3, 64, 16, None, None, "float32"),
    (4, 1, 5, 20, 4, 40, None, "bfloat16"),
]


@functools.cache
def jitted(kernel: Attention, layout):
    def run(flat, q, keys, values):
        return attend_by_native(kernel, q, keys, values, attention_plan(layout.unpack(flat)))

    return jax.jit(run)


def by_kernel(step: Ragged, *, page_size=16, window=None, softcap=None, lanes=WIDEST):
    queries, head_dim = step.q.shape[2:]
    kernel = Attention(
        head_dim, queries, page_size, TILE, str(step.q.dtype), str(step.keys.dtype), head_dim**-0.5, window, softcap
    )
    with on(lanes), quick_compiles():
        return np.asarray(jitted(kernel, step.layout)(step.flat, step.q, step.keys, step.values), np.float32)


@pytest.mark.parametrize(
    ("lanes", "slots", "queries", "head_dim", "page_size", "window", "softcap", "dtype"),
    [setting for setting in SETTINGS if setting[0] in PROCESSORS],
)
def test_against_numpy(lanes, slots, queries, head_dim, page_size, window, softcap, dtype):
    sizes = dict(slots=slots, queries=queries, head_dim=head_dim, page_size=page_size, dtype=jnp.dtype(dtype))
    for decodes, chunks in ((DECODES, CHUNKS), (DECODES[:1], CHUNKS[-1:]), ([], CHUNKS[:2]), (DECODES, [])):
        step = Ragged(decodes, chunks, **sizes, bucket=BUCKET)
        found = by_kernel(step, page_size=page_size, window=window, softcap=softcap, lanes=lanes)
        wanted = step.wanted(scale=head_dim**-0.5, window=window, softcap=softcap)
        for place, rows in zip(step.places, wanted, strict=True):
            np.testing.assert_allclose(found[place], rows, rtol=0, atol=2e-5 if dtype == "float32" else 2e-2)
        padding = np.delete(found, step.real, axis=0)
        assert len(padding) and not padding.any(), "of padding the results are zero"


def test_scores_of_any_size():
    """A running softmax: no order of small and huge scores may overflow or lose the largest."""
    step = Ragged(DECODES, CHUNKS, slots=1, queries=2, head_dim=64, bucket=BUCKET)
    for factor in (1e-3, 30.0, 1e4):
        step.q = step.q / np.float32(step.q.std()) * np.float32(factor)
        for place, rows in zip(step.places, step.wanted(scale=64**-0.5), strict=True):
            np.testing.assert_allclose(by_kernel(step)[place], rows, rtol=0, atol=2e-5 + 1e-6 * factor)


@pytest.mark.parametrize("lanes", PROCESSORS)
@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize(("window", "softcap", "dtype"), [(None, None, "float32"), (50, 30.0, "bfloat16")])
def test_pages_in_8_bits(lanes, kind, window, softcap, dtype):
    step = Ragged(DECODES, CHUNKS, slots=2, queries=3, head_dim=64, stale=0.0, dtype=jnp.dtype(dtype), bucket=BUCKET)
    quantized = [QuantizedPages(*quantize_pages(x, kind)) for x in (step.keys, step.values)]
    # What lies behind the last position of a sequence counts nothing there, whatever its scale.
    for pages in quantized:
        pages.scales[~np.asarray(pages.numbers).any(axis=-1)] = np.nan
    kernel = Attention(64, 3, 16, TILE, dtype, kind, 0.125, window, softcap)

    def run(flat, q, keys, values):
        return attend_by_native(kernel, q, keys, values, attention_plan(step.layout.unpack(flat)))

    with on(lanes), quick_compiles():
        found = np.asarray(jax.jit(run)(step.flat, step.q, *quantized), np.float32)
    # The same numbers in floats.
    step.keys, step.values = (
        np.nan_to_num(np.asarray(floats(x.numbers, jnp.float32)) * x.scales[..., None]) for x in quantized
    )
    step.q = np.asarray(step.q, np.float32)
    wanted = by_kernel(step, window=window, softcap=softcap, lanes=lanes)
    np.testing.assert_allclose(found[step.real], wanted[step.real], rtol=0, atol=2e-5 if dtype == "float32" else 2e-2)


def quantize_pages(pages, kind):
    """Numbers and scales of pages [P, K, page, H], vector by vector."""
    numbers, scales = quantize(jnp.asarray(pages).reshape(-1, *pages.shape[2:]), jnp.dtype(kind))
    return np.array(numbers.reshape(pages.shape)), np.array(scales.reshape(pages.shape[:-1]))


@pytest.mark.parametrize("chunks", [[], CHUNKS[:1]])
def test_shared_prefixes(chunks):
    decodes = [300, 310, 450, 299, 511, 303]
    step = Ragged(decodes, chunks, slots=2, queries=3, head_dim=64, shared=256, bucket=BUCKET)
    assert len({*step.tables[: len(decodes), 15]}) == 1 < len({*step.tables[: len(decodes), 16]})
    for place, rows in zip(step.places, step.wanted(scale=64**-0.5), strict=True):
        np.testing.assert_allclose(by_kernel(step)[place], rows, rtol=0, atol=2e-5)


def test_a_sequence_does_not_depend_on_the_others():
    """Bit for bit, whatever they are, wherever the pages lie, and whatever is in others."""
    sizes = dict(slots=2, queries=3, head_dim=64, bucket=BUCKET)
    together = Ragged(DECODES, CHUNKS, **sizes)
    found = by_kernel(together)
    for number, place in enumerate(together.places):
        decodes = DECODES[number : number + 1]
        chunks = [] if decodes else CHUNKS[number - len(DECODES) :][:1]
        alone = Ragged(decodes, chunks, **sizes, seed=number + 1, stale=7.0)
        np.testing.assert_array_equal(by_kernel(alone)[alone.places[0]], found[place])
        # No number in its last key: it has to be seen in all of its results that look at it, and nowhere else.
        page = together.tables[number, (together.sequences[number][0] + place.stop - place.start - 1) // 16]
        spoilt = Ragged(DECODES, CHUNKS, **sizes)
        spoilt.keys[page, :, (together.sequences[number][0] + place.stop - place.start - 1) % 16] = np.nan
        results = by_kernel(spoilt)
        assert np.isnan(results[place.stop - 1]).all()
        np.testing.assert_array_equal(np.delete(results, place, axis=0), np.delete(found, place, axis=0))


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, 30.0)])
def test_as_the_portable_path_on_a_mesh(monkeypatch, width, window, softcap):
    step = Ragged(DECODES, CHUNKS, slots=8, queries=2, head_dim=32, stale=0.0, bucket=BUCKET)
    results = []
    for kernels in ("", "portable"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)

        def run(flat, *arrays):
            plan = attention_plan(step.layout.unpack(flat))
            return attend(*arrays, plan, scale=0.2, window=window, softcap=softcap)

        with jax.set_mesh(make_mesh(width)), quick_compiles():
            lowered = jax.jit(run).lower(step.flat, step.q, step.k, step.v, step.keys, step.values)
            assert ("ryzanstein.Attention" in lowered.as_text()) == (not kernels and bool(native.processor().lanes))
            results.append(lowered.compile()(step.flat, step.q, step.k, step.v, step.keys, step.values))
    for found, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("lanes", PROCESSORS)
def test_nothing_is_called_on_the_way(lanes):
    with on(lanes):
        written = native.assembly(Attention(64, 3, 16, TILE, "bfloat16", "bfloat16", 0.1, None, 30.0))
    task = written[written.index("kernel.task") : written.index("kernel.loop:")]
    called = re.findall(r"\b_?(?:fma|exp2?|tanh|r?int|floor)f?\b", task)
    assert len(task) > 10_000 and not called, "there is an instruction for it, or it is written out"


def test_where_it_is_used(monkeypatch):
    q, pages = jax.ShapeDtypeStruct((4, 2, 3, 64), jnp.float32), jax.ShapeDtypeStruct((9, 2, 16, 64), jnp.float32)
    settings = dict(scale=0.1, window=None, softcap=None)
    found = functools.partial(native_kernel, **settings)
    assert found(q, pages) is None, "without a mesh nobody knows what will compute it"
    with jax.set_mesh(make_mesh(1)), on(WIDEST):
        assert found(q, pages) == Attention(64, 3, 16, TILE, "float32", "float32", 0.1, None, None)
        assert found(q.update(dtype=jnp.bfloat16), pages) is None
        assert found(*(x.update(dtype=jnp.int8) for x in (q, pages))) is None
        assert found(q, pages.update(dtype=jnp.float8_e4m3fn)) is None, "its bits are taken"
        for kind in ("int8", "uint8"):
            assert found(q, pages.update(dtype=jnp.dtype(kind))).pages == kind
        assert found(q, pages.update(shape=(9, 2, 2, 64))) is None
        assert found(q.update(shape=(4, 2, 3, 66)), pages.update(shape=(9, 2, 16, 66))) is None
        assert found(q.update(shape=(4, 2, 200, 256)), pages.update(shape=(9, 2, 16, 256))) is None
        monkeypatch.setenv(KERNELS_VARIABLE, "portable")
        assert found(q, pages) is None


@pytest.mark.parametrize("lanes", PROCESSORS)
def test_blocks_are_whole_vectors_and_tasks_fit_their_stack(lanes):
    for head_dim in range(lanes, 1025, lanes):
        kernel = Attention(head_dim, 4, 16, TILE, "float32", "float32", 1.0, None, None)
        assert 2 * lanes <= kernel.span(lanes) <= 128 and kernel.span(lanes) % (2 * lanes) == 0
    for queries, head_dim, fits in ((16, 256, True), (32, 128, True), (71, 64, True), (64, 256, False)):
        assert Attention(head_dim, queries, 16, TILE, "float32", "float32", 1.0, None, None).runs_with(lanes) == fits
