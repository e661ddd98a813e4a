"""What a request has produced so far: tokens, text and log-probabilities, gathered into its `RequestOutput`."""

from __future__ import annotations

import time

import numpy as np

from ryzanstein_jax.engine.plan_builder import PoolPart
from ryzanstein_jax.engine.sequence import Sequence
from ryzanstein_jax.engine.tokens import IncrementalDetokenizer, Tokenizer
from ryzanstein_jax.errors import RyzansteinError
from ryzanstein_jax.plan import StepResult
from ryzanstein_jax.request import (
    CompletionOutput,
    Logprob,
    PoolingParams,
    RequestOutput,
    RequestTimings,
    SamplingParams,
    TokenLogprobs,
)


class HiddenStateError(RyzansteinError):
    """The model gave a hidden state of which no embedding can be made."""


class RequestState:
    """One request: its sequences, and the output that grows with them.

    Attributes:
        output: the same object from the first token to the last.
        sequences: one per completion, in the order of `output.outputs`.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sequences: list[Sequence],
        tokenizer: Tokenizer | None,
        pooling: PoolingParams | None = None,
    ):
        self.params, self.sequences, self.pooling = params, sequences, pooling
        self._sum: np.ndarray | None = None  # of the hidden states so far
        self._tokenizer = tokenizer if params.detokenize else None
        self.output = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[CompletionOutput(sequence.index) for sequence in sequences],
            timings=RequestTimings(time.monotonic()),
        )
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]
        if params.logprobs is not None:
            for completion in self.output.outputs:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
        self._detokenizers: list[IncrementalDetokenizer] = []
        if self._tokenizer is not None:
            self._detokenizers = [
                IncrementalDetokenizer(
                    self._tokenizer,
                    skip_special_tokens=params.skip_special_tokens,
                    stop=params.stop,
                    include_stop_str_in_output=params.include_stop_str_in_output,
                )
                for _ in sequences
            ]

    def note_scheduled(self, sequence: Sequence) -> None:
        """A sequence begins to run."""
        if self.output.timings.first_scheduled is None:
            self.output.timings.first_scheduled = time.monotonic()
            self.output.num_cached_tokens = sequence.num_cached

    def score_prompt(self, sequence: Sequence, position: int, result: StepResult, row: int) -> None:
        """Takes the log-probability of a prompt token; they come in order."""
        scored = self.output.prompt_logprobs
        assert scored is not None
        assert len(scored) == position
        token, wanted = sequence.token_ids[position], self.params.prompt_logprobs or 0
        scored.append(self._logprobs(token, wanted, result, row))

    def pool(self, part: PoolPart, result: StepResult) -> None:
        """Takes a part of the embedding; parts come in order, and from the beginning again after a preemption."""
        assert self.pooling is not None
        found = result.pooled[part.pool].astype(np.float64)
        if self.pooling.pooling == "mean" and part.begin > 0:
            assert self._sum is not None
            found += self._sum
        self._sum = found
        if part.is_last:  # of length 1, which makes dividing by the number of tokens needless
            kept = found[: self.pooling.dimensions]
            length = float(np.linalg.norm(kept))
            if not np.isfinite(length) or not length:
                raise HiddenStateError(f"the hidden states add up to a vector of length {length}")
            self.output.embedding = (kept / length).astype(np.float32)

    def append(self, sequence: Sequence, result: StepResult, row: int) -> str | None:
        """Takes the newest token of a sequence; returns the stop string that it completes."""
        completion = self.output.outputs[sequence.index]
        token = sequence.token_ids[-1]
        completion.token_ids.append(token)
        if completion.logprobs is not None:
            entry = self._logprobs(token, self.params.logprobs or 0, result, row)
            completion.logprobs.append(entry)
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + entry[token].logprob
        self.output.timings.note_token()
        if not self._detokenizers:
            return None
        hides_end = self.params.skip_special_tokens and not self.params.include_stop_str_in_output
        if sequence.finish_reason == "stop" and token in sequence.stop_token_ids and hides_end:
            return None  # the token that ended it is no text, even where the tokenizer doesn't call it special
        detokenizer = self._detokenizers[sequence.index]
        may_stop = len(completion.token_ids) > self.params.min_tokens
        stop = detokenizer.append([token], check_stop=may_stop)
        if completion.text != detokenizer.text:
            completion.text = detokenizer.text
        return stop

    def end(self, sequence: Sequence) -> None:
        """Copies how a sequence ended; the text that was held back is shown."""
        completion = self.output.outputs[sequence.index]
        if completion.finished:
            return
        reason, stop_reason = sequence.finish_reason, sequence.stop_reason
        if self._detokenizers and reason != "error":
            detokenizer = self._detokenizers[sequence.index]
            stop = detokenizer.finish()
            completion.text = detokenizer.text
            if stop is not None and reason == "length":
                reason, stop_reason = "stop", stop
        completion.finish_reason, completion.stop_reason = reason, stop_reason
        if self.output.finished:
            self.output.timings.note_end()

    def fail(self, error: Exception, reason: str = "error") -> None:
        """Ends whatever has not ended yet, without touching what may have raised the error."""
        self.output.error = error
        self.output.timings.note_end()
        for completion in self.output.outputs:
            completion.finish_reason = completion.finish_reason or reason

    def _logprobs(self, token: int, wanted: int, result: StepResult, row: int) -> TokenLogprobs:
        """The chosen token first, then the most likely ones."""
        entry = {token: Logprob(float(result.logprobs[row]), int(result.ranks[row]), self._decoded(token))}
        if wanted:
            others, values = result.top_tokens[row, :wanted].tolist(), result.top_logprobs[row, :wanted].tolist()
            for rank, (other, value) in enumerate(zip(others, values, strict=True), start=1):
                if other != token:
                    entry[other] = Logprob(value, rank, self._decoded(other))
        return entry

    def _decoded(self, token: int) -> str | None:
        if self._tokenizer is None or token >= self._tokenizer.vocab_size:
            return None
        return self._tokenizer.decode([token], skip_special_tokens=False)
