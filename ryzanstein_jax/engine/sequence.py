"""One completion while it runs. Three lengths tell all about it:

    0            num_cached        num_computed            num_tokens
    |----------------|-----------------|-----------------------|
    | found in the   | handed to the   | known, or sampled by  |
    | prefix cache   | device          | a step still running  |

`num_tokens - num_computed` is what remains to be run: several tokens are a prompt (or one that was preempted
and is computed again), a single one is a decode. `num_tokens` runs ahead of `token_ids` by the pending
tokens, which a step in flight samples and whose values only the device knows yet.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ryzanstein_jax.engine.grammar import Matcher
from ryzanstein_jax.request import SamplingParams

_WORD = 0xFFFFFFFF


class Sequence:
    """One of the n completions of a request. The scheduler owns its state; others only read.

    Attributes:
        order: who goes first: (priority, number of the request, index); lower is earlier.
        token_ids: prompt and the known tokens of the completion.
        key: seed of its sampling as two words (high, low), as `jax.random.PRNGKey` has them.
        pooling: "last" or "mean" where it samples nothing, and its hidden states are wanted instead; else None.
        max_length: most tokens of prompt and completion together.
        pending_row, pending_step: row and step that sample its last token; -1 where it is known.
        num_scored: prompt positions whose log-probability was asked of the device; `num_scored_known` of them
            came back. Only used with `wants_prompt_logprobs`.
        matcher: where it stands in the grammar that it must follow, which has taken all known tokens of the completion;
            None where it may write anything.
        pages: its pages in order; empty unless running.
        page_keys: keys of its full pages, as far as they were needed yet.
        num_registered: how many of its pages were offered to the prefix cache.
        num_strikes, innocent_from: see `suspects`.
        slot: its row in the batch's arrays; -1 unless running.
    """

    __slots__ = (
        "banned_until_min",
        "eos_token_ids",
        "error",
        "finish_reason",
        "index",
        "innocent_from",
        "key",
        "matcher",
        "max_length",
        "num_cached",
        "num_computed",
        "num_logprobs",
        "num_registered",
        "num_scored",
        "num_scored_known",
        "num_strikes",
        "num_tokens",
        "order",
        "page_keys",
        "pages",
        "params",
        "pending_row",
        "pending_step",
        "pooling",
        "prompt_len",
        "request_id",
        "slot",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
        "uses_full_sampler",
        "wants_prompt_logprobs",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        key: tuple[int, int],
        index: int = 0,
        order: tuple[int, int, int] = (0, 0, 0),
        eos_token_ids: tuple[int, ...] = (),
        matcher: Matcher | None = None,
        pooling: str | None = None,
    ):
        self.request_id, self.index, self.params, self.order, self.key = request_id, index, params, order, key
        self.matcher, self.pooling = matcher, pooling
        self.token_ids = list(prompt_token_ids)
        self.prompt_len = len(prompt_token_ids)
        # The prompt is the same for all of a request's completions: the first one scores it.
        self.wants_prompt_logprobs = params.prompt_logprobs is not None and index == 0
        self.num_scored = self.num_scored_known = 1  # the first token follows nothing, so it has no log-probability
        self.eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self.stop_token_ids = self.eos_token_ids | frozenset(params.stop_token_ids)
        self.banned_until_min = sorted(self.stop_token_ids) if params.min_tokens else []
        self.num_logprobs = -1 if params.logprobs is None else params.logprobs
        self.uses_full_sampler = bool(
            params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
            or params.logit_bias
            or params.logprobs is not None
            or matcher is not None
        )
        self.max_length = 0
        self.num_cached = self.num_computed = 0
        self.num_tokens = self.prompt_len
        self.pending_row = self.pending_step = -1
        self.pages: list[int] = []
        self.page_keys: list[bytes] = []
        self.num_registered = 0
        self.num_strikes = self.innocent_from = 0
        self.slot = -1
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: Exception | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_running(self) -> bool:
        return self.slot >= 0

    @property
    def num_remaining(self) -> int:
        """Tokens to run before the next one can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def runs_as_chunk(self) -> bool:
        """Whether what remains is run as part of a prompt. A single token is a decode, unless nothing is sampled."""
        return self.num_remaining > (0 if self.pooling else 1)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether each token of the prompt has to be computed, also those that the prefix cache holds."""
        return self.scores_prompt or self.pooling == "mean"

    @property
    def longest(self) -> int | None:
        """Most tokens of prompt and completion as the request wants it; None for as many as there can be."""
        wanted = 0 if self.pooling else self.params.max_tokens
        return None if wanted is None else self.prompt_len + wanted

    @property
    def may_sample(self) -> bool:
        """Whether one more token is allowed; known beforehand, so that no step is spent on a token too many."""
        return self.num_tokens < self.max_length

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt positions still wait for their log-probability."""
        return self.wants_prompt_logprobs and self.num_scored < self.prompt_len

    @property
    def awaits_token(self) -> bool:
        """Whether it can't go on before its last token is known: the next one's mask depends on it."""
        return self.matcher is not None and self.pending_row >= 0

    def append(self, token: int) -> tuple[str, int | None] | None:
        """Takes its next token; returns how that ends it, as (finish reason, stop reason).

        Raises:
            RequestError: its grammar does not allow the token, which is then not taken.
        """
        if self.matcher is not None:
            self.matcher.accept(token)
        self.token_ids.append(token)
        if token in self.stop_token_ids and not self.bans_stops_at(len(self.token_ids) - 1):
            return "stop", None if token in self.eos_token_ids else token
        if self.matcher is not None and self.matcher.ended:
            return "stop", None
        return ("length", None) if len(self.token_ids) >= self.max_length else None

    def bans_stops_at(self, position: int) -> bool:
        """Whether `min_tokens` forbids to end with the token at this position."""
        return position - self.prompt_len < self.params.min_tokens

    def forget_device(self) -> None:
        """Back to what is known for sure: nothing computed, nothing pending, no pages."""
        self.num_cached = self.num_computed = self.num_registered = 0
        self.num_scored = self.num_scored_known
        self.num_tokens = len(self.token_ids)
        self.pending_row = self.pending_step = -1
        self.pages = []
        self.page_keys = []
        self.slot = -1

    def __repr__(self) -> str:
        lengths = f"{self.num_cached}<={self.num_computed}<={self.num_tokens}"
        return f"Sequence({self.request_id!r}, {self.index}, {lengths}, {self.finish_reason})"


def sampling_key(seed: int, index: int = 0) -> tuple[int, int]:
    """The key of completion `index` of a request with this seed, as two words (high, low).

    Completion 0 takes the seed itself, so that n does not change it; the others take seeds derived from it.
    """
    seed %= 1 << 64
    if index:
        data = seed.to_bytes(8, "little") + index.to_bytes(4, "little")
        seed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return seed >> 32, seed & _WORD


def drawn_seed(engine_seed: int, counter: int) -> int:
    """The seed of a request that brought none: the engine's, and how many it drew before."""
    return int(np.random.SeedSequence([engine_seed, counter]).generate_state(1, np.uint64)[0])
