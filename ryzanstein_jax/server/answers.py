"""Answers of the two endpoints that generate, whole or piece by piece, field for field as OpenAI's."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.request import CompletionOutput, RequestOutput
from ryzanstein_jax.server.encode import Prompt
from ryzanstein_jax.server.generation import Piece
from ryzanstein_jax.server.logprobs import CompletionLogprobs, chat_logprobs
from ryzanstein_jax.server.schema import ChatRequest, CompletionRequest, Sampling
from ryzanstein_jax.server.tool_calls import CallParser, CallPart
from ryzanstein_jax.server.tool_use import tool_use

Json = dict[str, Any]


class Answer(ABC):
    """What both have in common. Fed with all pieces of a request, whether it is streamed or not.

    Args:
        request: what was asked.
        prompts: its prompts.
        model: what clients call it.
        fingerprint: changes with whatever may change an answer.
    """

    prefix = object_name = chunk_name = ""

    def __init__(
        self, request: Sampling, prompts: Sequence[Prompt], tokenizer: Tokenizer, *, model: str, fingerprint: str
    ):
        self.n = request.n or 1
        self.prompts, self.tokenizer = prompts, tokenizer
        self._with_tokens = bool(request.return_token_ids)
        self._usage_in_stream = bool(request.stream_options and request.stream_options.include_usage)
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.outputs: dict[int, RequestOutput] = {}
        self._num_tokens: dict[int, int] = {}  # sent so far, by choice
        self.finish_reasons: list[str] = []

    # --- to be filled in

    @abstractmethod
    def events_of(self, index: int, piece: Piece, completion: CompletionOutput, first: int) -> Iterator[Json]:
        """Choices of a stream's chunks; `first` is the place of the piece's first token in the completion."""

    @abstractmethod
    def choice(self, index: int, prompt: int, completion: CompletionOutput) -> Json:
        """A choice of a whole answer."""

    # --- offered

    def first(self) -> Iterator[Json]:
        """What a stream begins with, before there is a token: nothing."""
        return iter(())

    def take(self, piece: Piece) -> Iterator[Json]:
        """Chunks of a stream for one piece."""
        chunk = piece.chunk
        index = piece.prompt * self.n + chunk.index
        self.outputs[piece.prompt] = chunk.output
        first = self._num_tokens.get(index, 0)
        for choice in self.events_of(index, piece, chunk.output.outputs[chunk.index], first):
            yield self._chunk([choice])
        self._num_tokens[index] = first + len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.finish_reasons.append(chunk.finish_reason)

    def note(self, piece: Piece) -> None:
        """Takes one piece of an answer that is not streamed."""
        self.outputs[piece.prompt] = piece.chunk.output
        if piece.chunk.finish_reason is not None:
            self.finish_reasons.append(piece.chunk.finish_reason)

    def last(self) -> Iterator[Json]:
        """What a stream ends with."""
        if self._usage_in_stream:
            yield {**self._chunk([]), "usage": self.usage()}

    def whole(self) -> Json:
        """The answer that is not streamed."""
        choices = [
            self.choice(prompt * self.n + completion.index, prompt, completion)
            for prompt in range(len(self.prompts))
            for completion in self.outputs[prompt].outputs
        ]
        return {**self._head, "object": self.object_name, "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Tokens in and out, over all prompts and choices."""
        prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        generated = sum(self.count(one) for output in self.outputs.values() for one in output.outputs)
        cached = sum(output.num_cached_tokens for output in self.outputs.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def count(self, completion: CompletionOutput) -> int:
        return len(completion.token_ids)

    @property
    def id(self) -> str:
        return str(self._head["id"])

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self._usage_in_stream else {}
        return {**self._head, "object": self.chunk_name, "choices": choices, **usage}

    def _tokens(self, token_ids: Sequence[int]) -> Json:
        return {"token_ids": list(token_ids)} if self._with_tokens else {}


class CompletionAnswer(Answer):
    """Of `/v1/completions`."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: CompletionRequest, *rest: Any, **named: Any):
        super().__init__(request, *rest, **named)
        self._echo, self._top = bool(request.echo), request.logprobs
        #: The engine makes at least one token; where none was asked for, it is left out.
        self._only_prompt = request.max_tokens == 0
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._echoed: set[int] = set()

    def events_of(self, index: int, piece: Piece, completion: CompletionOutput, first: int) -> Iterator[Json]:
        chunk = piece.chunk
        if self._echo and index not in self._echoed:
            self._echoed.add(index)
            yield {
                "index": index,
                "text": self._prompt_text(piece.prompt),
                "logprobs": self._of_prompt(index, piece.prompt),
                "finish_reason": None,
                **self._tokens(self.prompts[piece.prompt].token_ids),
            }
        tokens = [] if self._only_prompt else chunk.token_ids
        yield {
            "index": index,
            "text": "" if self._only_prompt else chunk.text,
            "logprobs": self._of_tokens(index, piece.prompt, completion, first, first + len(tokens)),
            "finish_reason": self._reason(chunk.finish_reason),
            **self._tokens(tokens),
        }

    def choice(self, index: int, prompt: int, completion: CompletionOutput) -> Json:
        text, tokens = ("", []) if self._only_prompt else (completion.text, completion.token_ids)
        logprobs = self._of_tokens(index, prompt, completion, 0, len(tokens))
        if self._echo:
            self._logprobs.pop(index, None)  # counts places from the prompt on
            of_prompt = self._of_prompt(index, prompt)
            logprobs = self._of_tokens(index, prompt, completion, 0, len(tokens))
            if of_prompt is not None and logprobs is not None:
                logprobs = {name: of_prompt[name] + logprobs[name] for name in of_prompt}
            text, tokens = self._prompt_text(prompt) + text, [*self.prompts[prompt].token_ids, *tokens]
        reason = self._reason(completion.finish_reason)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **self._tokens(tokens)}

    def count(self, completion: CompletionOutput) -> int:
        return 0 if self._only_prompt else super().count(completion)

    def _reason(self, reason: str | None) -> str | None:
        return "length" if reason is not None and self._only_prompt else reason

    def _prompt_text(self, prompt: int) -> str:
        found = self.prompts[prompt]
        return self.tokenizer.decode(found.token_ids) if found.text is None else found.text

    def _writer(self, index: int, prompt: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            begin = 0 if self._echo else len(self._prompt_text(prompt))
            self._logprobs[index] = CompletionLogprobs(self.tokenizer, self._top or 0, begin)
        return self._logprobs[index]

    def _of_prompt(self, index: int, prompt: int) -> Json | None:
        scored = self.outputs[prompt].prompt_logprobs
        if self._top is None or scored is None:
            return None
        return self._writer(index, prompt).add(self.prompts[prompt].token_ids, scored)

    def _of_tokens(self, index: int, prompt: int, completion: CompletionOutput, first: int, end: int) -> Json | None:
        if self._top is None or completion.logprobs is None:
            return None
        return self._writer(index, prompt).add(completion.token_ids[first:end], completion.logprobs[first:end])


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, *rest: Any, **named: Any):
        super().__init__(request, *rest, **named)
        self._top = (request.top_logprobs or 0) if request.logprobs else None
        self._begun: set[int] = set()
        self._use = tool_use(request, self.tokenizer)
        self._parsers: dict[int, CallParser] = {}

    def events_of(self, index: int, piece: Piece, completion: CompletionOutput, first: int) -> Iterator[Json]:
        chunk = piece.chunk
        if index not in self._begun:
            self._begun.add(index)
            yield self._delta(index, {"role": "assistant", "content": ""})
        deltas: list[Json] = [{"content": chunk.text}]
        reason = chunk.finish_reason
        if self._use is not None:
            parser = self._parsers.setdefault(index, self._use.parser(self.tokenizer))
            deltas = [_delta_of(part) for part in parser.feed(chunk.text)]
            if reason is not None:
                deltas += [_delta_of(part) for part in parser.finish()]
                reason = _reason(reason, parser)
            deltas = deltas or [{"content": ""}]
        if chunk.text or chunk.token_ids:
            # What belongs to the tokens comes once, with the first delta of their text.
            logprobs = self._of_tokens(completion, first, first + len(chunk.token_ids))
            yield {**self._delta(index, deltas.pop(0), logprobs), **self._tokens(chunk.token_ids)}
        for delta in deltas:
            if any(delta.values()):
                yield self._delta(index, delta)
        if reason is not None:
            yield {**self._delta(index, {}), "finish_reason": reason}

    def choice(self, index: int, prompt: int, completion: CompletionOutput) -> Json:
        message: Json = {"role": "assistant", "content": completion.text, "refusal": None}
        reason = completion.finish_reason
        if self._use is not None:
            parser = self._use.parser(self.tokenizer)
            parts = [*parser.feed(completion.text), *parser.finish()]
            text = "".join(part for part in parts if isinstance(part, str))
            reason = _reason(reason, parser)
            message["content"] = text or (None if parser.num_calls else "")
            if parser.num_calls:
                message["tool_calls"] = _calls_of(parts)
        return {
            "index": index,
            "message": message,
            "logprobs": self._of_tokens(completion, 0, len(completion.token_ids)),
            "finish_reason": reason,
            **self._tokens(completion.token_ids),
        }

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _of_tokens(self, completion: CompletionOutput, first: int, end: int) -> Json | None:
        if self._top is None or completion.logprobs is None:
            return None
        return chat_logprobs(self.tokenizer, completion.token_ids[first:end], completion.logprobs[first:end], self._top)


def _reason(reason: str | None, parser: CallParser) -> str | None:
    return "tool_calls" if reason == "stop" and parser.num_calls else reason


def _delta_of(part: str | CallPart) -> Json:
    if isinstance(part, str):
        return {"content": part}
    call: Json = {"index": part.index, "function": {"arguments": part.arguments}}
    if part.id is not None:
        call = {
            "index": part.index, "id": part.id, "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }  # fmt: skip
    return {"tool_calls": [call]}


def _calls_of(parts: Sequence[str | CallPart]) -> list[Json]:
    calls: list[Json] = []
    for part in parts:
        if isinstance(part, str):
            continue
        if part.id is not None:
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        calls[part.index]["function"]["arguments"] += part.arguments
    return calls
