"""`ryzanstein serve` as an operator runs it: its processes are killed and told to end while clients stream."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil

from tests.server.serving import collector
from tests.support import is_running

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-of-the-operator"
NUM_CLIENTS, NUM_TOKENS = 32, 24


class Process:
    """A server in a process of its own, its log read as it comes."""

    def __init__(self, popen: "subprocess.Popen[str]"):
        self.popen, self.lines = popen, list[dict[str, Any]]()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.port = self.await_line("listening")["port"]

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.lines.append({"message": line.rstrip()})

    def await_line(self, message: str, **fields: object) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while True:
            for line in self.lines:
                if line["message"] == message and fields.items() <= line.items():
                    return line
            assert time.monotonic() < deadline and self.popen.poll() is None, self.lines
            time.sleep(0.02)

    def client(self) -> openai.OpenAI:
        plain = openai.DefaultHttpxClient(verify=False, timeout=120)  # it need not read the machine's certificates
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, http_client=plain)

    def get(self, path: str) -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Bearer {KEY}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    def wait(self) -> int:
        code = self.popen.wait(60)
        self._reader.join()
        return code


@contextmanager
def started(model: Path, tmp_path: Path, *arguments: str) -> Iterator[Process]:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    command = [
        sys.executable, "-m", "ryzanstein_jax.cli", "serve", str(model), "--port", "0", "--api-key-file", str(keys),
        "--max-model-len", "128", "--max-num-seqs", "8", "--max-num-batched-tokens", "32", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "RYZANSTEIN_FAULT": ""}
    popen = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    process = Process(popen)
    try:
        yield process
    finally:
        popen.kill()
        process.wait()


def run_clients(process: Process, act: Any = None, after: int = 0) -> list[tuple[str, list[int], str]]:
    """All clients at once, each a stream: their texts, tokens and ends.

    `act` is called once every request is accepted (one that comes to a server that drains is refused, as it has to
    be) and so many tokens have come.
    """
    clients = [process.client() for _ in range(NUM_CLIENTS)]  # making one takes long beside its request
    found: list[Any] = [None] * NUM_CLIENTS
    accepted, count, lock, done = [0], [0], threading.Lock(), threading.Event()

    def one(number: int) -> None:
        kinds: list[dict[str, Any]] = [
            dict(temperature=0), dict(temperature=0.9, seed=number), dict(seed=5, frequency_penalty=0.5),
            dict(temperature=0, logit_bias={"40": 3}),
        ]  # fmt: skip
        try:
            stream = clients[number].completions.create(
                model="tiny", prompt=f"client {number}", max_tokens=NUM_TOKENS, stream=True,
                **kinds[number % len(kinds)],
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )  # fmt: skip
            with lock:
                accepted[0] += 1
            text, tokens, reason = "", [], ""
            for chunk in stream:
                (choice,) = chunk.choices
                text, reason = text + choice.text, choice.finish_reason or reason
                tokens += choice.model_extra["token_ids"]
                with lock:
                    count[0] += len(choice.model_extra["token_ids"])
                    due = accepted[0] == NUM_CLIENTS and count[0] >= after
                    if act is not None and due and not done.is_set():
                        done.set()
                        act()
            found[number] = (text, tokens, reason)
        except Exception as error:  # noqa: BLE001 - any is a failure of the test, and is shown
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [one for one in found if isinstance(one, Exception)]
    assert not errors, errors
    assert done.is_set() or act is None, "all streams had ended before"
    return found


def test_clients_notice_neither_a_killed_worker_nor_a_drain(tiny: Path, tmp_path: Path):
    """32 clients of the official library, three times: undisturbed, while a worker is killed, and while it drains."""
    with (
        collector() as (endpoint, spans),
        started(tiny, tmp_path, "--executor", "processes", "--tp", "2", "--otlp-endpoint", endpoint) as process,
    ):
        process.await_line("status", status="ready")
        assert process.get("/ready")[0] == 200
        undisturbed = run_clients(process)
        assert all(len(tokens) == NUM_TOKENS and reason == "length" for _, tokens, reason in undisturbed)

        def ranks() -> list[psutil.Process]:
            leader = psutil.Process(process.popen.pid)
            return [child for child in leader.children(recursive=True) if child.ppid() != leader.pid]

        before = ranks()
        assert len(before) == 2
        assert run_clients(process, lambda: before[1].kill(), after=NUM_CLIENTS * NUM_TOKENS // 4) == undisturbed
        process.await_line("status", status="recovering")
        assert not {child.pid for child in before} & {child.pid for child in ranks()}
        _, text = process.get("/metrics")
        assert "ryzanstein_restarts_total 1.0" in text and "ryzanstein_recovery_seconds_count 1.0" in text

        # A drain: what runs goes on to its end, nothing new comes in, then all processes are gone.
        refused: list[Exception] = []
        children = psutil.Process(process.popen.pid).children(recursive=True)

        late = process.client()

        def end() -> None:
            process.popen.send_signal(signal.SIGTERM)
            process.await_line("draining")
            assert (process.get("/health")[0], process.get("/ready")[0]) == (200, 503)
            try:
                late.completions.create(model="tiny", prompt="late")
            except openai.APIStatusError as error:
                refused.append(error)

        assert run_clients(process, end, after=NUM_CLIENTS * NUM_TOKENS // 2) == undisturbed
        assert process.wait() == 0
        assert [error.status_code for error in refused] == [503]
        assert not [child for child in children if is_running(child)]
        assert KEY not in json.dumps(process.lines)
        # The traces tell the same, the drained server's last ones too: who was kept waiting, and by what.
        assert sum(span.name == "POST /v1/completions" for span in spans) == 3 * NUM_CLIENTS + 1, "and one refused"
        waited = {span.trace_id for span in spans if span.name == "recovery"}
        assert 0 < len(waited) <= NUM_CLIENTS
        assert all(span.end_time_unix_nano > span.start_time_unix_nano for span in spans if span.name == "recovery")
        traces = {line["trace_id"] for line in process.lines if "trace_id" in line}
        assert waited < {bytes.fromhex(trace) for trace in traces} and len(traces) == 3 * NUM_CLIENTS + 1


def test_a_second_signal_ends_what_runs(tiny: Path, tmp_path: Path):
    with started(tiny, tmp_path) as process:
        process.await_line("status", status="ready")
        found: list[Any] = []

        def stream() -> None:
            asked = process.client().completions.create(
                model="tiny", prompt=["x"] * 64, max_tokens=120, stream=True, n=2, extra_body={"ignore_eos": True}
            )
            try:
                found.extend(asked)
            except openai.APIError as error:
                found.append(error)

        client = threading.Thread(target=stream)
        client.start()
        while not found:
            time.sleep(0.01)
        process.popen.send_signal(signal.SIGTERM)
        process.await_line("draining")
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        client.join()
        assert found[-1].code == "draining", "a typed error, not a broken connection"


def test_a_signal_ends_a_server_that_still_loads(tiny: Path, tmp_path: Path):
    with started(tiny, tmp_path) as process:
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() in (0, 128 + signal.SIGTERM)
    (tmp_path / "broken").mkdir()
    with started(tmp_path / "broken", tmp_path) as process:
        assert process.wait() == 1
        assert "ConfigError" in process.lines[-1]["message"] or "WeightsError" in process.lines[-1]["message"]
        assert not any("Traceback" in str(line) for line in process.lines)
