"""What a user asks for and what comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np

from ryzanstein_jax.config import POOLINGS
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.structured_outputs import StructuredOutputsParams

MAX_N = 128
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024

#: Why a completion ended. "length" is max_tokens or the model's limit, "abort" the caller's wish.
FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and defaults are vLLM's.

    Attributes:
        n: completions of the same prompt.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this.
        top_k: keep that many most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one.
        repetition_penalty: over 1 makes tokens of prompt and completion less likely.
        presence_penalty: subtracted once from the logit of each token of the completion.
        frequency_penalty: subtracted per occurrence in the completion.
        logit_bias: token id -> number from -100 to 100 added to its logit.
        seed: makes sampling repeatable, whatever else runs; None draws one.
        max_tokens: longest completion; None goes on to the model's limit.
        min_tokens: no end-of-sequence or stop token before that many.
        stop: strings that end the completion.
        stop_token_ids: tokens that end it.
        include_stop_str_in_output: leave the stop string in the text.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: return the log-probabilities of each token and of that many alternatives.
        prompt_logprobs: the same for each token of the prompt.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: False returns token ids only.
        structured_outputs: a form that the completion must have, such as a JSON schema; it ends when that is complete.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if isinstance(self.stop, str):
            set_(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
                raise RequestError(name, value, "use a list")
            set_(self, name, tuple(value or ()))
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", self.logit_bias, "use a mapping of token ids to numbers")
        set_(self, "logit_bias", dict(self.logit_bias or {}))

        _whole("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p", self.top_p, "use a number above 0 and at most 1")
        _whole("top_k", self.top_k, -1, 1 << 30)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _whole("seed", self.seed, -(1 << 63), (1 << 64) - 1, optional=True)
        _whole("max_tokens", self.max_tokens, 1, 1 << 30, optional=True)
        _whole("min_tokens", self.min_tokens, 0, 1 << 30)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", self.min_tokens, f"use at most max_tokens={self.max_tokens}")
        _whole("logprobs", self.logprobs, 0, 1 << 20, optional=True)
        _whole("prompt_logprobs", self.prompt_logprobs, 0, 1 << 20, optional=True)
        if len(self.stop) > MAX_STOPS:
            raise RequestError("stop", self.stop, f"use at most {MAX_STOPS} stop strings")
        for stop in self.stop:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise RequestError("stop", stop, f"use strings of 1 to {MAX_STOP_LENGTH} characters")
        if self.stop and not self.detokenize:
            raise RequestError("stop", self.stop, "stop strings need detokenize=True")
        if len(self.stop_token_ids) > MAX_STOPS:
            raise RequestError("stop_token_ids", self.stop_token_ids, f"use at most {MAX_STOPS}")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, 1 << 31)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, 0, 1 << 31)
            _number("logit_bias", bias, -100.0, 100.0)
        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputsParams):
            raise RequestError("structured_outputs", form, "use StructuredOutputsParams")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def field_names(cls) -> frozenset[str]:
        return frozenset(f.name for f in fields(cls))


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How to make an embedding of a prompt: instead of `SamplingParams`, for a request that generates nothing.

    Attributes:
        pooling: "last" takes the final hidden state of the last token, "mean" the mean of all tokens'.
        dimensions: keep only so many of the first values; None keeps all. It is for models that were trained for it
            (Matryoshka embeddings).
    """

    pooling: str = "last"
    dimensions: int | None = None

    #: A request for an embedding has one answer.
    n: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise RequestError("pooling", self.pooling, f"use one of {', '.join(POOLINGS)}")
        _whole("dimensions", self.dimensions, 1, 1 << 20, optional=True)


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token, of the distribution before temperature and filters.

    `rank` counts from 1, the most likely token.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


#: One entry per token: token id -> Logprob; the chosen token is always among them.
TokenLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One of the n completions of a request; grows while the request streams."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestTimings:
    """Seconds on the monotonic clock; None until it happened.

    Attributes:
        pauses: from when devices were lost to the next token, for each time that this kept the request waiting.
        lost: when they were lost, while it waits.
    """

    arrived: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    pauses: list[tuple[float, float]] = field(default_factory=list)
    lost: float | None = None

    def note_lost(self) -> None:
        """The devices were lost; where they are lost again before a token came, the pause goes on."""
        if self.lost is None:
            self.lost = time.monotonic()

    def note_token(self) -> None:
        """A token came."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        if self.lost is not None:
            self._resume(time.monotonic())

    def note_end(self) -> None:
        """The request ended, one way or another."""
        self.finished = time.monotonic()
        if self.lost is not None:
            self._resume(self.finished)

    def _resume(self, now: float) -> None:
        assert self.lost is not None
        self.pauses.append((self.lost, now))
        self.lost = None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived


@dataclass(slots=True)
class RequestOutput:
    """What `LLM.generate` returns for one prompt, or a stream yields as it grows."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    timings: RequestTimings
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    embedding: np.ndarray | None = None  # float32 [hidden], of length 1, where `PoolingParams` asked for it
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """An embedding.

    Attributes:
        embedding: float32 [hidden], or [dimensions], of length 1.
    """

    embedding: np.ndarray


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` returns for one prompt. The names are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int = 0
    finished: bool = True


def _whole(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(name, value, f"use a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    # NaN fails the comparison, and so does an int that is too large for a float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(name, value, f"use a number from {low} to {high}")
