"""Two machines, one of which is lost: streams end with the undisturbed tokens, and nothing is left behind."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ryzanstein_jax import LLM, SamplingParams
from ryzanstein_jax.errors import ProcessGroupError
from tests.faults.harness import nothing_left_behind
from tests.orchestrator.remote import SECRET, Machines, machines, ranks_of, until
from tests.support import GOLDEN, is_running

SETTINGS: dict[str, Any] = dict(
    tensor_parallel_size=2, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, progress=False
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12]]
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)


def start(max_num_seqs: int = 4, /, **options: Any) -> LLM:
    settings = {**SETTINGS, "max_num_seqs": max_num_seqs}
    return LLM(str(GOLDEN / "llama"), executor="processes", orchestrator=options, **settings)


def run(llm: LLM, act: Callable[[], object] | None = None, times: int = 1) -> list[list[int]]:
    """The tokens of all prompts, so many times; calls `act` once when some of them are there."""

    def generate() -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(times * PROMPTS, PARAMS, use_tqdm=False)]

    def steps() -> int:
        return llm.orchestrator.metrics.snapshot()["counters"]["steps"]

    if act is None:
        return generate()
    before = steps()

    def wait_and_act() -> None:
        until(lambda: steps() > before + 8)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        return generate()
    finally:
        thread.join()


def kinds(llm: LLM) -> list[str]:
    return [event["kind"] for event in llm.orchestrator.status()["events"]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machines, LLM]]:
    """Two machines and a leader without devices; agent b finds the secret in its environment."""
    folder = tmp_path_factory.mktemp("hosts")
    with nothing_left_behind(), machines(folder) as made:
        made.start("a", "--reconnect")
        made.start("b", "--reconnect", environment={"RYZANSTEIN_SECRET": SECRET, "RYZANSTEIN_GLOO_INTERFACE": "lo"})
        nccl = {"terminate_on_error": True}
        llm = start(**made.options(restore_after_sec=0.1, log_dir=str(folder / "logs"), nccl=nccl))
        try:
            yield made, llm
        finally:
            llm.close()


@pytest.fixture(scope="module")
def expected(two: tuple[Machines, LLM]) -> list[list[int]]:
    return run(two[1])


def test_ranks_run_on_both_machines(two: tuple[Machines, LLM], expected: list[list[int]]) -> None:
    made, llm = two
    assert all(len(tokens) == 40 for tokens in expected)
    assert [len(ranks_of(made.agents[name])) for name in ("a", "b")] == [1, 1]
    assert llm.orchestrator.status()["state"] == "ready"


def test_each_rank_tells_what_it_communicates_by_and_where_that_is_from(
    two: tuple[Machines, LLM], expected: list[list[int]]
) -> None:
    told = two[1].orchestrator.status()["communication"]
    for rank, interface in (("0", [None, "absent"]), ("1", ["lo", "environment"])):
        settings = {name: [value, origin] for name, value, origin in told[rank]}
        assert settings["RYZANSTEIN_GLOO_INTERFACE"] == interface
        assert settings["xla_gpu_nccl_terminate_on_error"] == ["true", "config"]


def test_the_secret_is_shown_nowhere(two: tuple[Machines, LLM], expected: list[list[int]]) -> None:
    made, _ = two
    for name, agent in made.agents.items():
        for process in (psutil.Process(agent.pid), *ranks_of(agent)):
            shown = (Path("/proc") / str(process.pid) / "environ").read_bytes()
            assert SECRET.encode() not in shown and b"RYZANSTEIN_SECRET" not in shown
            assert SECRET not in " ".join(process.cmdline())
        assert SECRET not in made.printed(name)
    assert not [path for path in (made.folder / "logs").rglob("*.log") if SECRET in path.read_text()]


def test_what_a_remote_rank_prints_comes_to_the_leader(two: tuple[Machines, LLM], expected: list[list[int]]) -> None:
    """Its end too: the last words of the rank that was killed are in the leader's logs."""
    made, llm = two
    (rank,) = ranks_of(made.agents["b"])
    assert run(llm, lambda: rank.send_signal(signal.SIGKILL)) == expected
    fault = [event for event in llm.orchestrator.status()["events"] if event["kind"] == "fault"][-1]
    assert "SIGKILL" in fault["message"] and fault["rank"] == 1
    until(lambda: llm.orchestrator.status()["state"] == "ready")
    assert "host_lost" not in kinds(llm)


def test_a_machine_that_dies_is_done_without_until_it_is_back(
    two: tuple[Machines, LLM], expected: list[list[int]]
) -> None:
    made, llm = two
    (rank,) = ranks_of(made.agents["b"])
    assert run(llm, made.agents["b"].kill) == expected
    made.agents["b"].wait(20)
    until(lambda: not is_running(rank))
    status = llm.orchestrator.status()
    assert (status["state"], status["width"], status["slots"]) == ("degraded", 1, [0])
    assert run(llm) == expected
    made.start("b", "--reconnect")
    until(lambda: llm.orchestrator.status()["state"] == "ready", 120.0)
    status = llm.orchestrator.status()
    assert (status["width"], status["slots"], status["faults"]) == (2, [0, 1], 2)
    assert "restored" in kinds(llm)
    assert run(llm) == expected


def test_a_connection_that_drops_is_dialed_again(two: tuple[Machines, LLM], expected: list[list[int]]) -> None:
    made, llm = two

    def drop() -> None:
        hosts = llm.orchestrator._supervisor._manager.hosts
        hosts._agents["a"].channel._socket.shutdown(socket.SHUT_RDWR)

    assert run(llm, drop) == expected
    until(lambda: llm.orchestrator.status()["state"] == "ready", 120.0)
    assert made.agents["a"].poll() is None
    assert made.printed("a").count("joined") == 2
    assert run(llm) == expected


def test_a_machine_that_falls_silent_is_out(two: tuple[Machines, LLM], expected: list[list[int]]) -> None:
    """As one that loses its power: the connection stays, and nobody says that the ranks are dead."""
    made, llm = two
    agent = made.agents["b"]
    (rank,) = ranks_of(agent)

    def fall_silent() -> None:
        agent.send_signal(signal.SIGSTOP)
        rank.send_signal(signal.SIGKILL)

    lost = kinds(llm).count("host_lost")
    assert run(llm, fall_silent) == expected
    assert llm.orchestrator.status()["width"] == 1
    assert kinds(llm).count("host_lost") == lost + 1
    agent.send_signal(signal.SIGCONT)
    until(lambda: llm.orchestrator.status()["state"] == "ready", 120.0)
    assert run(llm) == expected


def test_agents_wait_for_the_next_leader(two: tuple[Machines, LLM], expected: list[list[int]]) -> None:
    """The last test with this leader: a second one takes its place and its workers."""
    made, llm = two
    llm.close()
    assert not ranks_of(made.agents["a"])
    another = start(**made.options())
    try:
        assert run(another) == expected
    finally:
        another.close()
    for agent in made.agents.values():
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) in (0, -signal.SIGTERM)


def test_an_agent_ends_with_its_leader_unless_told_otherwise(tmp_path: Path) -> None:
    with nothing_left_behind(), machines(tmp_path) as made:
        agent = made.start("a", "--devices=2")
        llm = start(1, **made.options(num_hosts=1))
        assert len(ranks_of(agent)) == 2
        llm.close()
        assert agent.wait(20) == 0


def test_a_leader_without_machines_says_so(tmp_path: Path) -> None:
    with nothing_left_behind(), machines(tmp_path) as made:
        began = time.monotonic()
        with pytest.raises(ProcessGroupError, match="0 of num_hosts=2.*ryzanstein worker"):
            start(**made.options(timeout_sec=0.5))
        assert time.monotonic() - began < 20.0


def test_an_agent_s_machine_and_the_leader_s_own_work_together(tmp_path: Path) -> None:
    with nothing_left_behind(), machines(tmp_path) as made:
        made.start("a")
        llm = start(**made.options(num_hosts=1, local_devices=1))
        assert len(ranks_of(made.agents["a"])) == 1
        first = run(llm)
        os.kill(ranks_of(made.agents["a"])[0].pid, signal.SIGKILL)
        assert run(llm) == first
        llm.close()
