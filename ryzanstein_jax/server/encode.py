"""Prompts to tokens, off the event loop and within a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.server.problems import ApiError


@dataclass(frozen=True)
class Conversation:
    """Messages for the model's chat template."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine takes it, with its text where it came as text."""

    text: str | None
    token_ids: list[int]


#: What a request may ask with: text, token ids, or a conversation.
Input = str | list[int] | Conversation


class Encoder:
    """Tokenizes in threads of its own.

    Args:
        tokenizer: the model's.
        threads: how many prompts at a time.
        seconds: most that one may take. A thread can't be ended, so one that takes longer keeps its place until it is
            done; what it works on is bounded by the size of a body and by the template sandbox.
    """

    def __init__(self, tokenizer: Tokenizer, threads: int, seconds: float):
        self.tokenizer, self._seconds = tokenizer, seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._free = asyncio.Semaphore(threads)
        #: No token is longer, so a text of so many times as many characters has more tokens than are allowed.
        self._longest = max(map(len, tokenizer.backend.get_vocab(with_added_tokens=True)), default=1)

    async def encode(
        self, inputs: Sequence[Input], most_tokens: int, *, special_tokens: bool = True, param: str = "prompt"
    ) -> list[Prompt]:
        """All prompts of a request, which came in its field `param`.

        Raises:
            RequestError: one is malformed, or took too long.
            ApiError: one is so long that it need not be tokenized to know.
        """
        for one in inputs:
            if isinstance(one, str) and len(one) > most_tokens * self._longest:
                raise too_long(most_tokens, f"{len(one)} characters", param)
        if all(isinstance(one, list) for one in inputs):
            return [Prompt(None, one) for one in inputs if isinstance(one, list)]

        def work() -> list[Prompt]:
            return [self._encode(one, special_tokens) for one in inputs]

        return await self._run(work)

    async def compile(self, work: Callable[[], None], field: str) -> None:
        """Compiles a grammar, which came in that field of the request; raises RequestError where it takes too long."""
        await self._run(work, RequestError(field, "a grammar", f"compiling it took over {self._seconds:g} s: simplify"))

    async def decode(self, token_ids: list[int]) -> str:
        """Text of tokens; raises RequestError as `encode`."""
        text: str = await self._run(lambda: self.tokenizer.decode(token_ids, skip_special_tokens=False))
        return text

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], Any], too_slow: RequestError | None = None) -> Any:
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        future = self._pool.submit(work)

        def free(_: Future[Any]) -> None:
            try:
                loop.call_soon_threadsafe(self._free.release)
            except RuntimeError:
                pass  # the loop ended meanwhile

        future.add_done_callback(free)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except TimeoutError:
            remedy = f"tokenizing it took over {self._seconds:g} s: shorten it"
            raise too_slow or RequestError("prompt", "its text", remedy) from None

    def _encode(self, one: Input, special_tokens: bool) -> Prompt:
        if isinstance(one, str):
            return Prompt(one, self.tokenizer.encode(one, add_special_tokens=special_tokens))
        if isinstance(one, list):
            return Prompt(None, one)
        text = self.tokenizer.apply_chat_template(
            one.messages,
            add_generation_prompt=one.add_generation_prompt,
            tools=one.tools,
            variables=one.variables,
        )
        return Prompt(None, self.tokenizer.encode(text, add_special_tokens=False))


def too_long(most: int, found: str, param: str, more: str = "") -> ApiError:
    """The prompt and what is asked for don't fit the model."""
    message = f"This model's maximum context length is {most} tokens. However, you requested {found}{more}."
    return ApiError(400, message, param=param, code="context_length_exceeded")
