"""What HTTP needs: bodies within bounds, clients that leave, event streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ryzanstein_jax.server.problems import ApiError, as_api_error
from ryzanstein_jax.server.settings import ServerConfig

Result = TypeVar("Result")
#: Where handlers leave what the log line of their request shall hold.
NOTES = "ryzanstein.notes"
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client left, or does not read: there is nobody to answer."""


def note(scope: Scope, **fields: object) -> None:
    """Adds to the log line of this request."""
    scope.setdefault(NOTES, {}).update(fields)


def error_response(error: BaseException, scope: Scope) -> JSONResponse:
    """The answer to an error; its code is noted for log and metrics."""
    answer = as_api_error(error)
    note(scope, error=answer.code or answer.kind)
    return JSONResponse(answer.body(), answer.status, answer.headers)


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The body of a request that sends JSON.

    Raises:
        ApiError: it is of another type, too large, or too slow.
        ClientGoneError: the client left while it sent.
    """
    # A page of another site can make a browser send forms to this machine, but not JSON.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send the body as JSON, with the header 'Content-Type: application/json'.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Send the body without a content encoding.")
    too_large = ApiError(413, f"The body is too large: send at most {config.max_body_bytes} bytes.", code="too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > config.max_body_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {config.body_seconds:g} s.", code="timeout") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs the work as long as the client is there. The body must have been read.

    Starlette ends no handler whose client has left, so this does.

    Raises:
        ClientGoneError: the client left; the work was cancelled and has ended.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def data(event: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def typed_data(event: dict[str, Any]) -> bytes:
    """One event of a stream whose events have types, which stand before them too."""
    return b"event: " + event["type"].encode() + b"\n" + data(event)


class EventStream:
    """A response of server-sent events.

    Args:
        events: opens the source: an async iterator of events, ready to be sent; None where it was silent for
            `keep_alive_seconds`. What goes wrong before the first event is answered with a status of its own.
        silent: called for each comment that is sent instead of an event.
        end: what follows the last event.
    """

    def __init__(
        self,
        events: Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes | None]]],
        config: ServerConfig,
        silent: Callable[[], None],
        end: bytes = DONE,
    ):
        self._events, self._config, self._silent, self._end = events, config, silent, end
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._events() as events:
                async for event in events:
                    if event is None:
                        self._silent()
                    await self._send(send, KEEP_ALIVE if event is None else event)
            if self._end:
                await self._send(send, self._end)
        except ClientGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - the client learns of it, whatever it is
            if not self._started:
                await error_response(error, scope)(scope, receive, send)
                return
            answer = as_api_error(error)
            note(scope, error=answer.code or answer.kind)
            await self._send(send, data(answer.body()))
        await self._timed(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _send(self, send: Send, body: bytes) -> None:
        if not self._started:
            self._started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await self._timed(send({"type": "http.response.start", "status": 200, "headers": headers}))
        await self._timed(send({"type": "http.response.body", "body": body, "more_body": True}))

    async def _timed(self, sending: Any) -> None:
        """A client that reads nothing holds its pages no longer than this."""
        try:
            async with asyncio.timeout(self._config.write_seconds):
                await sending
        except (TimeoutError, OSError):
            raise ClientGoneError from None


@contextlib.asynccontextmanager
async def closing(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Closes an async generator at the end of the block, and not whenever it is collected."""
    try:
        yield events
    finally:
        await events.aclose()  # type: ignore[attr-defined]
