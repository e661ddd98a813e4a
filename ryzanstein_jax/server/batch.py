"""Runs the requests of a file through the server's own application, without HTTP: its bodies, errors and limits."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message

from ryzanstein_jax.errors import ConfigError, RyzansteinError, counted
from ryzanstein_jax.server.app import make_app
from ryzanstein_jax.server.backend import Backend
from ryzanstein_jax.server.batch_index import MAX_ID, BatchIndex, Line, custom_id_of, read_lines
from ryzanstein_jax.server.batch_output import BatchOutput
from ryzanstein_jax.server.health import Status
from ryzanstein_jax.server.problems import ApiError
from ryzanstein_jax.server.schema import parse
from ryzanstein_jax.server.service import Service
from ryzanstein_jax.server.settings import ServerConfig

#: Room in a line for all but the body.
_ENVELOPE = 4096
#: How long the engine is left alone when it takes no requests for the moment.
_PAUSE_SECONDS = 0.5


class BatchLine(BaseModel):
    """One line of the input, as OpenAI's batch format has it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_ID)]
    method: Literal["POST"]
    url: Annotated[str, Field(pattern=r"^/v1/[A-Za-z0-9/_.-]{1,200}$")]
    body: dict[str, Any]


@dataclass
class Counts:
    """How far a batch is.

    Attributes:
        lines: of the input, without blank ones.
        before: answered by earlier runs.
        answered: by this one.
        errors: lines in the output, of all runs, whose answer is an error.
        prompt_tokens, completion_tokens: of this run.
        seconds: that it took, once it has ended.
    """

    lines: int
    before: int
    answered: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.completion_tokens / self.seconds if self.seconds > 0 else 0.0
        return (
            f"{counted(self.lines, 'line')}: {self.answered} answered in {self.seconds:.1f} s, {self.before} before; "
            f"{self.errors} of all with an error. {self.prompt_tokens} tokens in, {self.completion_tokens} out, "
            f"{rate:.1f} tokens/s"
        )


def batch_config(in_flight: int, served_model_name: str | None = None) -> ServerConfig:
    """The server's limits for a batch: requests wait as long as they have to, and none is turned away."""
    config = ServerConfig(served_model_name=served_model_name, request_seconds=1e6)
    return ServerConfig(
        served_model_name=served_model_name,
        request_seconds=config.request_seconds,
        max_sequences=in_flight * config.max_choices,
    )


class Batch:
    """One batch, opened and checked before any model is loaded.

    Args:
        source: the input.
        output: where answers go; what it holds already is not asked again.
        in_flight: lines that are worked on at a time.
        config: the server's settings.

    Raises:
        ConfigError: either file is unusable; see `BatchIndex` and `BatchOutput`.
    """

    def __init__(self, source: Path, output: Path, in_flight: int, config: ServerConfig):
        if not 1 <= in_flight <= 4096:
            raise ConfigError("in_flight", in_flight, "use a whole number from 1 to 4096")
        self._source, self._in_flight, self._config = source, in_flight, config
        self._most = config.max_body_bytes + _ENVELOPE
        self._index = BatchIndex(source, self._most)
        self._output = BatchOutput(output, self._index, source)
        self.counts = Counts(len(self._index), self._index.num_done, errors=self._output.num_errors)

    @property
    def is_done(self) -> bool:
        """Whether every line is answered."""
        return self.counts.before + self.counts.answered == self.counts.lines

    def close(self) -> None:
        self._output.close()

    async def run(self, backend: Backend, model: str, version: str, note: Callable[[Counts], None]) -> None:
        """Answers what is not answered yet.

        Args:
            backend: the engine; closed at the end.
            model: what the lines call it.
            version: of this package.
            note: called after each answer.

        Raises:
            RyzansteinError: the engine has failed, or the output can't be written. Every line of the output is whole.
        """
        service = Service(self._config, model, version)
        began = time.monotonic()
        try:
            service.open(backend)
            app = make_app(service)
            with self._source.open("rb") as file:
                lines = self._waiting(read_lines(file, self._most))
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._in_flight):
                        group.create_task(self._work(lines, app, service, note))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            self.counts.seconds = time.monotonic() - began
            await service.close()

    def _waiting(self, lines: Iterator[Line]) -> Iterator[Line]:
        return (line for line in lines if not self._index.is_done(custom_id_of(line.raw), line.number))

    async def _work(
        self, lines: Iterator[Line], app: ASGIApp, service: Service, note: Callable[[Counts], None]
    ) -> None:
        for line in lines:
            answer = await self._answer(line, app, service)
            self._output.write(answer)
            self._count(answer)
            note(self.counts)

    async def _answer(self, line: Line, app: ASGIApp, service: Service) -> dict[str, Any]:
        head = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id_of(line.raw)}
        try:
            asked = self._parse(line)
            while True:
                status, request_id, body = await call(app, asked.url, asked.body)
                # What befalls the engine as a whole is no answer to a line.
                if status >= 500 and service.health.status is Status.FAILED:
                    raise RyzansteinError("the engine has failed; what is answered is kept: the same command goes on")
                if status != 503:
                    break
                await asyncio.sleep(_PAUSE_SECONDS)
        except ApiError as error:
            detail = {
                "code": error.code or error.kind,
                "message": error.body()["error"]["message"],
                "line": line.number,
            }
            return {**head, "response": None, "error": detail}
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {**head, "response": response, "error": None}

    def _parse(self, line: Line) -> BatchLine:
        if line.raw is None:
            raise ApiError(413, f"The line is longer than {self._most} bytes.", code="too_large")
        asked = parse(BatchLine, line.raw)
        if asked.body.get("stream"):
            raise ApiError(400, "A batch has no streams.", param="stream", code="unsupported_parameter")
        return asked

    def _count(self, answer: dict[str, Any]) -> None:
        counts, response = self.counts, answer["response"]
        counts.answered += 1
        counts.errors += response is None or response["status_code"] != 200
        usage = response["body"].get("usage") if response is not None else None
        if isinstance(usage, dict):
            counts.prompt_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
            counts.completion_tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    """The error of a worker; the others' are the same or follow from it."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def call(app: ASGIApp, path: str, body: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """POSTs to an application of this process.

    Returns:
        The status, the request's id, and the answer.
    """
    raw = json.dumps(body).encode()
    sent: list[Message] = []
    received = iter([{"type": "http.request", "body": raw, "more_body": False}])

    async def receive() -> Message:
        for message in received:
            return message
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
    }  # fmt: skip
    await app(scope, receive, send)
    found = dict(sent[0]["headers"])
    answer = json.loads(b"".join(message.get("body", b"") for message in sent[1:]))
    return sent[0]["status"], found[b"x-request-id"].decode(), answer
