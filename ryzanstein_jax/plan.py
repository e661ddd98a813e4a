"""What crosses between the scheduler and the devices: a step's plan and a step's result.

Both are a handful of numpy arrays with a fixed byte layout, so that they can be broadcast to worker
processes as plain bytes. Ranks know nothing about requests: a plan holds all that a step needs.

A step runs T tokens of S sequences. The first `num_decodes` sequences bring one token each; the
others bring a chunk of their prompt each. R *rows* pick the tokens whose logits are wanted: to sample
the next token, or (`target >= 0`) to score a given one for prompt log-probabilities. P *pools* pick
ranges of tokens whose final hidden states are wanted, summed: an embedding is made of such sums.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from ryzanstein_jax.errors import RyzansteinError

#: One row to sample. `token` indexes the step's tokens, `seq` its sequences. `key` is the request's
#: seed as two words; the sampling key is fold_in(key, position), with `position` that of the token sampled.
ROW = np.dtype(
    [
        ("token", "<i4"),
        ("seq", "<i4"),
        ("position", "<i4"),
        ("key", "<u4", (2,)),
        ("temperature", "<f4"),
        ("top_k", "<i4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        # From here on they are read by the full sampler only (`StepPlan.full`).
        ("repetition_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("prompt_len", "<i4"),
        ("target", "<i4"),
    ]
)

#: One biased logit of a row: minus infinity bans a token.
BIAS = np.dtype([("row", "<i4"), ("token", "<i4"), ("value", "<f4")])

#: Most prompt chunks in one step.
MAX_PREFILLS = 16

_MAGIC = b"RYZP"
_HEADER = struct.Struct("<4sHHQqqqqqqqqq")
_VERSION = 2
MAX_PLAN_BYTES = 256 << 20


def most_prompt_tokens(max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> int:
    """Prompt tokens that a step has room for: as many as asked for, or as its chunks can bring together."""
    return min(max_num_batched_tokens, min(MAX_PREFILLS, max_num_seqs) * max_model_len)


class PlanFormatError(RyzansteinError, ValueError):
    """Bytes that are not a plan or a result."""


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step. Arrays are C-contiguous.

    Attributes:
        step: number of the step, from 0, without gaps.
        num_decodes: how many sequences, the first ones, bring exactly one token.
        token_ids: int32 [T]; `-(row + 1)` stands for the token that the previous step sampled at `row`.
        positions: int32 [T], the position of each token in its sequence.
        query_lens: int32 [S], tokens of each sequence in this step; they sum to T.
        page_tables: int32 [S, W], the pages of each sequence in order, padded with 0.
        rows: ROW [R].
        full: whether any row needs penalties, bias, masks, targets or log-probabilities.
        num_logprobs: how many alternatives per row to return; -1 for none at all.
        bias: BIAS [B].
        mask: uint32 [R, ceil(vocab / 32)] of allowed tokens, or [0, 0] when no row is constrained.
        pools: int32 [P, 2], first and last token (of this step's) of each sum of hidden states: tokens of one prompt
            chunk, which is in one pool at most.
    """

    step: int
    num_decodes: int
    token_ids: np.ndarray
    positions: np.ndarray
    query_lens: np.ndarray
    page_tables: np.ndarray
    rows: np.ndarray
    full: bool = False
    num_logprobs: int = -1
    bias: np.ndarray = field(default_factory=lambda: np.zeros(0, BIAS))
    mask: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint32))
    pools: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))

    @property
    def num_prefill_tokens(self) -> int:
        return len(self.token_ids) - self.num_decodes

    @property
    def num_prefills(self) -> int:
        return len(self.query_lens) - self.num_decodes

    def to_bytes(self) -> bytes:
        """The plan as bytes; `from_bytes` is its inverse."""
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            int(self.full),
            self.step,
            self.num_decodes,
            self.num_logprobs,
            len(self.token_ids),
            len(self.query_lens),
            self.page_tables.shape[1],
            len(self.rows),
            len(self.bias),
            self.mask.shape[1] if len(self.mask) else 0,
            len(self.pools),
        )
        arrays = (self.token_ids, self.positions, self.query_lens, self.page_tables, self.rows, self.bias, self.mask)
        return b"".join([header, *(array.tobytes() for array in (*arrays, self.pools))])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> StepPlan:
        """Reads a plan.

        Raises:
            PlanFormatError: the bytes are no plan of this version, or their length is not what
                their header says.
        """
        if len(data) > MAX_PLAN_BYTES:
            raise PlanFormatError(f"a plan of {len(data)} bytes is over the limit of {MAX_PLAN_BYTES}")
        if len(data) < _HEADER.size:
            raise PlanFormatError(f"a plan of {len(data)} bytes is shorter than its header of {_HEADER.size}")
        magic, version, full, step, decodes, num_logprobs, t, s, w, r, b, m, p = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise PlanFormatError(f"not a step plan of version {_VERSION}: it begins with {bytes(data[:6])!r}")
        if min(decodes, t, s, w, r, b, m, p) < 0 or full > 1 or decodes > s or decodes > t or num_logprobs < -1:
            raise PlanFormatError("a step plan's header holds impossible counts")
        reader = _Reader(data, _HEADER.size)
        plan = cls(
            step=step,
            num_decodes=decodes,
            token_ids=reader.take("<i4", (t,)),
            positions=reader.take("<i4", (t,)),
            query_lens=reader.take("<i4", (s,)),
            page_tables=reader.take("<i4", (s, w)),
            rows=reader.take(ROW, (r,)),
            full=bool(full),
            num_logprobs=num_logprobs,
            bias=reader.take(BIAS, (b,)),
            mask=reader.take("<u4", (r if m else 0, m)),
            pools=reader.take("<i4", (p, 2)),
        )
        reader.end()
        return plan


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step sampled.

    Attributes:
        step: number of the step that this answers.
        tokens: int32 [R], the sampled token of each row (the target itself where a row had one).
        logprobs: float32 [R], log-probability of that token, or [0] when the plan asked for none.
        ranks: int32 [R], how many tokens were at least as likely (1 is the most likely), or [0].
        top_tokens: int32 [R, N], the N most likely tokens, best first, or [0, 0].
        top_logprobs: float32 [R, N], or [0, 0].
        pooled: float32 [P, D], the sums of hidden states that the plan's pools asked for, or [0, 0].
    """

    step: int
    tokens: np.ndarray
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    ranks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    top_tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    top_logprobs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    pooled: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def to_bytes(self) -> bytes:
        """The result as bytes; `from_bytes` is its inverse."""
        n = self.top_tokens.shape[1] if len(self.top_tokens) else 0
        p, d = self.pooled.shape if len(self.pooled) else (0, 0)
        scored = int(len(self.logprobs) > 0)
        header = _HEADER.pack(b"RYZR", _VERSION, scored, self.step, len(self.tokens), n, p, d, 0, 0, 0, 0, 0)
        arrays = (self.tokens, self.logprobs, self.ranks, self.top_tokens, self.top_logprobs, self.pooled)
        return b"".join([header, *(array.tobytes() for array in arrays)])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> StepResult:
        """Reads a result.

        Raises:
            PlanFormatError: the bytes are no result, or their length is not what the header says.
        """
        if len(data) > MAX_PLAN_BYTES:
            raise PlanFormatError(f"a result of {len(data)} bytes is over the limit of {MAX_PLAN_BYTES}")
        if len(data) < _HEADER.size:
            raise PlanFormatError(f"a result of {len(data)} bytes is shorter than its header of {_HEADER.size}")
        magic, version, scored, step, r, n, p, d, *_ = _HEADER.unpack_from(data)
        if magic != b"RYZR" or version != _VERSION or min(r, n, p, d) < 0 or scored > 1:
            raise PlanFormatError(f"not a step result of version {_VERSION}: it begins with {bytes(data[:6])!r}")
        reader = _Reader(data, _HEADER.size)
        scored_rows = r if scored else 0
        result = cls(
            step=step,
            tokens=reader.take("<i4", (r,)),
            logprobs=reader.take("<f4", (scored_rows,)),
            ranks=reader.take("<i4", (scored_rows,)),
            top_tokens=reader.take("<i4", (r if n else 0, n)),
            top_logprobs=reader.take("<f4", (r if n else 0, n)),
            pooled=reader.take("<f4", (p, d)),
        )
        reader.end()
        return result


class _Reader:
    """Takes arrays off a buffer in order, checking every length before it believes it."""

    def __init__(self, data: bytes | memoryview, offset: int):
        self._data, self._offset = data, offset

    def take(self, dtype: str | np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(dtype)
        count = 1
        for size in shape:
            count *= size
        end = self._offset + count * dtype.itemsize
        if end > len(self._data):
            raise PlanFormatError(f"truncated: {len(self._data)} bytes, its arrays need at least {end}")
        # Beside a dimension of 0 any other takes no bytes, but numpy refuses one over its own limit.
        if max(shape) > MAX_PLAN_BYTES:
            raise PlanFormatError(f"an array of shape {shape} is over the limit of {MAX_PLAN_BYTES}")
        array = np.frombuffer(self._data, dtype, count, self._offset).reshape(shape)
        self._offset = end
        return array

    def end(self) -> None:
        if self._offset != len(self._data):
            raise PlanFormatError(f"{len(self._data) - self._offset} bytes are left over after the last array")
