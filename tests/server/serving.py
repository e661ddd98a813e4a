"""Serves an engine on a free port, from a thread, with the application and HTTP server that `ryzanstein serve` has."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import openai
import uvicorn
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from ryzanstein_jax.budget import MemoryPlan
from ryzanstein_jax.engine.report import RankUsage, SchedulerStats, SetupReport
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.request import CompletionOutput, PoolingParams, RequestOutput, RequestTimings, SamplingParams
from ryzanstein_jax.server.app import make_app
from ryzanstein_jax.server.run import bind, uvicorn_config
from ryzanstein_jax.server.service import Service
from ryzanstein_jax.server.settings import ServerConfig
from ryzanstein_jax.server.tracing import Tracing
from ryzanstein_jax.streams import StreamChunk, StreamCursor

MODEL = "tiny"


class FakeBackend:
    """Counts up token ids, as far as its gate is open; `act` is called before each token and may wait or raise."""

    def __init__(self, tokenizer: Tokenizer, max_length: int = 128):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.metrics, self.orchestrator, self.is_alive = Metrics(), None, True
        self.active = self.num_steps = self.num_streams = 0
        self.priorities: list[int] = []
        self.ends = "length"  # how completions do
        self.act: Callable[[int], Any] | None = None

    @property
    def replicas(self) -> "list[FakeBackend]":
        return [self]

    def stats(self) -> SchedulerStats:
        return SchedulerStats(self.active, 0, 100, self.active, 0, self.num_steps, 0, 0, 0)

    def usage(self) -> list[RankUsage]:
        return [RankUsage(rank, 100 + rank, 10 * rank) for rank in range(2)]

    def cpu_seconds(self) -> float:
        return 1.5

    @property
    def report(self) -> SetupReport:
        return SetupReport("2 x fake (none)", "float32", MemoryPlan(*range(90, 98)), {}, 0.0, 0.0, 0, 0)

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.5)

    def get_pooling_params(self, dimensions: int | None = None) -> PoolingParams:
        return PoolingParams(dimensions=dimensions)

    def close(self) -> None:
        self.is_alive = False

    async def stream(
        self, prompt: Sequence[int], sampling_params: SamplingParams | PoolingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[StreamChunk]:
        params = sampling_params or SamplingParams()
        self.active += 1
        self.num_streams += 1
        self.priorities.append(priority)
        outputs = [CompletionOutput(index) for index in range(params.n)]
        output = RequestOutput(str(self.num_streams), None, list(prompt), outputs, RequestTimings(time.monotonic()))
        cursor = StreamCursor()
        output.timings.first_scheduled = time.monotonic()
        try:
            if isinstance(params, PoolingParams):
                if self.act is not None:
                    await self.act(0)
                output.embedding, outputs[0].finish_reason = np.array([0.6, 0.8], np.float32), "stop"
                yield cursor.advance(output)[0]
                return
            for step in range(params.max_tokens or self.max_length - len(prompt)):
                if self.act is not None:
                    await self.act(step)
                else:
                    await asyncio.sleep(0)
                self.num_steps += 1
                for one in outputs:
                    one.token_ids.append(4 + (33 + step) % 90)
                    one.text = self.tokenizer.decode(one.token_ids)
                    if step + 1 == params.max_tokens:
                        one.finish_reason = self.ends
                for chunk in cursor.advance(output):
                    yield chunk
        finally:
            self.active -= 1


class Served:
    """A server that runs.

    Attributes:
        service: its state; touched from the event loop's thread only, but for counters.
    """

    def __init__(self, service: Service, port: int, key: str | None):
        self.service, self.port, self.key = service, port, key
        self.url = f"http://127.0.0.1:{port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body; JSON where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            sent = {} if raw is None else {"Content-Type": "application/json"}
            if self.key is not None:
                sent["Authorization"] = f"Bearer {self.key}"
            connection.request(method, path, raw, {**sent, **(headers or {})})
            response = connection.getresponse()
            data, found = response.read(), {name.lower(): value for name, value in response.getheaders()}
            if found.get("content-type", "").startswith("application/json"):
                return response.status, found, json.loads(data)
            return response.status, found, data.decode()

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, str], Any]:
        return self.request("POST", path, {"model": MODEL, **body})

    def complete(self, prompt: Any = "Hello", **more: Any) -> tuple[int, dict[str, str], Any]:
        return self.post("/v1/completions", prompt=prompt, **more)

    def chat(self, content: Any = "Hello", **more: Any) -> tuple[int, dict[str, str], Any]:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **more)

    def open(self, path: str, **body: Any) -> socket.socket:
        """Sends a request and leaves the answer to the caller."""
        raw = json.dumps({"model": MODEL, **body}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return connection

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, **settings)

    def metric(self, line: str) -> float:
        """A value of `/metrics`, by its name and labels."""
        status, _, text = self.request("GET", "/metrics")
        assert status == 200
        found = [row.rpartition(" ")[2] for row in text.splitlines() if row.rpartition(" ")[0] == line]
        assert found, f"no metric {line}"
        return float(found[0])

    def call(self, coroutine: Any) -> Any:
        """Runs a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """Takes traces as a collector does: its base URL, and the spans that came."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *rest: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()


def events(text: str) -> list[Any]:
    """The events of a stream: each framed as it has to be, and the last is [DONE]."""
    assert text.endswith("\n\n")
    lines = [part for part in text[:-2].split("\n\n") if part != ": keep-alive"]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines), text
    assert lines[-1] == "data: [DONE]", text
    return [json.loads(line[6:]) for line in lines[:-1]]


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@contextmanager
def serving(backend: Any, *, start: bool = True, tracing: Tracing | None = None, **settings: Any) -> Iterator[Served]:
    """A server in front of an engine, which it leaves open; `start=False` leaves it without its engine."""
    config = ServerConfig(**{"port": 0, **settings})
    listener = bind(config)
    ready: threading.Event = threading.Event()
    made: list[Any] = []

    async def main() -> None:
        service = Service(config, MODEL, "1.2.3", tracing)
        server = uvicorn.Server(uvicorn_config(make_app(service), config))
        made.extend((service, server, asyncio.get_running_loop()))
        if start:
            service.open(backend)
        ready.set()
        await server.serve(sockets=[listener])
        service.health.backend = None  # it goes on to serve other tests
        await service.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="server")
    thread.start()
    assert ready.wait(30)
    served = Served(made[0], listener.getsockname()[1], config.api_keys[0] if config.api_keys else None)
    served.server, served.loop = made[1], made[2]
    try:
        yield served
    finally:
        made[1].should_exit = True
        thread.join(30)
        assert not thread.is_alive()
