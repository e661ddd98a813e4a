"""Answers of `/v1/responses`: one text message, whole or as the typed events of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.request import RequestOutput, SamplingParams
from ryzanstein_jax.server.encode import Prompt
from ryzanstein_jax.server.generation import Piece
from ryzanstein_jax.server.problems import ApiError
from ryzanstein_jax.server.responses_schema import ResponseRequest

Json = dict[str, Any]


class ResponseAnswer:
    """Fed with all pieces of a request, whether it is streamed or not; has what `Answer` has.

    Args:
        request: what was asked.
        prompts: the one conversation, as tokens.
        params: how it is continued.
        model: what clients call it.
    """

    def __init__(
        self,
        request: ResponseRequest,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        *,
        params: SamplingParams,
        model: str,
        fingerprint: str,
    ):
        (self._prompt,) = prompts
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._head: Json = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": model,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": request.user,
        }
        self._output: RequestOutput | None = None
        self._num_events = 0
        self.finish_reasons: list[str] = []

    # --- a stream

    def first(self) -> Iterator[Json]:
        """What a stream begins with, before there is a token."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", []))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=self._part(""))

    def take(self, piece: Piece) -> Iterator[Json]:
        """Events for one piece."""
        self.note(piece)
        if piece.chunk.text:
            yield self._event("response.output_text.delta", **self._place, delta=piece.chunk.text, logprobs=[])

    def last(self) -> Iterator[Json]:
        """What a stream ends with."""
        whole = self.whole()
        (item,) = whole["output"]
        text = item["content"][0]["text"]
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, error: ApiError) -> Json:
        """The last event of a stream that went wrong."""
        response = self._response("failed", [])
        code = error.code if error.code == "rate_limit_exceeded" else "server_error"
        response["error"] = {"code": code, "message": error.body()["error"]["message"]}
        return self._event("response.failed", response=response)

    # --- either

    def note(self, piece: Piece) -> None:
        """Takes one piece."""
        self._output = piece.chunk.output
        if piece.chunk.finish_reason is not None:
            self.finish_reasons.append(piece.chunk.finish_reason)

    def whole(self) -> Json:
        """The response at its end."""
        assert self._output is not None
        (completion,) = self._output.outputs
        status = "incomplete" if completion.finish_reason == "length" else "completed"
        response = self._response(status, [self._item(status, [self._part(completion.text)])])
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        used = self.usage()
        response["usage"] = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {**used["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        return response

    def usage(self) -> Json:
        """Tokens in and out, in the words of the other endpoints."""
        prompt = len(self._prompt.token_ids)
        generated = 0 if self._output is None else len(self._output.outputs[0].token_ids)
        cached = 0 if self._output is None else self._output.num_cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @property
    def id(self) -> str:
        return str(self._head["id"])

    @property
    def _place(self) -> Json:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Json:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _response(self, status: str, output: list[Json]) -> Json:
        return {**self._head, "status": status, "output": output, "usage": None}

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
