"""Streams: what a growing output adds, chunk by chunk. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass

from ryzanstein_jax.request import RequestOutput


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What a stream adds.

    Attributes:
        index: which of the n completions.
        text: new text.
        token_ids: new tokens.
        finish_reason: set in the completion's last chunk.
        output: the whole request so far; it goes on growing until the stream ends.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    output: RequestOutput


class StreamCursor:
    """Turns a request's growing output into chunks."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, int, bool]] = {}

    def advance(self, output: RequestOutput) -> list[StreamChunk]:
        """What is new since the last call."""
        chunks = []
        for completion in output.outputs:
            characters, tokens, ended = self._sent.get(completion.index, (0, 0, False))
            text, token_ids = completion.text[characters:], completion.token_ids[tokens:]
            if ended or not (text or token_ids or completion.finished):
                continue
            chunks.append(StreamChunk(completion.index, text, token_ids, completion.finish_reason, output))
            self._sent[completion.index] = (len(completion.text), len(completion.token_ids), completion.finished)
        return chunks
