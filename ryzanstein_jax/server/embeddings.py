"""`POST /v1/embeddings`: what a request may hold, and its answer."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, WithJsonSchema

from ryzanstein_jax.errors import EngineClosedError
from ryzanstein_jax.request import RequestOutput
from ryzanstein_jax.server.encode import Prompt
from ryzanstein_jax.server.generation import Piece
from ryzanstein_jax.server.schema import PROMPT_SCHEMA, Asked, as_prompts

#: Inputs of one request, as many as OpenAI takes.
MAX_INPUTS = 2048


class EmbeddingRequest(Asked):
    """`POST /v1/embeddings`."""

    input: Annotated[
        list[Any], Field(max_length=MAX_INPUTS), BeforeValidator(as_prompts), WithJsonSchema(PROMPT_SCHEMA)
    ]
    dimensions: Annotated[int, Field(ge=1, lt=1 << 20)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


class EmbeddingAnswer:
    """Fed with all pieces of a request.

    Args:
        request: what was asked.
        prompts: its inputs.
        model: what clients call it.
    """

    def __init__(self, request: EmbeddingRequest, prompts: Sequence[Prompt], *, model: str):
        self._as_text = request.encoding_format == "base64"
        self._prompts, self._model = prompts, model
        self._outputs: dict[int, RequestOutput] = {}

    def note(self, piece: Piece) -> None:
        self._outputs[piece.prompt] = piece.chunk.output

    def usage(self) -> dict[str, int]:
        """Tokens of all inputs."""
        count = sum(len(prompt.token_ids) for prompt in self._prompts)
        return {"prompt_tokens": count, "total_tokens": count}

    def body(self) -> bytes:
        """The answer as JSON. Takes its time where there are many vectors: not for the event loop."""
        found = [
            {"object": "embedding", "index": index, "embedding": self._vector(self._outputs[index])}
            for index in range(len(self._prompts))
        ]
        answer = {"object": "list", "data": found, "model": self._model, "usage": self.usage()}
        return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()

    def _vector(self, output: RequestOutput) -> list[float] | str:
        if output.embedding is None:
            raise EngineClosedError("the engine ended the request without an embedding")
        if self._as_text:
            return base64.b64encode(np.ascontiguousarray(output.embedding, "<f4").tobytes()).decode()
        return [float(value) for value in output.embedding]
