"""OpenTelemetry traces, with the extra `otel`: a span for each stage of a request that generates.

Times are noted on a request's way and become spans at its end, so that a request costs nothing where nobody asked for
traces, and next to nothing where somebody did. What a client wrote is in no span. Spans and attributes follow
OpenTelemetry's conventions for HTTP servers and for generative AI: under the span of the HTTP request are `receive`,
the inference and `respond`; under the inference are `tokenize`, `compile_grammar`, `queue`, `prefill`, `decode`, and a
`recovery` for each time that lost devices kept it waiting.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import Scope

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.request import PoolingParams, RequestTimings, SamplingParams
from ryzanstein_jax.server.logs import log

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

#: Routes whose requests are traced, and what the conventions call their operations.
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PATH = "/v1/traces"
#: How long the server's end waits for the last spans to be sent.
_CLOSE_SECONDS = 2.0
#: What of a request's log line is an attribute of its inference too.
_NOTED = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "response_id": "gen_ai.response.id",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "stream": "gen_ai.request.stream",
}

_current: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)


def current_trace() -> RequestTrace | None:
    """Of the request that this task works for; None where it isn't traced."""
    return _current.get()


def mark(stage: str) -> None:
    """The request that this task works for begins its next stage."""
    trace = _current.get()
    if trace is not None:
        trace.mark(stage)


@contextmanager
def inference(model: str, params: SamplingParams | PoolingParams) -> Iterator[None]:
    """From when a request was let in until the engine has done its part."""
    trace = _current.get()
    if trace is not None:
        trace.describe(model, params)
        trace.mark("tokenize")
    try:
        yield
    finally:
        if trace is not None:
            trace.mark("respond")


class Tracing:
    """Makes spans and hands them to a processor, which never makes a request wait.

    Args:
        processor: of OpenTelemetry's SDK; it is shut down with this.
        version: of this package.
        environment: may name the service; else it is "ryzanstein".
    """

    def __init__(self, processor: SpanProcessor, version: str, environment: Mapping[str, str] = os.environ):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = {"service.version": version}
        if "OTEL_SERVICE_NAME" not in environment and "service.name=" not in environment.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            service["service.name"] = "ryzanstein"
        # Not the process's own provider, and not shut down at exit: that would wait for the collector.
        self._provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("ryzanstein_jax", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope, request_id: str, started: float) -> RequestTrace | None:
        """Traces a request from here on, in this task and those that it starts.

        Args:
            started: on the monotonic clock.

        Returns:
            Its trace; None where its route has none, or the sampler leaves it out.
        """
        from opentelemetry.trace import SpanKind

        operation = OPERATIONS.get(scope["path"])
        if operation is None or scope["method"] != "POST":
            return None
        offset = time.time_ns() - time.monotonic_ns()
        attributes = {
            "http.request.method": "POST",
            "http.route": scope["path"],
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
            "ryzanstein.request_id": request_id,
        }
        span = self._tracer.start_span(
            f"POST {scope['path']}",
            self._propagator.extract(_context_headers(scope["headers"])),
            SpanKind.SERVER,
            attributes,
            start_time=int(started * 1e9) + offset,
        )
        if not span.is_recording():
            return None
        trace = RequestTrace(self, span, operation, started, offset)
        _current.set(trace)
        return trace

    def child(self, parent: Span, name: str, begin: int, attributes: Mapping[str, Any] | None = None) -> Span:
        """A span under another; the time is in nanoseconds since 1970."""
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, set_span_in_context(parent), attributes=attributes, start_time=begin)

    async def close(self) -> None:
        """Sends what is left, for a moment: a collector that doesn't answer holds nothing up."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def work() -> None:
            self._provider.shutdown()
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:
                pass  # it was not waited for

        threading.Thread(target=work, name="traces", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), _CLOSE_SECONDS)
        except TimeoutError:
            log("spans were lost: the collector does not answer", level=logging.WARNING)


class RequestTrace:
    """One request on its way: when it came from stage to stage. Only its own event loop calls this.

    Args:
        span: of the HTTP request.
        operation: in the words of the conventions.
        started: on the monotonic clock.
        offset: nanoseconds from that clock to the time since 1970.
    """

    def __init__(self, tracing: Tracing, span: Span, operation: str, started: float, offset: int):
        self._tracing, self._span, self._operation, self._offset = tracing, span, operation, offset
        self._marks = [("receive", started)]
        self._timings: dict[int, RequestTimings] = {}
        self._attributes: dict[str, Any] = {}
        self._model = ""

    @property
    def trace_id(self) -> str:
        """As it is written in headers."""
        return format(self._span.get_span_context().trace_id, "032x")

    def mark(self, stage: str, at: float | None = None) -> None:
        """A stage begins, and the one before it ends; `at` is on the monotonic clock, now unless given."""
        # A stage never begins before the one that it follows, whoever took the times.
        self._marks.append((stage, max(self._marks[-1][1], time.monotonic() if at is None else at)))

    def describe(self, model: str, params: SamplingParams | PoolingParams) -> None:
        """What is asked of which model; nothing of the prompt, nor stop strings, which are a client's text too."""
        self._model = model
        asked: dict[str, Any] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "ryzanstein",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
        }
        if isinstance(params, PoolingParams):
            asked["gen_ai.embeddings.dimension.count"] = params.dimensions
        else:
            asked |= {
                "gen_ai.output.type": "text" if params.structured_outputs is None else "json",
                "gen_ai.request.choice.count": None if params.n == 1 else params.n,
                "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.seed": params.seed,
                "gen_ai.request.temperature": float(params.temperature),
                "gen_ai.request.top_p": float(params.top_p),
                "gen_ai.request.top_k": float(params.top_k) if params.top_k > 0 else None,
                "gen_ai.request.frequency_penalty": float(params.frequency_penalty) or None,
                "gen_ai.request.presence_penalty": float(params.presence_penalty) or None,
            }
        self._attributes = {name: value for name, value in asked.items() if value is not None}

    def note_output(self, prompt: int, timings: RequestTimings) -> None:
        """A prompt of the request has a token, or its embedding; the first one begins a stage."""
        if not self._timings:
            if timings.first_scheduled is not None:
                self.mark("prefill", timings.first_scheduled)
            if self._operation != "embeddings":  # which only read
                self.mark("decode")
                self._attributes["gen_ai.response.time_to_first_chunk"] = self._marks[-1][1] - self._marks[0][1]
        self._timings.setdefault(prompt, timings)

    def end(self, status: int, notes: Mapping[str, Any]) -> None:
        """The request is over: makes its spans.

        Args:
            status: of its HTTP response; 499 is a client that left.
            notes: of its log line.
        """
        try:
            self._end(status, notes)
        except Exception as error:  # noqa: BLE001 - traces are the least of what a request is for
            log("a request could not be traced", level=logging.ERROR, exception=error)

    def _end(self, status: int, notes: Mapping[str, Any]) -> None:
        from opentelemetry.trace import StatusCode

        now = time.monotonic()
        error = notes.get("error") or ("disconnected" if status == 499 else None)
        ends = [at for _, at in self._marks[1:]] + [now]
        inference: Span | None = None
        within = [number for number, (stage, _) in enumerate(self._marks) if stage not in ("receive", "respond")]
        if within:
            attributes = self._attributes | {name: notes[key] for key, name in _NOTED.items() if key in notes}
            name = f"{self._operation} {self._model}"
            inference = self._tracing.child(self._span, name, self._ns(self._marks[within[0]][1]), attributes)
            if error is not None:
                inference.set_attribute("error.type", error)
                inference.set_status(StatusCode.ERROR)
        for number, ((stage, begin), end) in enumerate(zip(self._marks, ends, strict=True)):
            parent = inference if inference is not None and number in within else self._span
            self._tracing.child(parent, stage, self._ns(begin)).end(self._ns(end))
        if inference is not None:
            for begin, end in sorted({pause for timings in self._timings.values() for pause in timings.pauses}):
                self._tracing.child(inference, "recovery", self._ns(begin)).end(self._ns(end))
            inference.end(self._ns(ends[within[-1]]))
        if status != 499:
            self._span.set_attribute("http.response.status_code", status)
        if error is not None and (status >= 500 or status < 400):
            # A client's mistake is none of the server's; an error after the head of a stream is.
            self._span.set_status(StatusCode.ERROR)
        if error is not None:
            self._span.set_attribute("error.type", error)
        self._span.end(self._ns(now))

    def _ns(self, at: float) -> int:
        return int(at * 1e9) + self._offset


def open_tracing(endpoint: str | None, version: str, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """What the settings and OpenTelemetry's own variables ask for; None where they ask for nothing.

    The variables of the SDK and of its OTLP exporter hold for the rest: headers, time limits, samplers, resource.

    Args:
        endpoint: base URL of a collector that takes OTLP over HTTP; None leaves it to the environment.

    Raises:
        ConfigError: the extra is not there, or a value can't be used.
    """
    named = [name for name in _ENDPOINTS if environment.get(name)]
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp")
    switched_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none"
    if endpoint is None and (not named or switched_off):
        return None
    field = "otlp_endpoint" if endpoint is not None else named[0]
    url = endpoint if endpoint is not None else environment[field]
    if endpoint is None and exporter != "otlp":
        raise ConfigError("OTEL_TRACES_EXPORTER", exporter, 'use "otlp" or "none"')
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(field, url, "use the URL of a collector, such as http://localhost:4318")
    for name in _PROTOCOLS:
        if environment.get(name, "http/protobuf") != "http/protobuf":
            raise ConfigError(name, environment[name], "use http/protobuf, which collectors take on port 4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        remedy = "traces need more: pip install 'ryzanstein-jax[otel]'"
        raise ConfigError(field, url, remedy if endpoint is not None else f"{remedy}, or unset {field}") from error
    if endpoint is not None:
        url = endpoint if parts.path.endswith(_PATH) else endpoint.rstrip("/") + _PATH
    try:
        sender = OTLPSpanExporter(endpoint=url if endpoint is not None else None)
        return Tracing(BatchSpanProcessor(sender), version, environment)
    except (ValueError, OSError) as error:
        raise ConfigError(field, url, f"OpenTelemetry refuses a setting: {error}") from error


def _context_headers(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Those of the trace that the client is in, as W3C has them: one parent, and a state that may come in parts."""
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:
        return {}
    state = b",".join(value for name, value in headers if name == b"tracestate")
    return {"traceparent": parents[0].decode("latin-1"), **({"tracestate": state.decode("latin-1")} if state else {})}
