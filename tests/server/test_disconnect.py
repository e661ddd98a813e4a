"""Clients that leave or do not read: what they held is free again at once, and others notice nothing."""

import asyncio
import http.client
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ryzanstein_jax import AsyncLLM
from ryzanstein_jax.replicas import Ticket
from tests.server.serving import Served, serving, wait_until

NUM_CONNECTIONS = 1000


def leave(connection: socket.socket, *, reset: bool) -> None:
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_request_ends_when_its_client_leaves(fake, stream, reset):
    with serving(fake) as served:

        async def stand_still(step: int) -> None:
            await asyncio.sleep(0.01 if step < 5 else 600)

        fake.act = stand_still  # so that nothing else ends it
        connection = served.open("/v1/completions", prompt="x", max_tokens=120, stream=stream, n=2)
        if stream:
            assert connection.recv(100)
        wait_until(lambda: fake.num_steps > 3)
        leave(connection, reset=reset)
        wait_until(lambda: not fake.active, 1.0)
        assert served.service.admission.num_sequences == 0
        assert served.metric("ryzanstein_disconnects_total") == 1
        assert "ryzanstein_requests_refused_total{" not in served.request("GET", "/metrics")[2], "it was no error"
        assert served.metric('ryzanstein_requests_finished_total{finish_reason="abort"}') == 2
        assert served.metric('ryzanstein_requests{state="running"}') == 0


def test_pages_are_free_within_two_steps(served: Served, engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    """Counted from when the server learns of it: the engine's steps until no page is owned."""
    executor = engine.replicas[0].executor
    collect = executor.collect
    # Steps so slow that it is under way for seconds.
    monkeypatch.setattr(executor, "collect", lambda: time.sleep(0.02) or collect())
    for stream in (False, True):
        begun = engine.stats().num_steps
        connection = served.open(
            "/v1/completions", prompt="Hello", max_tokens=120, stream=stream, ignore_eos=True, n=2, temperature=0
        )
        wait_until(lambda: engine.stats().num_pages_used > 0)
        steps: list[int] = []
        (replica,) = engine.replicas
        forget = replica.forget

        def noted(ticket: Ticket, forget: Callable[[Ticket], None] = forget, steps: list[int] = steps) -> None:
            steps.append(engine.stats().num_steps)
            forget(ticket)

        replica.forget = noted  # type: ignore[method-assign]
        connection.close()
        wait_until(lambda: engine.stats().num_pages_used == 0)
        replica.forget = forget  # type: ignore[method-assign]
        assert steps and engine.stats().num_steps - steps[0] <= 2
        assert steps[0] - begun < 110, "it was still under way"


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of every connection are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * NUM_CONNECTIONS)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_storm_of_connections_leaves_nothing(engine: AsyncLLM, many_files: None):
    """All are open at once, most of their requests let in; some clients close, some reset, some after a while."""
    open_files = len(os.listdir("/proc/self/fd"))
    with serving(engine, max_sequences=NUM_CONNECTIONS * 4 // 5) as served:
        opened = [
            served.open(
                "/v1/completions" if number % 2 else "/v1/chat/completions",
                **({"prompt": f"storm {number}"} if number % 2 else {"messages": [{"role": "user", "content": "x"}]}),
                max_tokens=60,
                stream=bool(number % 3),
                ignore_eos=True,
            )
            for number in range(NUM_CONNECTIONS)
        ]
        wait_until(lambda: len(served.server.server_state.connections) == NUM_CONNECTIONS, 20)
        wait_until(lambda: engine.stats().num_pages_used > 0)
        for number, connection in enumerate(opened):
            leave(connection, reset=bool(number % 2))
        wait_until(lambda: served.call(_num_connections(served)) == 0, 20)
        wait_until(lambda: served.service.admission.num_sequences == 0, 20)
        wait_until(lambda: engine.stats().num_pages_used == 0)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        status, _, body = served.complete("after the storm", max_tokens=3, ignore_eos=True)
        assert status == 200 and body["usage"]["completion_tokens"] == 3
        assert served.request("GET", "/ready")[0] == 200
    assert len(os.listdir("/proc/self/fd")) <= open_files + 8, "every connection's file was closed"


def test_a_client_that_does_not_read_is_given_up(fake):
    """Its answer fills the buffers of both sides; others go on, and after a while it is gone."""
    fake.max_length = 1 << 20
    with serving(fake, write_seconds=0.5, keep_alive_seconds=60) as served:
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", served.port))
        asked = {"model": "tiny", "prompt": ["x"] * 64, "max_tokens": 600, "stream": True}
        raw = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        lazy.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        wait_until(lambda: served.service.admission.num_sequences == 64)
        assert served.complete(max_tokens=2)[0] == 200
        wait_until(lambda: served.service.admission.num_sequences == 0, 20)
        assert served.metric("ryzanstein_disconnects_total") == 1
        wait_until(lambda: served.call(_num_connections(served)) == 0)
        lazy.close()


async def _num_connections(served: Served) -> int:
    state = served.server.server_state
    return len(state.connections) + len(state.tasks)


def test_connections_are_used_again(served: Served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    for stream in (False, True, False):
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200 and response.read()
    connection.close()


def test_threads_that_come_and_go_get_their_own_answers(served: Served):
    """Some leave in the middle; each of the others gets the answer that it gets alone."""
    asked = dict(max_tokens=12, temperature=0)
    alone = {prompt: served.complete(prompt, **asked)[2]["choices"][0]["text"] for prompt in ("one", "two", "three")}
    found: list[bool] = []

    def visit(number: int) -> None:
        prompt = ("one", "two", "three")[number % 3]
        if number % 2:
            connection = served.open("/v1/completions", prompt=prompt, stream=True, **asked)
            time.sleep(0.001 * number)
            leave(connection, reset=True)
        else:
            status, _, body = served.complete(prompt, **asked)
            found.append(status == 200 and body["choices"][0]["text"] == alone[prompt])

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12
