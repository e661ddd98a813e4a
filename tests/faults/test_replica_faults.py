"""Two replicas of one worker process each: whoever dies, the other one goes on with all streams at once."""

import asyncio
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ryzanstein_jax import AsyncLLM, SamplingParams
from ryzanstein_jax.engine.sequence import drawn_seed
from ryzanstein_jax.errors import RecoveryExhaustedError, WeightsError
from ryzanstein_jax.replicas import Replica
from ryzanstein_jax.request import CompletionOutput
from tests.faults.harness import (
    MODEL,
    OPTIONS,
    SETTINGS,
    Watch,
    await_state,
    nothing_left_behind,
    run_streams,
    same,
)
from tests.server.serving import wait_until

#: Few programs: each replica compiles for the processors that it gets.
SINGLE = {**SETTINGS, "tensor_parallel_size": 1, "max_num_seqs": 4, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def expected() -> list[list[CompletionOutput]]:
    one = AsyncLLM(MODEL, **{**SETTINGS, "tensor_parallel_size": 1})
    found = run_streams(one)
    one.close()
    return found


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    folder = tmp_path_factory.mktemp("logs")
    with nothing_left_behind(folder):
        options = {**OPTIONS, "log_dir": str(folder)}
        made = AsyncLLM(MODEL, executor="processes", orchestrator=options, data_parallel_size=2, **SINGLE)
        yield made
        made.close()


def pid(replica: Replica) -> int:
    assert replica.orchestrator is not None
    return replica.orchestrator.status()["health"]["ranks"][0]["pid"]


def kill(*replicas: Replica) -> Callable[[], None]:
    return lambda: [os.kill(pid(replica), signal.SIGKILL) for replica in replicas] and None


def kinds(replica: Replica) -> list[str]:
    assert replica.orchestrator is not None
    return [event.kind for event in replica.orchestrator.events.list()]


def await_all(llm: AsyncLLM) -> None:
    wait_until(lambda: all(replica.is_up for replica in llm.replicas), 60)


def rest(llm: AsyncLLM) -> None:
    """Nothing runs any more, and no page is held."""
    await_all(llm)
    assert all(replica.stats().num_pages_used == 0 for replica in llm.replicas)
    assert llm._replicas.router.loads == [0, 0]


def test_two_replicas_give_what_one_gives(llm: AsyncLLM, expected: list[list[CompletionOutput]]) -> None:
    same(run_streams(llm), expected)
    assert all(replica.stats().num_steps > 20 for replica in llm.replicas)
    assert llm.orchestrator is not None
    status = llm.orchestrator.status()
    assert (status["width"], status["configured_width"], len(status["replicas"])) == (2, 2, 2)
    assert [(rank["replica"], rank["rank"], rank["slot"]) for rank in status["health"]["ranks"]] == [
        (0, 0, 0),
        (1, 0, 1),
    ]
    assert [list(one["hosts"].values()) for one in status["replicas"]] == [[1], [1]]
    # On a CPU they share the memory and the processors of one machine.
    first, second = (set(psutil.Process(pid(replica)).cpu_affinity()) for replica in llm.replicas)
    assert not first & second or len(os.sched_getaffinity(0)) == 1
    assert llm.report.memory.budget == llm.report.memory.total // 8
    rest(llm)


@pytest.mark.parametrize(("dies", "tokens"), [(0, 1), (0, 150), (1, 150)])
def test_streams_of_a_killed_one_move_at_once_and_it_returns(
    llm: AsyncLLM, expected: list[list[CompletionOutput]], dies: int, tokens: int
) -> None:
    struck, other = llm.replicas[dies], llm.replicas[1 - dies]
    before, seen = pid(struck), len(kinds(struck))
    counted = [struck.metrics.counter("requests_moved"), moves(other)]
    watch = Watch(tokens, kill(struck))
    same(run_streams(llm, watch), expected)
    moved = struck.metrics.counter("requests_moved") - counted[0]
    assert watch.done and moved > 0 and moves(other) - counted[1] == moved
    await_all(llm)
    # Who had waited for new devices would have been replayed on them.
    since = kinds(struck)[seen:]
    assert {"fault", "moved", "respawned", "ready"} <= set(since) and "replayed" not in since
    assert "fault" not in kinds(other)[-3:] and pid(struck) != before
    steps = struck.stats().num_steps
    same(run_streams(llm), expected)
    assert struck.stats().num_steps > steps + 20, "it serves again"
    rest(llm)


def moves(replica: Replica) -> int:
    found = replica.metrics.snapshot()["histograms"].get("move_seconds")
    return found["count"] if found else 0


def test_where_both_die_all_wait_for_the_first_that_returns(
    llm: AsyncLLM, expected: list[list[CompletionOutput]]
) -> None:
    before = [pid(replica) for replica in llm.replicas]
    same(run_streams(llm, Watch(150, kill(*llm.replicas))), expected)
    await_all(llm)
    assert not {*before} & {pid(replica) for replica in llm.replicas}
    rest(llm)


def test_one_that_dies_while_nothing_runs_is_left_out_until_it_is_back(
    llm: AsyncLLM, expected: list[list[CompletionOutput]]
) -> None:
    kill(llm.replicas[0])()
    await_state(llm, "degraded")
    moved = llm.replicas[0].metrics.counter("requests_moved")
    same(run_streams(llm), expected)
    await_all(llm)
    same(run_streams(llm), expected)
    assert llm.replicas[0].metrics.counter("requests_moved") == moved
    rest(llm)


def test_who_leaves_frees_pages_where_they_are(llm: AsyncLLM) -> None:
    async def some_leave() -> None:
        params = SamplingParams(max_tokens=58, ignore_eos=True, temperature=0)
        streams = [llm.stream([number + 1] * 5, params) for number in range(6)]
        begun = asyncio.gather(*(anext(stream) for stream in streams))
        used: set[int] = set()
        while len(used) < 2:
            used |= {replica.number for replica in llm.replicas if replica.stats().num_pages_used}
            await asyncio.sleep(0.001)
        await begun
        await asyncio.gather(*(stream.aclose() for stream in streams))
        for _ in range(500):
            if not any(replica.stats().num_pages_used for replica in llm.replicas):
                return
            await asyncio.sleep(0.01)

    asyncio.run(some_leave())
    rest(llm)


def test_requests_without_a_seed_draw_those_of_one_engine(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def several(*seeds: int | None) -> list[list[int]]:
        kinds = [SamplingParams(max_tokens=8, ignore_eos=True, seed=seed) for seed in seeds]
        return [(await llm.generate([5, 7, 9], params)).outputs[0].token_ids for params in kinds]

    monkeypatch.setattr(llm, "_seeds", itertools.count())
    drawn = asyncio.run(several(None, None, None, None))
    assert drawn == asyncio.run(several(*(drawn_seed(0, number) for number in range(4))))
    assert len({tuple(tokens) for tokens in drawn}) == 4


def test_requests_of_one_that_failed_for_good_go_on_too(expected: list[list[CompletionOutput]]) -> None:
    options: dict[str, Any] = {**OPTIONS, "enable_auto_restart": False}
    llm = AsyncLLM(MODEL, executor="processes", orchestrator=options, data_parallel_size=2, **SINGLE)
    try:
        same(run_streams(llm, Watch(150, kill(llm.replicas[1]))), expected)
        await_state(llm, "degraded")
        same(run_streams(llm), expected)
        assert llm.orchestrator is not None and llm.orchestrator.is_watched and llm.orchestrator.width == 1
        assert "replica 1: gave up" in llm.orchestrator.status()["failure"]
        with pytest.raises(RecoveryExhaustedError):
            run_streams(llm, Watch(150, kill(llm.replicas[0])))
        assert llm.orchestrator.state == "failed" and not llm.orchestrator.is_watched
        with pytest.raises(RecoveryExhaustedError):
            asyncio.run(llm.generate([1, 2, 3]))
    finally:
        llm.close()


def test_a_model_that_no_replica_can_load_is_the_users_error(tmp_path: Path) -> None:
    shutil.copy(f"{MODEL}/config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with nothing_left_behind(), pytest.raises(WeightsError):
        AsyncLLM(str(tmp_path), executor="processes", orchestrator=OPTIONS, data_parallel_size=2, **SINGLE)
