"""Faults in a rank: exceptions, memory, a failing device, a rank that is stuck; and what the policy makes of them."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ryzanstein_jax import AsyncLLM, SamplingParams
from ryzanstein_jax.errors import PoisonRequestError, RecoveryExhaustedError, UnsupportedModelError, WeightsError
from ryzanstein_jax.orchestrator.status import FAULT_VARIABLE
from ryzanstein_jax.request import CompletionOutput
from tests.faults import harness
from tests.faults.harness import (
    MODEL,
    OPTIONS,
    SETTINGS,
    Watch,
    await_state,
    ends_of_streams,
    events,
    kill,
    nothing_left_behind,
    pids,
    run_streams,
    same,
)


@pytest.fixture(scope="module")
def expected() -> list[list[CompletionOutput]]:
    """Of an engine in this process, on one device: processes and widths change nothing."""
    llm = AsyncLLM(MODEL, **{**SETTINGS, "tensor_parallel_size": 1})
    try:
        return run_streams(llm)
    finally:
        llm.close()


@pytest.fixture(autouse=True)
def nothing_is_left(
    expected: list[list[CompletionOutput]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with nothing_left_behind(scratch):
        yield


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans faults for ranks that are started from now on."""
    return lambda text: monkeypatch.setenv(FAULT_VARIABLE, text)


#: No other request has them in a row.
POISON = 3 * [125]
#: Few programs, where they have to be compiled.
FEW = dict(max_num_seqs=4, max_num_batched_tokens=16)


def start(**options: Any) -> AsyncLLM:
    settings = {**SETTINGS, **options.pop("settings", {})}
    return AsyncLLM(MODEL, executor="processes", orchestrator={**OPTIONS, **options}, **settings)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("exception:1:1:12", "exception"), ("oom:0:1:12", "out_of_memory"), ("stuck:1:1:12", "hang")],
    ids=["exception", "out of memory", "stuck"],
)
def test_a_step_that_fails_on_one_rank(
    expected: list[list[CompletionOutput]], fault: Any, text: str, kind: str
) -> None:
    fault(text)
    llm = start(step_timeout_sec=5.0)  # no other step may take so long, on a machine with other work either
    same(run_streams(llm), expected)
    (event,) = events(llm, "fault")
    assert event["fault"] == kind
    assert event["rank"] == int(text.split(":")[1])
    assert llm.orchestrator is not None
    limits = llm.orchestrator.limits
    if kind == "out_of_memory":
        # Smaller steps from now on, of the same programs.
        assert llm.orchestrator.state == "degraded"
        assert limits.max_num_seqs == SETTINGS["max_num_seqs"] // 2
    else:
        assert llm.orchestrator.state == "ready"
    llm.close()


def test_out_of_memory_again_halves_the_cache(expected: list[list[CompletionOutput]], fault: Any) -> None:
    """It is too small for sixteen sequences then: some are preempted, and none differs."""
    fault("oom:0:1:12,oom:0:2:5")
    llm = start(settings={**FEW, "num_pages": 41, "tensor_parallel_size": 1})
    same(run_streams(llm), expected)
    assert llm.orchestrator is not None
    limits = llm.orchestrator.limits
    assert (limits.max_num_seqs, limits.num_pages) == (FEW["max_num_seqs"] // 2, 20)
    assert [event["message"].split(":")[0] for event in events(llm, "degraded")][::2] == [
        "shrink_batch",
        "shrink_pages",
    ]
    llm.close()


def test_a_device_that_fails_its_probe(expected: list[list[CompletionOutput]], fault: Any) -> None:
    fault("probe:1:1:0")
    llm = start(health_check_interval_sec=0.1)
    same(run_streams(llm), expected)
    await_state(llm, "ready")
    deadline = time.monotonic() + 20.0
    while not events(llm, "probe_failed") and time.monotonic() < deadline:
        time.sleep(0.05)
    (event,) = events(llm, "probe_failed")
    assert (event["fault"], event["rank"]) == ("device", 1)
    await_state(llm, "ready")
    same(run_streams(llm), expected)
    llm.close()


def test_a_device_that_fails_again_and_again_is_left_out(expected: list[list[CompletionOutput]]) -> None:
    llm = start(max_device_failures=2, settings={"tensor_parallel_size": 3})
    assert llm.orchestrator is not None
    for _ in range(8):  # twice; more where a slow machine tells of the broken collective alone, which is nobody's fault
        same(run_streams(llm, Watch(60, lambda: kill(llm, 1))), expected)
        status = llm.orchestrator.status()
        if status["excluded"]:
            break
    assert (status["state"], status["width"], status["slots"]) == ("degraded", 2, [0, 2])
    assert list(status["excluded"]) == ["1"]
    same(run_streams(llm), expected)
    llm.close()


def test_a_request_that_kills_is_ended_alone(
    expected: list[list[CompletionOutput]], fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever runs beside it, sixteen streams end as if it had never come."""
    requests = harness.requests()
    requests.insert(3, ([*POISON, *range(1, 9)], SamplingParams(max_tokens=28)))
    monkeypatch.setattr(harness, "requests", lambda: requests)
    fault(f"poison:0:-1:{POISON[0]}")
    llm = start()
    found = ends_of_streams(llm)
    assert isinstance(found.pop(3), PoisonRequestError)
    same(found, expected)  # type: ignore[arg-type]
    assert [event["fault"] for event in events(llm, "fault")] == 4 * ["exception"]
    llm.close()


def test_a_rank_that_is_killed_while_a_narrower_group_compiles(
    expected: list[list[CompletionOutput]], tmp_path: Path
) -> None:
    """A device is left out in the middle of all streams, and no program of the width that is left was ever made."""
    hits: list[int] = []

    def programs() -> int:
        return len(list(tmp_path.glob("executables/*.executable")))

    def hunt(known: int) -> None:
        deadline = time.monotonic() + 60.0
        while not hits and time.monotonic() < deadline:
            ranks = status()["health"]["ranks"]
            if len(ranks) == 1 and ranks[0]["phase"] == "loading" and programs() >= known + 3:
                hits.append(ranks[0]["pid"])
                os.kill(ranks[0]["pid"], 9)
            time.sleep(0.0005)

    def strike() -> None:
        kill(llm, 1)
        hunter.start()

    llm = start(max_device_failures=1, settings={**FEW, "compilation_cache_dir": str(tmp_path)})
    assert llm.orchestrator is not None
    status = llm.orchestrator.status
    hunter = threading.Thread(target=hunt, args=(programs(),))
    same(run_streams(llm, Watch(60, strike)), expected)
    hunter.join()
    assert hits and (status()["state"], status()["width"]) == ("degraded", 1)
    llm.close()
    assert not list(tmp_path.glob("executables/.partial*")), "of the programs that were being written"


def test_one_process_for_all_devices(expected: list[list[CompletionOutput]], fault: Any) -> None:
    fault("exception:0:2:3")
    llm = start(process_per_device=False)
    (before,) = pids(llm)
    same(run_streams(llm, Watch(100, lambda: kill(llm, 0))), expected)
    assert llm.orchestrator is not None and llm.orchestrator.width == 2
    assert [event["fault"] for event in events(llm, "fault")] == ["process_death", "exception"]
    assert len(pids(llm)) == 1 and pids(llm) != [before]
    llm.close()


def test_when_no_restart_is_left_every_request_ends_with_an_error(fault: Any) -> None:
    fault("exception:0:-1:3")
    llm = start(max_restart_attempts=2)
    began = time.monotonic()
    with pytest.raises(RecoveryExhaustedError, match="max_restart_attempts"):
        run_streams(llm)
    assert time.monotonic() - began < 60.0
    await_state(llm, "failed")
    with pytest.raises(RecoveryExhaustedError):
        run_streams(llm)
    llm.close()


def test_without_restarts_the_first_fault_is_the_last(fault: Any) -> None:
    fault("exception:1:-1:3")
    llm = start(enable_auto_restart=False)
    with pytest.raises(RecoveryExhaustedError, match="enable_auto_restart"):
        run_streams(llm)
    llm.close()


def test_ranks_that_load_at_their_own_pace_run_the_same_programs(
    expected: list[list[CompletionOutput]], fault: Any
) -> None:
    """After a restart the rest is loaded in calm moments. One rank has loaded all of it, and the other one nothing."""
    fault("lazy:1:2:0")
    llm = start()
    same(run_streams(llm, Watch(60, lambda: kill(llm, 0))), expected)
    assert llm.orchestrator is not None
    group = llm.orchestrator._supervisor._group
    assert group is not None
    deadline = time.monotonic() + 60.0
    while not group.ranks[0].beat.has_loaded and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [rank.beat.has_loaded for rank in group.ranks] == [True, False]
    same(run_streams(llm), expected)
    assert [event["fault"] for event in events(llm, "fault")] == ["process_death"]
    llm.close()


def test_a_start_that_fails_once_is_repeated(expected: list[list[CompletionOutput]], fault: Any) -> None:
    fault("start:1:1:0")
    llm = start()
    assert events(llm, "fault")[0]["fault"] == "start"
    same(run_streams(llm), expected)
    llm.close()


@pytest.mark.parametrize("phase", ["joining", "loading"])
def test_a_rank_that_is_killed_in_the_first_start(
    expected: list[list[CompletionOutput]], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator

    hits: list[int] = []
    initialize = MultiGPUOrchestrator.initialize

    def watched(self: MultiGPUOrchestrator) -> None:
        def hunt() -> None:
            while not hits:
                ranks = self.status()["health"]["ranks"]
                if ranks and ranks[-1]["pid"] > 0 and ranks[-1]["phase"] == phase:
                    hits.append(ranks[-1]["pid"])
                    os.kill(ranks[-1]["pid"], 9)
                time.sleep(0.0005)

        threading.Thread(target=hunt, daemon=True).start()
        initialize(self)

    monkeypatch.setattr(MultiGPUOrchestrator, "initialize", watched)
    llm = start()
    assert hits and hits[0] not in pids(llm)
    same(run_streams(llm), expected)
    llm.close()


def test_what_no_restart_can_mend_is_the_users_error(tmp_path: Any) -> None:
    """The ranks' own typed error comes back at once, and nothing stays behind."""
    shutil.copy(f"{MODEL}/config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(WeightsError):
        AsyncLLM(str(tmp_path), executor="processes", orchestrator=OPTIONS, **SETTINGS)
    (tmp_path / "config.json").write_text('{"architectures": ["Unknown"], "model_type": "unknown"}')
    with pytest.raises(UnsupportedModelError):
        AsyncLLM(str(tmp_path), executor="processes", orchestrator=OPTIONS, **SETTINGS)
