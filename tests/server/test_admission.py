"""Who comes in, how long it may take, and what a client sees meanwhile."""

import asyncio
import http.client
import json
import re
import socket
import threading
import time
from typing import Any

import pytest

from ryzanstein_jax.errors import PoisonRequestError, RecoveryExhaustedError
from tests.server.serving import FakeBackend, Served, events, serving, wait_until


class Gate:
    """Keeps a fake engine's tokens back until it is opened."""

    def __init__(self, fake: FakeBackend, after: int = 0):
        self.open, self._after = False, after
        fake.act = self

    async def __call__(self, step: int) -> None:
        while step >= self._after and not self.open:
            await asyncio.sleep(0.005)


def in_threads(served: Served, count: int, **asked: Any) -> tuple[list[threading.Thread], list[Any]]:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(served.complete(**asked))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def test_the_queue_is_bounded_and_says_when_to_come_back(fake):
    gate = Gate(fake)
    with serving(fake, max_sequences=6, probe_seconds=0.1) as served:
        threads, found = in_threads(served, 3, max_tokens=2, n=2)
        wait_until(lambda: served.service.admission.num_sequences == 6)
        for stream in (False, True):
            status, headers, body = served.complete(max_tokens=2, stream=stream)
            assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(headers["retry-after"]) <= 60
        assert served.post("/tokenize", prompt="x")[0] == 429
        assert served.request("GET", "/ready")[0] == 503 and fake.num_streams == 4, (
            "a probe needs no place in the queue"
        )
        gate.open = True
        for thread in threads:
            thread.join()
        assert [status for status, _, _ in found] == [200] * 3
        assert served.complete(max_tokens=2)[0] == 200
        assert served.service.admission.num_sequences == 0
        status, _, body = served.complete(n=7)
        assert (status, body["error"]["param"]) == (400, "n"), "more than there is room for at all"


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_with_a_typed_error(fake, stream):
    Gate(fake)
    with serving(fake, request_seconds=0.3) as served:
        for more in ({}, {"deadline_seconds": 0.2}, {"deadline_seconds": 1000}):
            begun = time.monotonic()
            status, headers, body = served.complete(stream=stream, **more)
            assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
            assert time.monotonic() - begun < 5 and headers["x-should-retry"] == "false"
        wait_until(lambda: not fake.active)
        assert served.metric('ryzanstein_requests_finished_total{finish_reason="abort"}') == 3


def test_a_deadline_in_the_middle_of_a_stream(fake):
    Gate(fake, after=2)
    with serving(fake) as served:
        status, _, text = served.complete(stream=True, deadline_seconds=0.3)
        parts = text.split("\n\n")
        assert status == 200 and len(parts) == 4 and "[DONE]" not in text
        assert json.loads(parts[2][6:])["error"]["code"] == "deadline_exceeded"
        wait_until(lambda: not fake.active)


def test_silent_streams_get_comments(fake):
    """As while workers are replaced: nothing comes for long, and proxies must not think the server dead."""
    gate = Gate(fake, after=2)
    with serving(fake, keep_alive_seconds=0.1) as served:
        begun = time.monotonic()
        connection = served.open("/v1/completions", prompt="x", max_tokens=4, stream=True)
        wait_until(lambda: served.metric("ryzanstein_keep_alives_total") >= 3)
        gate.open = True
        with connection, connection.makefile("rb") as file:
            response = b"".join(iter(file.readline, b"0\r\n"))
        body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", response.partition(b"\r\n\r\n")[2])
        comments = body.count(b": keep-alive")
        assert 3 <= comments <= (time.monotonic() - begun) / 0.1, body
        assert body.rstrip().endswith(b"data: [DONE]")
        assert served.metric("ryzanstein_keep_alives_total") == comments
        gate.open = False
        gate._after = 0  # nothing at all yet: the answer begins with a comment

        def open_after_a_comment() -> None:
            wait_until(lambda: served.metric("ryzanstein_keep_alives_total") > comments)
            gate.open = True

        thread = threading.Thread(target=open_after_a_comment)
        thread.start()
        status, _, text = served.complete(max_tokens=2, stream=True)
        thread.join()
        assert status == 200 and text.startswith(": keep-alive\n\n") and len(events(text)) == 2


def test_requests_wait_while_workers_are_replaced(fake):
    from types import SimpleNamespace

    fake.orchestrator = SimpleNamespace(state="recovering", is_watched=True, width=1)
    gate = Gate(fake)
    with serving(fake, max_sequences=2) as served:
        threads, found = in_threads(served, 2, max_tokens=2)
        wait_until(lambda: served.service.admission.num_sequences == 2)
        assert served.complete()[0] == 429, "the wait is bounded"
        gate.open = True
        for thread in threads:
            thread.join()
        assert [status for status, _, _ in found] == [200, 200]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PoisonRequestError("it kills devices"), 500, "poison_request"),
        (RecoveryExhaustedError("/a/secret/path"), 503, "engine_unavailable"),
        (ValueError("/a/secret/path"), 500, "internal_error"),
    ],
)
def test_what_befalls_the_engine_becomes_a_typed_error(fake, error, status, code):
    async def fail(step: int) -> None:
        if step == 1:
            raise error

    fake.act = fail
    with serving(fake) as served:
        found, headers, body = served.complete(max_tokens=3)
        assert (found, body["error"]["code"]) == (status, code) and "secret" not in str(body)
        assert (headers.get("x-should-retry") == "false") == (code == "poison_request")
        found, _, text = served.complete(max_tokens=3, stream=True)
        assert found == 200 and json.loads(text.split("\n\n")[-2][6:])["error"]["code"] == code
        assert served.metric('ryzanstein_requests_finished_total{finish_reason="error"}') == 2


def test_priorities_and_the_model_s_own_advice_reach_the_engine(fake):
    seen = []
    stream = fake.stream
    fake.stream = lambda prompt, params, priority: seen.append(params) or stream(prompt, params, priority=priority)
    with serving(fake) as served:
        served.complete(max_tokens=1, priority=-5)
        served.complete(max_tokens=1, temperature=0)
        assert fake.priorities == [-5, 0] and [params.temperature for params in seen] == [0.5, 0]
        assert served.complete(priority=100000)[0] == 400


def test_encoding_is_off_the_event_loop_and_bounded_in_time(fake):
    """A template or a tokenizer that takes long holds up neither others nor its own request for ever."""
    release = threading.Event()
    encode = fake.tokenizer.encode
    fake.tokenizer.encode = lambda text, **more: (release.wait(20) if "slow" in text else None) or encode(text, **more)
    with serving(fake, encode_seconds=0.3) as served:
        threads, found = in_threads(served, 1, prompt="slow", max_tokens=1)
        assert served.request("GET", "/health")[0] == 200
        assert served.complete("quick", max_tokens=1)[0] == 200 and not found, "the slow one has no answer yet"
        threads[0].join()
        assert found[0][0] == 400 and "tokenizing" in found[0][2]["error"]["message"]
        assert served.service.admission.num_sequences == 0
        release.set()


def test_the_server_may_take_shorter_prompts_than_the_model(fake):
    with serving(fake, max_prompt_tokens=10) as served:
        assert served.complete("x" * 10, max_tokens=2)[0] == 200
        status, _, body = served.complete("x" * 11, max_tokens=2)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert "10 tokens" in body["error"]["message"]


def test_an_idle_sender_is_not_waited_for(fake):
    with serving(fake, body_seconds=0.3) as served, socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
        connection.settimeout(10)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 408


def test_draining_waits_for_what_runs_and_then_ends_it(fake):
    gate = Gate(fake, after=1)
    with serving(fake) as served:
        threads, found = in_threads(served, 2, max_tokens=3)
        wait_until(lambda: fake.active == 2)
        drained = asyncio.run_coroutine_threadsafe(served.service.drain(20), served.loop)
        wait_until(lambda: served.service.health.draining)
        assert served.complete()[0] == 503 and not drained.done()
        gate.open = True
        for thread in threads:
            thread.join()
        assert drained.result(5) is True and [status for status, _, _ in found] == [200, 200]
    gate.open = False
    with serving(fake) as served:
        threads, found = in_threads(served, 2, max_tokens=3)
        wait_until(lambda: fake.active == 2)
        assert served.call(served.service.drain(0.1)) is False
        for thread in threads:
            thread.join()
        assert [(status, body["error"]["code"]) for status, _, body in found] == [(503, "draining")] * 2
        assert not fake.active
