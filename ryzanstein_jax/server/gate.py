"""What every request passes first: headers within bounds, a known host, a key; and what is written about it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ryzanstein_jax.server.http import NOTES, ClientGoneError, error_response, note
from ryzanstein_jax.server.instruments import Instruments
from ryzanstein_jax.server.logs import log
from ryzanstein_jax.server.page import FILES
from ryzanstein_jax.server.problems import ApiError
from ryzanstein_jax.server.settings import ServerConfig
from ryzanstein_jax.server.tracing import Tracing

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")
#: Open without a key: whoever restarts the server must be able to ask whether it lives, and a browser opens a page
#: before anybody can tell it a key.
_OPEN_PATHS = frozenset({"/health", *FILES})
#: Asked every few seconds; what changes is logged elsewhere.
_QUIET = frozenset({"/health", "/ready", "/metrics", "/status"})
_GONE = 499  # of logs and metrics only; nobody is there to get it

Headers = Sequence[tuple[bytes, bytes]]


def is_known_key(given: bytes, digests: Sequence[bytes]) -> bool:
    """Compares with every key, in a time that tells nothing about any."""
    digest = hashlib.sha256(given).digest()
    found = False
    for known in digests:
        found |= hmac.compare_digest(digest, known)
    return found


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        instruments: Instruments,
        routes: frozenset[str],
        tracing: Tracing | None = None,
    ):
        self._app, self._config, self._instruments, self._routes = app, config, instruments, routes
        self._tracing = tracing
        self._digests = [hashlib.sha256(key.encode()).digest() for key in config.api_keys]
        self._hosts = config.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no WebSocket: the server closes it
        headers: Headers = scope["headers"]
        request_id = _request_id(headers)
        started, status, trace = time.monotonic(), 0, None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            problem = self._problem(scope, headers)
            if problem is not None:
                await error_response(problem, scope)(scope, receive, send_marked)
            else:
                if self._tracing is not None:
                    trace = self._tracing.begin(scope, request_id, started)
                await self._app(scope, receive, send_marked)
        except ClientGoneError:
            status = _GONE
            self._instruments.disconnects.inc()
        except Exception as error:  # noqa: BLE001 - a defect of ours: the client learns no more than that
            log("unexpected error", level=logging.ERROR, exception=error, request_id=request_id)
            if not status:
                await error_response(error, scope)(scope, receive, send_marked)
        finally:
            if trace is not None:
                note(scope, trace_id=trace.trace_id)
                trace.end(status or _GONE, scope[NOTES])
            self._report(scope, request_id, status or _GONE, time.monotonic() - started)

    def _problem(self, scope: Scope, headers: Headers) -> ApiError | None:
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("raw_path") or b"")
        size += len(scope.get("query_string") or b"")
        if size > self._config.max_header_bytes:
            message = f"The headers are too large: send at most {self._config.max_header_bytes} bytes."
            return ApiError(431, message, code="headers_too_large")
        if not self._is_known_host([value for name, value in headers if name == b"host"]):
            return ApiError(421, "This server does not answer for that host.", code="unknown_host")
        if self._digests and scope["path"] not in _OPEN_PATHS:
            return self._key_problem([value for name, value in headers if name == b"authorization"])
        return None

    def _is_known_host(self, given: Sequence[bytes]) -> bool:
        """A page of another site may name this machine by a name of its own (DNS rebinding); its Host says so."""
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            return False
        return self._hosts is None or match[1].decode("ascii").strip("[]").lower() in self._hosts

    def _key_problem(self, given: Sequence[bytes]) -> ApiError | None:
        challenge = {"WWW-Authenticate": "Bearer"}
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not key:
            message = "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
            return ApiError(401, message, headers=challenge)
        if not is_known_key(key.strip(), self._digests):
            return ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=challenge)
        return None

    def _report(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self._routes else "/v1/models/{id}" if path.startswith("/v1/models/") else "unknown"
        notes = scope.get(NOTES, {})
        self._instruments.responses.labels(route, str(status)).inc()
        if "error" in notes:
            self._instruments.refused.labels(notes["error"]).inc()
        quiet = route in _QUIET
        log(
            "request",
            level=logging.DEBUG if quiet else logging.INFO,
            request_id=request_id,
            method=scope["method"] if scope["method"] in ("GET", "POST") else "other",
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **notes,
        )


def _request_id(headers: Headers) -> str:
    """The client's, where it is short and plain enough for logs and headers; else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return uuid.uuid4().hex
