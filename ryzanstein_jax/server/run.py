"""Runs the server: binds, answers while the model loads, serves, drains on the first SIGTERM, stops on the second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.server.app import make_app
from ryzanstein_jax.server.backend import Backend
from ryzanstein_jax.server.logs import log, set_up_logs
from ryzanstein_jax.server.service import Service
from ryzanstein_jax.server.settings import ServerConfig
from ryzanstein_jax.server.tracing import Tracing, open_tracing

#: How long connections may take to close once no request is left.
_CLOSE_SECONDS = 3
#: Connections at a time; one more gets 503 at once.
_MOST_CONNECTIONS = 8192


class _Server(uvicorn.Server):
    """uvicorn, but for signals: its own answer to the first would be to stop listening."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()


class Runner:
    """One server from its start to its end.

    Args:
        load: makes the engine; called in a thread of its own, so that health checks are answered meanwhile.
        model: what clients call it.
        config: the server's settings.
        version: of this package.
        tracing: makes spans of requests; closed at the end.
    """

    def __init__(
        self,
        load: Callable[[], Backend],
        model: str,
        config: ServerConfig,
        version: str,
        tracing: Tracing | None = None,
    ):
        self._load, self._model, self._config, self._version = load, model, config, version
        self._tracing = tracing
        self._signals = 0
        self._ending: asyncio.Task[None] | None = None
        self.loading: threading.Thread | None = None

    async def run(self, listener: socket.socket) -> None:
        """Serves until told to end.

        Raises:
            Exception: what loading the model met.
        """
        self._loop = asyncio.get_running_loop()
        self._service = Service(self._config, self._model, self._version, self._tracing)
        self._server = _Server(uvicorn_config(make_app(self._service), self._config), self._signalled)
        host, port = listener.getsockname()[:2]
        log("listening", host=host, port=port, pid=os.getpid())
        loading = asyncio.create_task(self._start())
        try:
            await self._server.serve(sockets=[listener])
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await self._service.close()
        if self._service.health.failure is not None:
            raise self._service.health.failure

    async def _start(self) -> None:
        loaded: asyncio.Future[Backend] = self._loop.create_future()

        def tell(settle: Callable[[], None]) -> None:
            def once() -> None:
                if not loaded.done():
                    settle()

            with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
                self._loop.call_soon_threadsafe(once)

        def work() -> None:
            try:
                backend = self._load()
            except Exception as error:  # noqa: BLE001 - ends the server, with its message
                failure = error
                tell(lambda: loaded.set_exception(failure))
            else:
                tell(lambda: loaded.set_result(backend))

        # A daemon: nothing can end it, and the server must be able to end without it.
        self.loading = threading.Thread(target=work, name="load", daemon=True)
        self.loading.start()
        try:
            self._service.open(await loaded)
            log("ready", model=self._model)
        except Exception as error:  # noqa: BLE001 - as above
            self._service.health.failure = error
            self._server.should_exit = True

    def _signalled(self) -> None:
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        """The first signal drains, the second ends at once what is left."""
        self._signals += 1
        if self._signals == 1:
            log("draining", seconds=self._config.drain_seconds, requests=self._service.admission.num_requests)
            self._ending = asyncio.create_task(self._drain())
        else:
            log("stopping")
            self._service.end_all()
            self._server.should_exit = True

    async def _drain(self) -> None:
        drained = await self._service.drain(self._config.drain_seconds)
        log("drained" if drained else "requests were ended")
        self._server.should_exit = True


def uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http="h11",  # the one of uvicorn's parsers that bounds headers
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        h11_max_incomplete_event_size=4 * config.max_header_bytes,
    )


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address can't be bound.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("host", config.host, f"it can't be used: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: one whose client takes nothing for so long is dropped by the kernel.
        milliseconds = int(config.write_seconds * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(milliseconds, (1 << 31) - 1))
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError("port", config.port, f"it can't be used: {error}") from error
    return listener


def serve(load: Callable[[], Backend], model: str, config: ServerConfig, version: str) -> None:
    """Binds, loads and serves; returns when it was told to end.

    Raises:
        ConfigError: the address can't be bound, or traces can't be sent as they should be.
        Exception: what loading the model met.
    """
    set_up_logs()
    tracing = open_tracing(config.otlp_endpoint, version)
    # Each connection takes a descriptor, and the usual limit of 1024 is one of an age before event loops.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 2 * _MOST_CONNECTIONS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    listener = bind(config)
    runner = Runner(load, model, config, version, tracing)
    asyncio.run(runner.run(listener))
    if runner.loading is not None and runner.loading.is_alive():
        # It was told to end while the model loads, which nothing interrupts; workers die with this process.
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)
