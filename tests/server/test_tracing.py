"""Traces: what a request's spans say, and that nothing that befalls them touches the request."""

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ryzanstein_jax.errors import ConfigError, EngineClosedError
from ryzanstein_jax.server.tracing import Tracing, open_tracing
from tests.server.serving import Served, serving, wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "the words of a client"
STAGES = ["receive", "tokenize", "queue", "prefill", "decode", "respond"]


class Traced:
    """The spans of a server's requests, as they end."""

    def __init__(self, served: Served, exporter: InMemorySpanExporter):
        self.served, self._exporter = served, exporter

    def take(self) -> dict[str, ReadableSpan]:
        """Those of one request by name, the whole request last."""
        # The answer is there a moment before its request has ended.
        wait_until(lambda: any(span.kind is SpanKind.SERVER for span in self._exporter.get_finished_spans()))
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        assert len({span.name for span in spans}) == len(spans)
        assert SECRET not in " ".join(span.to_json() for span in spans)
        return {span.name: span for span in spans}


@contextmanager
def traced(backend, **settings) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    with serving(backend, tracing=Tracing(SimpleSpanProcessor(exporter), "1.2.3"), **settings) as served:
        yield Traced(served, exporter)


@pytest.fixture(scope="module")
def tiny_traced(engine) -> Iterator[Traced]:
    with traced(engine) as found:
        yield found


def check_tree(spans: dict[str, ReadableSpan], whole: str, inference: str) -> None:
    """Each span lies within its parent, and the stages follow one another without a gap."""
    by_id = {span.context.span_id: span for span in spans.values()}
    for span in spans.values():
        if span.name == whole:
            continue
        parent = by_id[span.parent.span_id]
        outer = whole if span.name in (inference, "receive", "respond") else inference
        assert parent.name == outer and span.kind is SpanKind.INTERNAL
        assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
    stages = sorted(
        (span for span in spans.values() if span.name not in (whole, inference, "recovery")),
        key=lambda span: (span.start_time, span.end_time),
    )
    for before, after in pairwise(stages):
        assert before.end_time == after.start_time
    assert stages[0].start_time == spans[whole].start_time


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_has_a_span_for_each_stage(tiny_traced, stream):
    asked = dict(max_tokens=6, temperature=0.5, top_p=0.9, seed=(1 << 63) - 1, stop=["~~"], logit_bias={"40": 1})
    status, headers, _ = tiny_traced.served.chat(SECRET, stream=stream, ignore_eos=True, **asked)
    assert status == 200
    spans = tiny_traced.take()
    whole = spans["POST /v1/chat/completions"]
    assert set(spans) == {*STAGES, "chat tiny", whole.name}
    check_tree(spans, whole.name, "chat tiny")
    assert whole.kind is SpanKind.SERVER and whole.parent is None and whole.status.status_code is StatusCode.UNSET
    assert dict(whole.attributes) == {
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "url.path": "/v1/chat/completions",
        "url.scheme": "http", "http.response.status_code": 200, "ryzanstein.request_id": headers["x-request-id"],
    }  # fmt: skip
    found = dict(spans["chat tiny"].attributes)
    assert 0 < found.pop("gen_ai.response.time_to_first_chunk") < 60
    assert found.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert found.pop("gen_ai.usage.cache_read.input_tokens") in range(0, 33, 16)
    assert found.pop("gen_ai.request.stream", False) is stream
    assert found == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "ryzanstein", "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny", "gen_ai.output.type": "text", "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9, "gen_ai.request.seed": (1 << 63) - 1,
        "gen_ai.usage.input_tokens": len(f"user: {SECRET}\nassistant:"), "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("length",),
    }  # fmt: skip
    assert whole.resource.attributes["service.name"] == "ryzanstein"
    assert whole.resource.attributes["service.version"] == "1.2.3"


def test_other_operations(tiny_traced):
    served = tiny_traced.served
    assert served.complete([SECRET, "b"], max_tokens=2, n=2, structured_outputs={"choice": ["ab", "cd"]})[0] == 200
    spans = tiny_traced.take()
    assert set(spans) == {*STAGES, "compile_grammar", "text_completion tiny", "POST /v1/completions"}
    check_tree(spans, "POST /v1/completions", "text_completion tiny")
    found = spans["text_completion tiny"].attributes
    assert found["gen_ai.request.choice.count"] == 2 and found["gen_ai.output.type"] == "json"
    assert len(found["gen_ai.response.finish_reasons"]) == 4
    assert served.post("/v1/embeddings", input=[SECRET, "b"])[0] == 200
    spans = tiny_traced.take()
    assert set(spans) == {*STAGES, "embeddings tiny", "POST /v1/embeddings"} - {"decode"}
    check_tree(spans, "POST /v1/embeddings", "embeddings tiny")
    assert spans["embeddings tiny"].attributes["gen_ai.usage.input_tokens"] == len(SECRET) + 1
    assert served.post("/v1/responses", input=SECRET, max_output_tokens=3, stream=True)[0] == 200
    spans = tiny_traced.take()
    assert {"chat tiny", "POST /v1/responses", *STAGES} == set(spans)
    assert spans["chat tiny"].attributes["gen_ai.response.id"].startswith("resp_")


def test_a_request_belongs_to_its_client_s_trace(tiny_traced, caplog):
    served = tiny_traced.served
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}

    def whole(*headers: tuple[str, str]) -> ReadableSpan:
        raw = json.dumps(body).encode()
        lines = [*headers, ("Host", "localhost"), ("Content-Type", "application/json"), ("Connection", "close")]
        head = "".join(f"{name}: {value}\r\n" for name, value in lines)
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            text = f"POST /v1/completions HTTP/1.1\r\n{head}Content-Length: {len(raw)}\r\n\r\n".encode("latin-1")
            connection.sendall(text + raw)
            while connection.recv(1 << 16):
                pass
        return tiny_traced.take()["POST /v1/completions"]

    with caplog.at_level(logging.INFO, "ryzanstein_jax.server"):
        found = whole(("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2"))
    assert format(found.context.trace_id, "032x") == PARENT[3:35]
    assert format(found.parent.span_id, "016x") == PARENT[36:52] and found.parent.is_remote
    assert dict(found.context.trace_state) == {"a": "1", "b": "2"}
    logged = [record.fields for record in caplog.records if record.message == "request"]
    assert logged[-1]["trace_id"] == PARENT[3:35]
    for odd in (
        PARENT[:-3],
        "x" * 600,
        PARENT.replace("-b7", "-é7"),
        f"00-{'0' * 32}-{'0' * 16}-01",
        "ff" + PARENT[2:],
    ):
        assert whole(("traceparent", odd)).parent is None
    assert whole(("traceparent", PARENT), ("traceparent", PARENT)).parent is None, "one that is there twice"
    assert whole(("traceparent", PARENT), ("tracestate", "=,;" * 200)).parent is not None
    body["max_tokens"] = 2
    served.complete("x", max_tokens=1)
    tiny_traced.take()
    served.request("POST", "/v1/completions", body, {"traceparent": PARENT[:-1] + "0"})
    served.request("GET", "/health")
    served.post("/tokenize", prompt="x")
    served.complete("y", max_tokens=1)
    assert len(tiny_traced.take()) == 8, "neither what its client doesn't sample, nor what generates nothing"


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_is_told(fake, stream):
    async def fail(step: int) -> None:
        await asyncio.sleep(0.01)
        if step == 2:
            raise EngineClosedError("gone")

    with traced(fake, api_keys=("a-secret-key",)) as found:
        served = found.served
        assert served.complete(SECRET, n=1000, stream=stream)[0] == 400
        spans = found.take()
        whole = spans["POST /v1/completions"]
        assert set(spans) == {"receive", whole.name} and whole.status.status_code is StatusCode.UNSET
        assert (
            whole.attributes["error.type"] == "invalid_value" and whole.attributes["http.response.status_code"] == 400
        )
        assert served.complete("x" * 200, max_tokens=2, stream=stream)[0] == 400
        spans = found.take()
        assert {"receive", "tokenize", "respond", "text_completion tiny"} < set(spans)
        assert spans["text_completion tiny"].status.status_code is StatusCode.ERROR
        fake.act = fail
        assert served.complete(SECRET, max_tokens=5, stream=stream)[0] == (200 if stream else 503)
        spans = found.take()
        for name in ("POST /v1/completions", "text_completion tiny"):
            assert spans[name].status.status_code is StatusCode.ERROR
            assert spans[name].attributes["error.type"] == "engine_unavailable"
        fake.act = lambda step: asyncio.sleep(0.01)
        key, served.key = served.key, None
        assert served.complete(SECRET)[0] == 401
        served.key = key
        served.complete(max_tokens=1)
        assert found.take()["POST /v1/completions"].attributes["http.response.status_code"] == 200, "not the one before"


def test_a_client_that_leaves(fake):
    fake.act = lambda step: asyncio.sleep(0.01)
    with traced(fake) as found:
        found.served.open("/v1/completions", prompt="x", max_tokens=100).close()
        whole = found.take()["POST /v1/completions"]
        assert whole.attributes["error.type"] == "disconnected"
        assert "http.response.status_code" not in whole.attributes


def test_a_recovery_is_a_span_of_each_request_that_it_kept_waiting(fake):
    stream = fake.stream

    async def interrupted(*rest, **more):
        async for chunk in stream(*rest, **more):
            yield chunk
            if len(chunk.output.outputs[0].token_ids) == 2:
                chunk.output.timings.note_lost()
                await asyncio.sleep(0.1)
                chunk.output.timings.note_token()

    fake.stream = interrupted
    with traced(fake) as found:
        assert found.served.complete(max_tokens=4)[0] == 200
        spans = found.take()
        check_tree(spans, "POST /v1/completions", "text_completion tiny")
        recovery = spans["recovery"]
        assert recovery.end_time - recovery.start_time >= 1e8


class Failing(SpanExporter):
    """Counts, and does with each batch what it is told."""

    def __init__(self, act) -> None:
        self.num_spans, self._act = 0, act

    def export(self, spans: Sequence[ReadableSpan]):
        self.num_spans += len(spans)
        return self._act()


def test_an_exporter_that_raises_or_hangs_holds_nothing_up(fake):
    def fail():
        raise OSError("no collector")

    hangs = threading.Event()
    for act in (fail, hangs.wait):
        exporter = Failing(act)
        processor = BatchSpanProcessor(exporter, max_queue_size=8, max_export_batch_size=4, schedule_delay_millis=1)
        with serving(fake, tracing=Tracing(processor, "1")) as served:
            for _ in range(5):
                assert served.complete(max_tokens=2)[0] == 200
            wait_until(lambda exporter=exporter: exporter.num_spans >= 4)
            begun = time.monotonic()
        assert time.monotonic() - begun < 20, "nor the server's end: the exporter would hang for ever"
    hangs.set()


def test_a_span_that_can_t_be_made_is_only_logged(fake, monkeypatch, caplog):
    monkeypatch.setattr(Tracing, "child", lambda *rest: 1 / 0)
    with traced(fake) as found, caplog.at_level(logging.ERROR, "ryzanstein_jax.server"):
        assert found.served.complete(max_tokens=2)[0] == 200
        wait_until(lambda: any("could not be traced" in record.message for record in caplog.records))


def test_a_collector_gets_what_the_environment_asks_for(fake, monkeypatch):
    got: list[tuple[str, str | None, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers.get("x-team"), ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *rest: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=blue")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        assert open_tracing(None, "1") is None, "nobody asked"
        for given, variable in ((url, None), (f"{url}/", None), (f"{url}/v1/traces", None), (None, url)):
            if variable is not None:
                monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", variable)
            tracing = open_tracing(given, "1")
            with serving(fake, tracing=tracing) as served:
                assert served.complete(max_tokens=2)[0] == 200
        collector.shutdown()
    assert [(path, team) for path, team, _ in got] == [("/v1/traces", "blue")] * 4
    for _, _, request in got:
        (resource,) = request.resource_spans
        named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
        assert named["service.name"] == "mine"
        assert len(resource.scope_spans[0].spans) == 8


def test_what_can_t_be_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="otlp_endpoint='localhost:4318'"):
        open_tracing("localhost:4318", "1", {})
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1"}
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL='grpc'.*http/protobuf"):
        open_tracing(None, "1", asked | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER='zipkin'"):
        open_tracing(None, "1", asked | {"OTEL_TRACES_EXPORTER": "zipkin"})
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT='x'"):
        open_tracing(None, "1", asked | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "x"})
    for off in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert open_tracing(None, "1", asked | off) is None
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(ConfigError, match="max_queue_size"):
        open_tracing("http://localhost:1", "1", {})
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    for endpoint, environment in (("http://localhost:1", {}), (None, asked)):
        with pytest.raises(ConfigError, match=r"pip install 'ryzanstein-jax\[otel\]'"):
            open_tracing(endpoint, "1", environment)
    assert open_tracing(None, "1", {}) is None, "and without it a server without traces starts"


def test_a_collector_that_is_not_there_costs_a_request_nothing(fake):
    exporter = OTLPSpanExporter(endpoint="http://127.0.0.1:1/v1/traces", timeout=1)
    with serving(fake, tracing=Tracing(BatchSpanProcessor(exporter, schedule_delay_millis=1), "1")) as served:
        for _ in range(3):
            assert served.complete(max_tokens=2)[0] == 200
