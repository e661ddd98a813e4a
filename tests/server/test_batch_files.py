"""Batches: the bodies are the server's, and each line is answered exactly once, whatever ends the process and when."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ryzanstein_jax.errors import ConfigError, RyzansteinError
from ryzanstein_jax.server.batch import Batch, Counts, batch_config
from tests.server.serving import MODEL, FakeBackend, serving, wait_until

ROOT = Path(__file__).resolve().parents[2]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def line(custom_id: object, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    given = {"prompt": "Hello"} if url == COMPLETIONS else {"messages": [{"role": "user", "content": "Hello"}]}
    whole = {"model": MODEL, "max_tokens": 3, "temperature": 0, **given, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": whole}


def write(path: Path, lines: Iterable[object]) -> Path:
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(one) for one in text.splitlines()]


def run(fake: FakeBackend, source: Path, output: Path, in_flight: int = 3) -> Counts:
    work = Batch(source, output, in_flight, batch_config(in_flight))
    fake.is_alive = True  # every run closes its engine
    try:
        asyncio.run(work.run(fake, MODEL, "1.2.3", lambda counts: None))
    finally:
        work.close()
    return work.counts


def without_chance(value: Any) -> Any:
    """An answer less what differs from one to the next."""
    if isinstance(value, dict):
        return {name: without_chance(one) for name, one in value.items() if name not in ("id", "created")}
    return [without_chance(one) for one in value] if isinstance(value, list) else value


def test_answers_and_errors_are_those_of_the_server(fake, tmp_path):
    lines = [
        line("one"),
        line("two", CHATS, n=2),
        line("odd", temperature=9),
        line("other", model="gpt-9"),
        line("long", prompt="x" * 500),
        line("named", CHATS, surprise=1),
        line("nowhere", "/v1/nothing"),
    ]
    counts = run(fake, write(tmp_path / "in", lines), tmp_path / "out")
    found = {answer["custom_id"]: answer for answer in read(tmp_path / "out")}
    assert set(found) == {one["custom_id"] for one in lines}
    with serving(FakeBackend(fake.tokenizer)) as served:
        for one in lines:
            status, _, body = served.request("POST", one["url"], one["body"])
            answer = found[one["custom_id"]]
            assert answer["error"] is None and answer["id"].startswith("batch_req_")
            assert answer["response"]["status_code"] == status and answer["response"]["request_id"]
            assert without_chance(answer["response"]["body"]) == without_chance(body)
    assert (counts.lines, counts.answered, counts.before, counts.errors) == (7, 7, 0, 5)
    assert (counts.prompt_tokens, counts.completion_tokens) == (
        5 + len("user: Hello\nassistant:"), 9,
    )  # fmt: skip
    assert "7 lines" in str(counts) and "5 of all with an error" in str(counts) and not fake.active


def test_wrong_lines_are_answered_and_stop_nothing(fake, tmp_path):
    wrong: list[Any] = [
        b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"custom_id": "\\ud800"}',
        b'{"custom_id": "' + b"x" * (9 << 20) + b'"}',
        {**line("get"), "method": "GET"}, {**line("more"), "more": 1}, {**line("path"), "url": "http://localhost/v1/x"},
        {**line("up"), "url": "/metrics"}, {**line("body"), "body": "x"}, line(5), line(""), line(None),
        line("y" * 600), line("stream", stream=True), {"custom_id": "alone"},
    ]  # fmt: skip
    source = write(tmp_path / "in", [line("first"), b"", *wrong, b"  ", line("last")])
    counts = run(fake, source, tmp_path / "out")
    answers = read(tmp_path / "out")
    assert (counts.answered, counts.errors) == (len(wrong) + 2, len(wrong)) and len(answers) == len(wrong) + 2
    failed = [answer for answer in answers if answer["error"] is not None]
    assert sorted(answer["error"]["line"] for answer in failed) == list(range(3, 3 + len(wrong)))
    assert all(answer["response"] is None and answer["error"]["message"] for answer in failed)
    named = {answer["custom_id"] for answer in failed}
    assert {"get", "more", "path", "up", "body", "stream", "alone", None} <= named
    assert fake.num_streams == 2
    before = (tmp_path / "out").read_bytes()
    again = run(fake, source, tmp_path / "out")
    assert (again.answered, again.before) == (0, counts.answered), "wrong lines are not answered twice either"
    assert (tmp_path / "out").read_bytes() == before and again.errors == counts.errors


def test_a_torn_last_line_is_answered_again(fake, tmp_path):
    source, output = write(tmp_path / "in", [line(str(number)) for number in range(5)]), tmp_path / "out"
    run(fake, source, output)
    whole = output.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (1, ends[0] - 1, ends[0], ends[2] + 7, len(whole) - 1):
        output.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        counts = run(fake, source, output)
        assert (counts.before, counts.answered) == (kept, 5 - kept)
        assert output.read_bytes().startswith(whole[: max([0, *(end for end in ends if end <= cut)])])
        assert sorted(answer["custom_id"] for answer in read(output)) == list("01234")
    output.write_bytes(whole + b" " * 200_000)
    assert run(fake, source, output).before == 5 and output.read_bytes() == whole


def test_files_that_do_not_belong_together_are_refused(fake, tmp_path):
    source, output = write(tmp_path / "in", [line("a"), line("b")]), tmp_path / "out"
    run(fake, source, output)
    whole = output.read_bytes()
    others = [
        (write(tmp_path / "twice", [line("a"), line("b"), b"{", line("a")]), whole, "lines 1 and 4 have the same"),
        (write(tmp_path / "other", [line("a"), line("c")]), whole, "answers no line of"),
        (source, whole + whole, "answers what another one has"),
        (source, b"{}\n" + whole, "line 1 is no answer"),
        (source, source.read_bytes(), "line 1 is no answer"),
        (write(tmp_path / "empty", [b"", b" "]), b"", "it holds no line"),
        (tmp_path / "missing", b"", "No such file"),
    ]
    for given, held, message in others:
        output.write_bytes(held)
        with pytest.raises(ConfigError, match=message):
            Batch(given, output, 1, batch_config(1))
        assert output.read_bytes() == held, "nothing of it is lost"
    output.write_bytes(whole)
    for where, message in [
        (source, "it is the input"), (tmp_path, "Is a directory"), (Path("/dev/null"), "it is no file"),
        (tmp_path / "no" / "out", "No such file"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Batch(source, where, 1, batch_config(1))


def test_two_runs_do_not_write_one_file(tmp_path):
    source = write(tmp_path / "in", [line("a")])
    work = Batch(source, tmp_path / "out", 1, batch_config(1))
    with pytest.raises(ConfigError, match="another run is writing it"):
        Batch(source, tmp_path / "out", 1, batch_config(1))
    work.close()
    Batch(source, tmp_path / "out", 1, batch_config(1)).close()


def test_lines_are_read_as_they_are_worked_on(fake, tmp_path):
    """No more of them than may be in flight, however long the file."""
    source = write(tmp_path / "in", [line(str(number)) for number in range(40)])
    most = 0

    async def act(step: int) -> None:
        nonlocal most
        most = max(most, fake.active)
        await asyncio.sleep(0.001)

    fake.act = act
    assert run(fake, source, tmp_path / "out", in_flight=3).answered == 40
    assert most == 3


def test_an_engine_that_fails_stops_the_run_and_loses_nothing(fake, tmp_path):
    source, output = write(tmp_path / "in", [line(str(number)) for number in range(9)]), tmp_path / "out"

    async def act(step: int) -> None:
        if fake.num_streams == 5:
            fake.is_alive = False
            raise RyzansteinError("it broke")

    fake.act = act
    with pytest.raises(RyzansteinError):
        run(fake, source, output, in_flight=1)
    kept = len(read(output))
    assert kept >= 4
    fresh = FakeBackend(fake.tokenizer)
    assert run(fresh, source, output).before == kept and len(read(output)) == 9


def started(tiny: Path, source: Path, output: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.server.batch_process", str(tiny), str(source), str(output), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_killed_at_any_moment_each_line_is_answered_once(tiny, tmp_path):
    chance, output = random.Random(5), tmp_path / "out"
    lines = [line(f"id-{number}", CHATS if number % 3 else COMPLETIONS, max_tokens=9) for number in range(300)]
    source = write(tmp_path / "in", [*lines, b"{"])
    kills, held = 0, 0
    while True:
        process = started(tiny, source, output)
        deadline = time.monotonic() + chance.uniform(0.0, 0.25)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if kills < 6 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
        _, text = process.communicate(timeout=60)
        now = output.read_bytes().count(b"\n")
        assert now >= held
        held = now
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, text
        kills += 1
    assert kills >= 3
    answers = read(output)
    assert sorted(answer["custom_id"] or "" for answer in answers) == sorted(["", *(one["custom_id"] for one in lines)])
    assert all(answer["response"]["status_code"] == 200 for answer in answers if answer["custom_id"])


def test_a_full_disk(tiny, tmp_path):
    source, output = write(tmp_path / "in", [line(str(number)) for number in range(300)]), tmp_path / "out"
    process = started(tiny, source, output, "1000")
    _, text = process.communicate(timeout=60)
    assert process.returncode and "ConfigError: output=" in text and "it can't be written: File too large" in text
    assert output.read_bytes() == b""
    process = started(tiny, source, output, "70000")
    _, text = process.communicate(timeout=60)
    assert process.returncode and "OutputError" in text and "start again" in text
    kept = len(read(output))
    assert 0 < kept < 300
    process = started(tiny, source, output)
    process.communicate(timeout=60)
    assert process.returncode == 0 and len({answer["custom_id"] for answer in read(output)}) == 300


def command(tiny: Path, *arguments: object) -> list[str]:
    sizes = ["--max-num-seqs", "4", "--max-model-len", "128"]
    return [sys.executable, "-m", "ryzanstein_jax.cli", "batch", str(tiny), *map(str, arguments), *sizes]


def test_the_command_survives_its_worker_and_its_own_death(tiny, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [line(f"id-{number}", CHATS, max_tokens=60, ignore_eos=True) for number in range(60)] + [b"no"])
    environment = {**os.environ, "RYZANSTEIN_FAULT": "exception:0:1:20"}
    arguments = command(tiny, source, "-o", output, "--executor", "processes")

    def begin() -> "subprocess.Popen[str]":
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    process = begin()
    wait_until(lambda: (output.exists() and output.read_bytes().count(b"\n") > 20) or process.poll() is not None, 120)
    process.kill()
    process.communicate(timeout=30)
    before = output.read_bytes().count(b"\n")
    assert 20 < before < 61
    process = begin()
    _, text = process.communicate(timeout=120)
    assert process.returncode == 3 and '"kind": "fault"' in text and '"kind": "recovered"' not in text, text
    assert f"61 lines: {61 - before} answered in" in text and "1 of all with an error" in text, text
    answers = {answer["custom_id"]: answer for answer in read(output)}
    assert len(answers) == len(read(output)) == 61
    for custom_id, answer in answers.items():
        assert custom_id is None or answer["response"]["body"]["usage"]["completion_tokens"] == 60
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 3 and "0 answered" in again.stderr, "nothing is loaded where nothing is left"


def test_the_command_looks_at_its_files_before_it_loads(tmp_path):
    source = write(tmp_path / "in.jsonl", [line("a")])
    for where, message in [("/dev/full", "it is no file"), (tmp_path / "no" / "out", "it can't be written")]:
        done = subprocess.run(
            command(tmp_path / "no-model", source, "-o", where), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
