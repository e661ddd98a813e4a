"""A standby takes over after a fault; what befalls the standby itself, no request notices."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ryzanstein_jax import AsyncLLM
from ryzanstein_jax.orchestrator import rehearsal
from ryzanstein_jax.orchestrator import standby as module
from ryzanstein_jax.request import CompletionOutput
from tests.faults.harness import (
    MODEL,
    OPTIONS,
    SETTINGS,
    Watch,
    await_state,
    events,
    kill,
    nothing_left_behind,
    pids,
    run_streams,
    same,
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    folder = tmp_path_factory.mktemp("logs")
    options = {**OPTIONS, "log_dir": str(folder), "standby": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SETTLE_SECONDS", 0.1)
        patch.setattr(module, "_AT_LATEST_SECONDS", 0.2)
        patch.setattr(module, "_BACKOFF_SECONDS", 0.1)
        with nothing_left_behind(folder):
            made = AsyncLLM(MODEL, executor="processes", orchestrator=options, **SETTINGS)
            yield made
            made.close()


@pytest.fixture(scope="module")
def expected(llm: AsyncLLM) -> list[list[CompletionOutput]]:
    return run_streams(llm)


def status(llm: AsyncLLM) -> dict[str, Any]:
    assert llm.orchestrator is not None
    return llm.orchestrator.status()


def standby(llm: AsyncLLM, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The standby, once there is one of which this holds."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        found = status(llm)["standby"]
        if found and len(found["pids"]) == 2 and condition(found):
            return found
        time.sleep(0.001)
    raise AssertionError(status(llm))


def prepared(llm: AsyncLLM, besides: int = 0) -> dict[str, Any]:
    return standby(llm, lambda found: found["prepared"] and found["generation"] != besides)


@pytest.mark.parametrize("ranks", [(0,), (-1,), ()], ids=["first", "last", "all"])
def test_the_standby_takes_over(llm: AsyncLLM, expected: list[list[CompletionOutput]], ranks: tuple[int, ...]) -> None:
    waiting = prepared(llm)
    assert not set(waiting["pids"]) & set(pids(llm))
    same(run_streams(llm, Watch(150, lambda: kill(llm, *ranks))), expected)
    assert pids(llm) == waiting["pids"]
    assert status(llm)["generation"] == waiting["generation"]
    assert "standby take over" in events(llm, "respawned")[-1]["message"]
    assert prepared(llm)["generation"] > waiting["generation"], "another one takes its place"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_standby_that_dies_or_hangs_is_replaced_and_no_request_notices(
    llm: AsyncLLM, expected: list[list[CompletionOutput]], number: int
) -> None:
    waiting, serving, faults = prepared(llm), pids(llm), status(llm)["faults"]
    same(run_streams(llm, Watch(100, lambda: os.kill(waiting["pids"][1], number))), expected)
    prepared(llm, besides=waiting["generation"])
    assert (pids(llm), status(llm)["faults"]) == (serving, faults)
    assert events(llm, "standby")[-2]["severity"] == "warning"


def test_a_standby_that_is_killed_while_it_loads_is_replaced(llm: AsyncLLM) -> None:
    os.kill(prepared(llm)["pids"][0], signal.SIGKILL)
    loading = standby(llm, lambda found: not found["prepared"])
    os.kill(loading["pids"][0], signal.SIGKILL)
    prepared(llm, besides=loading["generation"])


def test_a_standby_that_still_loads_is_not_waited_for(llm: AsyncLLM, expected: list[list[CompletionOutput]]) -> None:
    loading: list[dict[str, Any]] = []

    def strike() -> None:
        os.kill(prepared(llm)["pids"][0], signal.SIGKILL)
        loading.append(standby(llm, lambda found: not found["prepared"]))
        os.kill(loading[0]["pids"][1], signal.SIGSTOP)  # else it might be prepared before the next fault is seen
        kill(llm, 0)

    same(run_streams(llm, Watch(100, strike)), expected)
    same(run_streams(llm), expected)  # the first ones may all have ended before the strike
    assert status(llm)["generation"] > loading[0]["generation"]
    assert not set(loading[0]["pids"]) & set(pids(llm))


def test_both_groups_killed_at_once(llm: AsyncLLM, expected: list[list[CompletionOutput]]) -> None:
    waiting = prepared(llm)

    def strike() -> None:
        for pid in (*waiting["pids"], *pids(llm)):
            os.kill(pid, signal.SIGKILL)

    same(run_streams(llm, Watch(100, strike)), expected)
    assert status(llm)["generation"] > waiting["generation"]
    await_state(llm, "ready")
    prepared(llm)


def test_a_standby_that_stands_still_unnoticed_is_not_waited_for(
    llm: AsyncLLM, expected: list[list[CompletionOutput]]
) -> None:
    """It stops and the group dies at once: the leader finds out that the one that took over hangs."""
    waiting = prepared(llm)

    def strike() -> None:
        os.kill(waiting["pids"][1], signal.SIGSTOP)
        kill(llm, 0)

    same(run_streams(llm, Watch(100, strike)), expected)
    assert status(llm)["generation"] > waiting["generation"]


def test_the_programs_of_a_narrower_group_are_there_before_it_is(
    expected: list[list[CompletionOutput]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SETTLE_SECONDS", "_AT_LATEST_SECONDS"):
        monkeypatch.setattr(module, name, 0.1)
    monkeypatch.setattr(rehearsal, "_QUIET_SECONDS", 0.3)
    few = {**SETTINGS, "max_num_seqs": 4, "max_num_batched_tokens": 16, "compilation_cache_dir": str(tmp_path)}
    with nothing_left_behind():
        llm = AsyncLLM(
            MODEL, executor="processes", orchestrator={**OPTIONS, "standby": True, "max_device_failures": 1}, **few
        )
        deadline = time.monotonic() + 120.0
        while not any("narrower" in event["message"] for event in events(llm, "standby")):
            assert time.monotonic() < deadline, status(llm)
            time.sleep(0.05)
        programs = set(tmp_path.glob("executables/*"))
        same(run_streams(llm, Watch(60, lambda: kill(llm, 1))), expected)
        assert status(llm)["width"] == 1
        made = set(tmp_path.glob("executables/*")) - programs
        assert len(made) <= 1, "only what makes the cache, which a rehearsal does not have"
        llm.close()
