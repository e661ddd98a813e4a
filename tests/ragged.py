"""Steps over sequences of all lengths, with what each should attend to: for tests of attention's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ryzanstein_jax.batch import Bucket, StepLayout
from tests.support import make_plan

LONGEST = 512


class Ragged:
    """One step. The pages hold what came before it, and what it brings itself.

    What a sequence attends to depends on its own place only: first position, length, number of query heads.

    Args:
        decodes: positions of decode tokens.
        chunks: (first position, length) of prompt chunks.
        slots, queries, head_dim, page_size, dtype: of the attention.
        stale: what lies in pages that nobody owns, and in others behind the last position.
        shared: positions, in whole pages, that all decode tokens behind them begin with.
        seed: which pages the sequences have.

    Attributes:
        bucket, layout, flat: the step as programs take it.
        q, k, v: of its tokens; those of padding are numbers too.
        keys, values: the pages.
        places: which tokens of the step each sequence has: decode tokens, then chunks.
        real: all of them.
    """

    def __init__(
        self,
        decodes: Sequence[int],
        chunks: Sequence[tuple[int, int]],
        *,
        slots: int,
        queries: int,
        head_dim: int,
        page_size: int = 16,
        dtype: Any = np.float32,
        stale: float = np.nan,
        shared: int = 0,
        seed: int = 0,
        bucket: Bucket | None = None,
    ):
        parts = [(position, 1) for position in decodes] + list(chunks)
        self.bucket = bucket or Bucket(8 if decodes else 0, 192 if chunks else 0, 4 if chunks else 0, 200)
        width = LONGEST // page_size
        self.layout = StepLayout(self.bucket, page_size, width)
        num_pages = 1 + width * (self.bucket.decodes + self.bucket.prefills)
        free = np.random.default_rng(seed).permutation(np.arange(1, num_pages))[: width * len(parts)]
        tables = free.reshape(len(parts), width)
        self.keys, self.values = (np.full((num_pages, slots, page_size, head_dim), stale, np.float32) for _ in range(2))
        rng = np.random.default_rng(1)
        self.q = rng.standard_normal((self.bucket.tokens, slots, queries, head_dim)).astype(np.float32)
        self.k, self.v = (rng.standard_normal((self.bucket.tokens, slots, head_dim)).astype(np.float32) for _ in "kv")
        prefix = rng.standard_normal((2, LONGEST, slots, head_dim)).astype(np.float32)
        self.sequences, self.places, where = [], [], self.bucket.decodes
        for number, (begin, length) in enumerate(parts):
            own, end, table = np.random.default_rng([begin, length, queries]), begin + length, tables[number]
            k, v = own.standard_normal((2, end, slots, head_dim)).astype(np.float32)
            if number < len(decodes) and begin >= shared:
                k[:shared], v[:shared] = prefix[:, :shared]
                table[: shared // page_size] = tables[0, : shared // page_size]
            start, where = (number, where) if number < len(decodes) else (where, where + length)
            place = slice(start, start + length)
            self.q[place] = own.standard_normal((length, slots, queries, head_dim))
            self.k[place], self.v[place] = k[begin:], v[begin:]
            for position in range(end):
                page, row = table[position // page_size], position % page_size
                self.keys[page, :, row], self.values[page, :, row] = k[position], v[position]
            self.places.append(place)
            self.sequences.append((begin, k, v))
        self.plan = make_plan(
            [(np.zeros(LONGEST, np.int32), tables[i], position) for i, position in enumerate(decodes)],
            [(np.zeros(LONGEST, np.int32), tables[len(decodes) + i], b, b + n) for i, (b, n) in enumerate(chunks)],
        )
        self.tables, self.flat = tables, self.layout.pack(self.plan)
        self.q, self.k, self.v, self.keys, self.values = (
            np.array(jnp.asarray(x, dtype)) for x in (self.q, self.k, self.v, self.keys, self.values)
        )
        self.real = [token for place in self.places for token in range(place.start, place.stop)]

    def wanted(self, *, scale: float, window: int | None = None, softcap: float | None = None) -> list[np.ndarray]:
        """What each sequence's tokens should attend to, float64 [tokens, K, Q, H], from the numbers as given."""
        results = []
        for (begin, k, v), place in zip(self.sequences, self.places, strict=True):
            k, v = (np.asarray(jnp.asarray(x, self.q.dtype), np.float64) for x in (k, v))
            rows = []
            for position, q in enumerate(np.asarray(self.q[place], np.float64), begin):
                first = 0 if window is None else max(0, position - window + 1)
                scores = np.einsum("kqh,lkh->kql", q, k[first : position + 1]) * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                rows.append(np.einsum("kql,lkh->kqh", weights, v[first : position + 1]))
            results.append(np.stack(rows))
        return results
