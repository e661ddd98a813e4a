"""`attend` against plain numpy, over ragged plans."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax.attention import BLOCK, SHARERS, TILE, attend, max_tiles
from ryzanstein_jax.batch import Bucket, StepLayout, attention_plan
from ryzanstein_jax.kv_cache import QuantizedPages
from tests.support import make_plan

SLOTS, QUERIES, HEAD_DIM = 2, 3, 8
SCALE = 0.3
BUCKET = Bucket(decodes=4, prefill_tokens=192, prefills=4, rows=200)
LONGEST = 512
#: (page size, window, softcap)
SETTINGS = [(1, None, None), (8, 40, None), (16, None, 4.0), (32, 200, 30.0), (16, 1, None)]

#: What a step brings: positions of decode tokens, and (first position, length) of chunks.
STEPS: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "decodes only": ([0, 511, BLOCK - 1, BLOCK], []),
    "one decode": ([300], []),
    "chunks only": ([], [(0, 5), (BLOCK - 3, 70), (0, 1), (400, 112)]),
    "one chunk of whole tiles": ([], [(BLOCK, 3 * TILE)]),
    "a chunk that ends with the table": ([7], [(LONGEST - 190, 190)]),
    "a bit of all": ([37, 250], [(0, TILE), (63, TILE + 1), (129, 1)]),
}


@functools.cache
def jitted(page_size, window, softcap, queries=QUERIES):
    layout = StepLayout(BUCKET, page_size, LONGEST // page_size)

    @jax.jit
    def run(flat, q, k, v, keys, values):
        plan = attention_plan(layout.unpack(flat))
        return attend(q, k, v, keys, values, plan, scale=SCALE, window=window, softcap=softcap)

    return layout, run


def quantized(x, dtype):
    """8-bit numbers and the scale of each vector of the last dimension."""
    most = {"int8": 127.0, "uint8": 448.0}[jnp.dtype(dtype).name]
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scaled = x * np.divide(most, largest, out=np.zeros_like(largest), where=largest > 0)
    if dtype == jnp.int8:
        numbers = np.round(scaled).astype(np.int8)
    else:
        numbers = scaled.clip(-most, most).astype(jnp.float8_e4m3fn).view(np.uint8)
    return numbers, (largest * np.float32(1 / most))[..., 0]


def as_stored(x, dtype):
    """What is left of values in a cache of that dtype."""
    if jnp.dtype(dtype).itemsize > 1:
        return x
    return unscaled(QuantizedPages(*quantized(x, dtype)))


def unscaled(pages):
    """What pages hold, in float32."""
    if not isinstance(pages, QuantizedPages):
        return np.asarray(pages)
    numbers = np.asarray(pages.numbers)
    numbers = numbers.view(jnp.float8_e4m3fn) if numbers.dtype == np.uint8 else numbers
    return numbers.astype(np.float32) * np.asarray(pages.scales)[..., None]


class Case:
    """Sequences with random keys and values, of which the pages hold what came before the step."""

    def __init__(self, decodes, chunks, page_size, seed=0):
        parts = [(position, 1) for position in decodes] + chunks
        self.parts, self.page_size = parts, page_size
        table_width = LONGEST // page_size
        num_pages = 1 + table_width * len(parts)
        pages = np.random.default_rng(seed).permutation(np.arange(1, num_pages)).reshape(len(parts), table_width)
        # Whoever reads a place that is not his sees it: the numbers there are huge.
        shape = (num_pages, SLOTS, page_size, HEAD_DIM)
        self.keys, self.values = np.full(shape, 30.0, np.float32), np.full(shape, 1e6, np.float32)
        self.sequences = []
        for (begin, length), table in zip(parts, pages, strict=True):
            # A sequence's numbers depend on its own place in the step only.
            rng = np.random.default_rng([begin, length])
            end = begin + length
            q, k, v = (
                rng.standard_normal((end, SLOTS, *more, HEAD_DIM)).astype(np.float32) for more in ((QUERIES,), (), ())
            )
            for position in range(begin):
                self.keys[table[position // page_size], :, position % page_size] = k[position]
                self.values[table[position // page_size], :, position % page_size] = v[position]
            self.sequences.append((q, k, v, table[: -(-end // page_size)].tolist()))
        tokens = np.zeros(LONGEST, np.int32)
        tables = [sequence[3] for sequence in self.sequences]
        self.plan = make_plan(
            [(tokens, tables[i], position) for i, position in enumerate(decodes)],
            [(tokens, tables[len(decodes) + i], begin, begin + n) for i, (begin, n) in enumerate(chunks)],
        )
        self.num_decodes = len(decodes)

    def run(self, window, softcap, dtype=jnp.float32):
        """Attended values of each sequence's tokens, and what the pages of that dtype hold afterwards."""
        layout, run = jitted(self.page_size, window, softcap)
        # Padding tokens bring large numbers too.
        padded = [
            np.full((BUCKET.tokens, SLOTS, *more, HEAD_DIM), fill, np.float32)
            for more, fill in (((QUERIES,), 1.0), ((), 30.0), ((), 1e6))
        ]
        places, where = [], 0
        for number, (begin, length) in enumerate(self.parts):
            start = number if number < self.num_decodes else BUCKET.decodes + where
            where += 0 if number < self.num_decodes else length
            places.append(slice(start, start + length))
            for array, values in zip(padded, self.sequences[number][:3], strict=True):
                array[places[-1]] = values[begin:]
        width = LONGEST // self.page_size
        # One size of cache for all cases, so that one program serves them.
        full = 1 + width * (BUCKET.decodes + BUCKET.prefills)
        extra = ((0, full - len(self.keys)), (0, 0), (0, 0), (0, 0))
        pages = [np.pad(x, extra) for x in (self.keys, self.values)]
        if jnp.dtype(dtype).itemsize == 1:
            pages = [QuantizedPages(*map(jnp.asarray, quantized(x, dtype))) for x in pages]
        out, *pages = run(layout.pack(self.plan), *padded, *pages)
        return [np.asarray(out)[place] for place in places], *map(unscaled, pages)


def reference(q, k, v, begin, window, softcap):
    out = []
    for position in range(begin, len(q)):
        first = 0 if window is None else max(0, position - window + 1)
        scores = np.einsum("kqh,lkh->kql", q[position], k[first : position + 1]).astype(np.float64) * SCALE
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out.append(np.einsum("kql,lkh->kqh", weights, v[first : position + 1]))
    return np.stack(out)


@pytest.mark.parametrize(
    ("page_size", "window", "softcap", "dtype"),
    [
        *((*setting, jnp.float32) for setting in SETTINGS),
        (16, None, None, jnp.int8),
        (8, 40, 4.0, jnp.int8),
        (16, 200, None, jnp.uint8),
    ],
)
def test_against_numpy(page_size, window, softcap, dtype):
    """An 8-bit cache holds what is written rounded, and is read so to the last bits."""
    for name, (decodes, chunks) in STEPS.items():
        case = Case(decodes, chunks, page_size)
        outs, keys, values = case.run(window, softcap, dtype)
        for (begin, _), (q, k, v, table), out in zip(case.parts, case.sequences, outs, strict=True):
            k, v = as_stored(k, dtype), as_stored(v, dtype)
            wanted = reference(q, k, v, begin, window, softcap)
            np.testing.assert_allclose(out, wanted, atol=2e-5, err_msg=f"{name}, from {begin}")
            for stored, given in ((keys, k), (values, v)):  # old entries stand, new ones are in their places
                flat = stored[table].transpose(0, 2, 1, 3).reshape(-1, SLOTS, HEAD_DIM)[: len(given)]
                np.testing.assert_array_equal(flat, given, err_msg=name)


def test_random_plans():
    rng = np.random.default_rng(3)
    for seed in range(12):
        decodes = rng.integers(0, LONGEST, rng.integers(0, 5)).tolist()
        lengths = rng.integers(1, 48, rng.integers(0 if decodes else 1, 5)).tolist()
        chunks = [(int(rng.integers(0, LONGEST - length)), length) for length in lengths]
        case = Case(decodes, chunks, 8, seed)
        outs, _, _ = case.run(40, None)
        for (begin, _), (q, k, v, _), out in zip(case.parts, case.sequences, outs, strict=True):
            np.testing.assert_allclose(out, reference(q, k, v, begin, 40, None), atol=2e-5, err_msg=f"{seed}")


@pytest.mark.parametrize(("page_size", "window", "softcap"), SETTINGS[:3])
def test_a_sequence_does_not_see_the_others(page_size, window, softcap):
    """Beside other sequences and on other pages: the same values within rounding."""
    decodes, chunks = STEPS["a bit of all"]
    together, _, _ = Case(decodes, chunks, page_size).run(window, softcap)
    alone = [Case([position], [], page_size, 1).run(window, softcap)[0][0] for position in decodes]
    alone += [Case([], [chunk], page_size, 2).run(window, softcap)[0][0] for chunk in chunks]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("window", "dtype"), [(None, jnp.float32), (150, jnp.float32), (None, jnp.int8)])
def test_shared_blocks(window, dtype):
    """Sequences that begin on the same pages, beside some that do not, attend as if each had its own."""
    page_size, decodes = 16, 2 * SHARERS + 3
    layout = StepLayout(Bucket(decodes + 1, 0, 0, decodes + 1), page_size, LONGEST // page_size)
    rng = np.random.default_rng(7)
    pages = iter(rng.permutation(np.arange(1, 1 + decodes * LONGEST // page_size)).tolist())
    tables = [[next(pages) for _ in range(LONGEST // page_size)] for _ in range(decodes)]
    lens = rng.integers(2 * BLOCK + 1, LONGEST, decodes)
    lens[0] = 2 * BLOCK  # its last shared block is the one it is writing to: it reads that block alone
    for sequence in range(decodes - 1):  # two groups, of one and of three whole blocks, and some pages more
        first, shared = (0, BLOCK) if sequence <= SHARERS else (SHARERS + 1, 3 * BLOCK)
        tables[sequence][: shared // page_size + 1] = tables[first][: shared // page_size + 1]
        lens[sequence] = max(lens[sequence], shared + page_size + 1) if sequence else lens[sequence]
    plan = make_plan([(np.zeros(LONGEST, np.int32), tables[i], int(lens[i]) - 1) for i in range(decodes)], [])
    fields = jax.jit(layout.unpack)(layout.pack(plan))
    assert fields["num_shared"] == 1 + 3 and fields["shared_members"].sum() == SHARERS + 1 + 3 * (SHARERS + 1)
    assert fields["private_blocks"].sum() == (-(-lens // BLOCK)).sum() - fields["shared_members"].sum()

    cache = (1 + decodes * LONGEST // page_size, SLOTS, page_size, HEAD_DIM)
    keys, values = (rng.standard_normal(cache).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((decodes + 1, SLOTS, QUERIES, HEAD_DIM)).astype(np.float32)
    k, v = (rng.standard_normal((decodes + 1, SLOTS, HEAD_DIM)).astype(np.float32) for _ in range(2))
    run = jax.jit(functools.partial(attend, scale=SCALE, window=window))
    if dtype == jnp.int8:
        keys, values = (QuantizedPages(*quantized(x, dtype)) for x in (keys, values))
    out, *pages = run(q, k, v, keys, values, attention_plan(fields))
    keys, values = map(unscaled, pages)
    for sequence, length in enumerate(lens.tolist()):
        seen_k, seen_v = (
            x[tables[sequence]].transpose(0, 2, 1, 3).reshape(-1, SLOTS, HEAD_DIM)[:length] for x in (keys, values)
        )
        padded_q = np.broadcast_to(q[sequence], (length, *q[sequence].shape))
        wanted = reference(padded_q, seen_k, seen_v, length - 1, window, None)[0]
        np.testing.assert_allclose(np.asarray(out)[sequence], wanted, atol=2e-5, err_msg=f"{sequence}")


@pytest.mark.parametrize("tokens", [0, 1, TILE - 1, TILE, 3 * TILE + 5])
def test_max_tiles_is_enough_for_any_cut(tokens):
    rng = np.random.default_rng(tokens)
    for prefills in range(1, min(8, tokens) + 1):
        cuts = np.sort(rng.choice(np.arange(1, tokens), prefills - 1, replace=False)) if prefills > 1 else []
        lengths = np.diff([0, *cuts, tokens])
        assert sum(-(-length // TILE) for length in lengths) <= max_tiles(tokens, prefills)
    assert max_tiles(0, 8) == 0
