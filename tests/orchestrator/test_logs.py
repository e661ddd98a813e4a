"""Logs of ranks, written by real processes: bounded, prefixed, complete at the end, harmless when either side dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator import logs as logs_module
from ryzanstein_jax.orchestrator.logs import MAX_LINE, PIPE_BYTES, TAIL_LINES, RankLogs, RunLogs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunLogs]:
    with RunLogs(tmp_path, max_file_bytes=1 << 16, secrets=["open sesame"]) as logs:
        yield logs


def start(logs: RankLogs, code: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=logs.writer_fd, stderr=logs.writer_fd, cwd=ROOT)
    logs.started()
    return process


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_both_outputs_and_those_of_other_languages_arrive(run):
    first, second = run.open(0, 1), run.open(1, 1)
    code = "import os; print('python', flush=True); os.write(2, b'native\\n'); os.system('echo shell'); os.abort()"
    processes = [start(first, code), start(second, "print('other')")]
    for process in processes:
        process.wait(20)
    assert first.tail() == ["python", "native", "shell"] and second.tail() == ["other"]
    wait_for(lambda: first.ended and second.ended)
    lines = (run.folder / "rank-0.log").read_text().splitlines()
    assert len(lines) == 3 and all(" rank 0 generation 1 | " in line for line in lines)
    assert (run.folder / "rank-1.log").read_text().endswith(" rank 1 generation 1 | other\n")


def test_the_last_words_of_a_killed_rank_are_seen_at_once(run):
    for _ in range(20):
        logs = run.open(0, 1)
        process = start(logs, "import os, signal; os.write(2, b'last words'); os.kill(os.getpid(), signal.SIGKILL)")
        assert process.wait(20) == -signal.SIGKILL
        logs.close()
        assert logs.tail(1) == ["last words"] and logs.ended


def test_what_was_written_before_is_in_the_tail(run):
    logs = run.open(0, 1)
    for number in range(300):
        os.write(logs.writer_fd, b"line %d\n" % number)
        assert logs.tail(1) == [f"line {number}"]
    assert logs.tail(3) == ["line 297", "line 298", "line 299"] and logs.tail(0) == []
    assert len(logs.tail(10_000)) == TAIL_LINES
    logs.close()
    logs.close()


@pytest.mark.parametrize("limit", [1 << 13, 1 << 16])
def test_a_file_is_bounded_and_holds_the_end(tmp_path, limit):
    run = RunLogs(tmp_path, max_file_bytes=limit)
    logs = run.open(0, 1)
    for number in range(20_000):
        os.write(logs.writer_fd, b"number %d\n" % number)
    logs.close()
    kept = [(run.folder / name).read_text() for name in ("rank-0.log.1", "rank-0.log")]
    assert all(0 < len(text) <= limit for text in kept)
    numbers = [int(line.rpartition(" ")[2]) for text in kept for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 20_000))
    assert sorted(path.name for path in run.folder.iterdir()) == ["lock", "rank-0.log", "rank-0.log.1"]
    run.close()


def test_generations_share_a_rank_s_files(run):
    for generation in (1, 2):
        logs = run.open(0, generation)
        os.write(logs.writer_fd, b"hello\n")
        logs.close()
    text = (run.folder / "rank-0.log").read_text()
    assert "generation 1 | hello\n" in text and text.endswith("generation 2 | hello\n")


def test_a_standby_takes_a_rank(run):
    logs = run.open(None, 1)
    os.write(logs.writer_fd, b"waiting\n")
    assert logs.tail() == ["waiting"]
    logs.assign(3, 2)
    os.write(logs.writer_fd, b"working\n")
    assert logs.tail() == ["waiting", "working"]
    assert (run.folder / "rank-3.log").read_text().endswith("rank 3 generation 2 | working\n")
    assert (run.folder / "standby.log").read_text().endswith("standby generation 1 | waiting\n")


def test_endless_lines_are_broken(run):
    logs = run.open(0, 1)
    for _ in range(10):
        os.write(logs.writer_fd, b"x" * 10_000)
    logs.close()
    lines = logs.tail(100)
    assert max(len(line) for line in lines) <= MAX_LINE and sum(len(line) for line in lines) == 100_000


def test_a_flood_is_dropped_and_said(run, monkeypatch):
    monkeypatch.setattr(logs_module, "BURST_BYTES", 100_000)
    logs = run.open(0, 1)
    block = b"flood\n" * 10_000
    for _ in range(50):
        os.write(logs.writer_fd, block)
    os.write(logs.writer_fd, b"the end")
    logs.close()
    text = (run.folder / "rank-0.log").read_text()
    assert "bytes left out: too many in a second)" in text


def test_secrets_and_commands_to_a_terminal_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    with RunLogs(tmp_path, secrets=["open sesame", "a"]) as run:
        logs = run.open(0, 1)
        os.write(logs.writer_fd, b"say open sesame, correct-horse-battery, hf_abcdefghijklmnopqrstuvwx\x1b[2J \xff\r\n")
        assert logs.tail() == ["say ***, ***, ***[2J \\xff"]
        text = (run.folder / "rank-0.log").read_bytes()
        assert b"sesame" not in text and b"horse" not in text and b"hf_" not in text and b"\x1b" not in text
        assert os.stat(run.folder).st_mode & 0o777 == 0o700
        assert os.stat(run.folder / "rank-0.log").st_mode & 0o777 == 0o600


def test_a_rank_writes_on_while_the_leader_is_busy(run):
    """The reading thread is held up, and a megabyte still goes into the pipe."""
    logs = run.open(0, 1)
    hold, held = threading.Event(), threading.Event()
    run._commands.put((lambda: (held.set(), hold.wait(20)), threading.Event()))
    os.eventfd_write(run._wake, 1)
    assert held.wait(20)
    began = time.monotonic()
    assert os.write(logs.writer_fd, b"x" * (PIPE_BYTES - 10)) == PIPE_BYTES - 10
    assert time.monotonic() - began < 5
    hold.set()
    assert logs.tail(1)[-1].startswith("xxx")


def test_one_thread_reads_all_ranks(run):
    before = threading.active_count()
    many = [run.open(rank, 1) for rank in range(64)]
    assert threading.active_count() == before
    for rank, logs in enumerate(many):
        os.write(logs.writer_fd, b"rank %d\n" % rank)
    assert [logs.tail() for logs in many] == [[f"rank {rank}"] for rank in range(64)]


def test_a_full_disk_hurts_nobody(run, monkeypatch):
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if threading.current_thread().name == "rank-logs":
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    logs = run.open(0, 1)
    os.write(logs.writer_fd, b"still here\n")
    assert logs.tail() == ["still here"]


def test_nothing_is_left_open(tmp_path):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        with RunLogs(tmp_path) as run:
            for rank in range(3):
                os.write(run.open(rank, 1).writer_fd, b"x\n")
    assert descriptors() == before and threading.active_count() == threads


def test_a_closed_run_opens_nothing_and_keeps_the_lines(tmp_path):
    run = RunLogs(tmp_path)
    logs = run.open(0, 1)
    os.write(logs.writer_fd, b"kept\n")
    run.close()
    run.close()
    assert logs.tail() == ["kept"] and not run.folder.exists()
    with pytest.raises(ConfigError, match="closed"):
        RankLogs(run, 1, 1)


RANK_THAT_OUTLIVES = """
import os, sys, time
from ryzanstein_jax.orchestrator.output import take_output
take_output()
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
time.sleep(0.2)  # the leader's end of the pipe is closed by now
for _ in range(100):
    print("to nobody")
    print("to nobody", file=sys.stderr)
open(sys.argv[2], "w").write("alive")
"""
LEADER_THAT_DIES = """
import os, subprocess, sys
from ryzanstein_jax.orchestrator.logs import RunLogs
logs = RunLogs(sys.argv[1]).open(0, 1)
subprocess.Popen(
    [sys.executable, "-c", sys.argv[3], str(os.getpid()), sys.argv[2]], stdout=logs.writer_fd, stderr=logs.writer_fd
)
logs.started()
os.kill(os.getpid(), 9)
"""


def test_a_rank_survives_the_leader_and_its_folder_does_not(tmp_path):
    sign, base = tmp_path / "sign", tmp_path / "logs"
    command = [sys.executable, "-c", LEADER_THAT_DIES, str(base), str(sign), RANK_THAT_OUTLIVES]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    wait_for(sign.exists)
    wait_for(lambda: sign.read_text() == "alive")
    (dead,) = base.glob("run-*")
    with RunLogs(base) as run:
        assert not dead.exists() and list(base.glob("run-*")) == [run.folder]


TAKES_OUTPUT = """
import os, sys
from ryzanstein_jax.orchestrator.output import take_output
print("before", flush=True)
take_output(int(sys.argv[1]))
print("\\u00e9 to stdout")
print("to stderr", file=sys.stderr)
os.write(1, b"native\\n")
sys.stdout.write("unfinished")
"""


def test_a_rank_takes_a_descriptor_for_its_output(run):
    logs = run.open(0, 1)
    command = [sys.executable, "-c", TAKES_OUTPUT, str(logs.writer_fd)]
    done = subprocess.run(
        command, pass_fds=[logs.writer_fd], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("before\n", "")
    logs.close()
    assert logs.tail() == ["é to stdout", "to stderr", "native", "unfinished"]


@pytest.mark.parametrize("bad", [dict(max_file_bytes=100)])
def test_what_is_refused(tmp_path, bad):
    with pytest.raises(ConfigError, match="use at least"):
        RunLogs(tmp_path, **bad)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can be written to"):
        RunLogs(tmp_path / "file")
