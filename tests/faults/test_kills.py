"""Ranks are killed and stopped, in whatever they do: all streams end with the tokens of an undisturbed run."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ryzanstein_jax import AsyncLLM, PoolingParams
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
from tests.server.serving import wait_until


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    folder = tmp_path_factory.mktemp("logs")
    with nothing_left_behind(folder):
        made = AsyncLLM(MODEL, executor="processes", orchestrator={**OPTIONS, "log_dir": str(folder)}, **SETTINGS)
        yield made
        made.close()


@pytest.fixture(scope="module")
def expected(llm: AsyncLLM) -> list[list[CompletionOutput]]:
    return run_streams(llm)


def test_an_undisturbed_run_repeats(llm: AsyncLLM, expected: list[list[CompletionOutput]]) -> None:
    same(run_streams(llm), expected)


def test_of_a_ranks_threads_only_the_one_of_gloo_gives_way_to_other_programs(llm: AsyncLLM) -> None:
    """Steps all but stand still on a processor that others use too where XLA's own threads do."""
    for pid in pids(llm):
        names, yielding = [], []
        for folder in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # one may end meanwhile
                names.append((folder / "comm").read_text().strip())
                if os.sched_getscheduler(int(folder.name)) == os.SCHED_IDLE:
                    yielding.append(names[-1])
        assert "tf_XLAExecute" in names and len(yielding) == 1 and not yielding[0].startswith("tf_")


@pytest.mark.parametrize("ranks", [(0,), (-1,), ()], ids=["first", "last", "all"])
@pytest.mark.parametrize("tokens", [1, 150], ids=["in prefill", "in decode"])
def test_killed_ranks_are_replaced(
    llm: AsyncLLM, expected: list[list[CompletionOutput]], ranks: tuple[int, ...], tokens: int
) -> None:
    before = pids(llm)
    watch = Watch(tokens, lambda: kill(llm, *ranks))
    same(run_streams(llm, watch), expected)
    assert watch.done and not set(before) & set(pids(llm))
    recovered = events(llm, "recovered")[-1]
    assert recovered["requests"] > 0 and recovered["seconds"] > 0


def test_embeddings_go_on_too(llm: AsyncLLM) -> None:
    prompts = [[(5 * number + 3 * place) % 120 + 1 for place in range(1 + number % 60)] for number in range(300)]

    async def embed(act: Callable[[], None]) -> list[np.ndarray]:
        kinds = [PoolingParams(pooling=pooling) for pooling in ("last", "mean")]
        waiting = [asyncio.create_task(llm.embed(prompt, kinds[len(prompt) % 2])) for prompt in prompts]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        act()
        return [output.embedding for output in await asyncio.gather(*waiting)]

    wanted = asyncio.run(embed(lambda: None))
    before = pids(llm)
    found = asyncio.run(embed(lambda: kill(llm, 1)))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert not set(before) & set(pids(llm)) and events(llm, "recovered")[-1]["requests"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_replaced(llm: AsyncLLM, expected: list[list[CompletionOutput]], rank: int) -> None:
    stopped: list[float] = []

    def stop() -> None:
        stopped.append(time.monotonic())
        kill(llm, rank, with_signal=signal.SIGSTOP)

    same(run_streams(llm, Watch(100, stop)), expected)
    fault = events(llm, "fault")[-1]
    assert (fault["fault"], fault["rank"]) == ("hang", rank)
    assert fault["monotonic"] - stopped[0] < 10.0


def test_a_rank_that_dies_while_nothing_runs_is_replaced_at_once(
    llm: AsyncLLM, expected: list[list[CompletionOutput]]
) -> None:
    before, known, killed = pids(llm), events(llm, "fault"), time.monotonic()
    kill(llm, 1)
    wait_until(lambda: events(llm, "fault")[-1:] != known[-1:])
    assert events(llm, "fault")[-1]["monotonic"] - killed < 1.0
    await_state(llm, "ready")
    assert not set(before) & set(pids(llm))
    same(run_streams(llm), expected)


@pytest.mark.parametrize("phase", ["joining", "loading"])
def test_a_rank_that_dies_during_recovery(llm: AsyncLLM, expected: list[list[CompletionOutput]], phase: str) -> None:
    assert llm.orchestrator is not None
    generation = llm.orchestrator.status()["generation"]
    hits: list[int] = []

    def again() -> None:
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline and not hits:
            health = llm.orchestrator.status()["health"]  # type: ignore[union-attr]
            rank = health["ranks"][-1] if health["ranks"] else None
            if health["generation"] > generation and rank and rank["phase"] == phase and rank["pid"] > 0:
                hits.append(rank["pid"])
                os.kill(rank["pid"], signal.SIGKILL)
            time.sleep(0.001)

    second = threading.Thread(target=again)

    def first() -> None:
        kill(llm, 0)
        second.start()

    same(run_streams(llm, Watch(100, first)), expected)
    second.join()
    assert hits
    assert llm.orchestrator.status()["generation"] >= generation + 2


def test_killing_again_and_again_convicts_nobody(llm: AsyncLLM, expected: list[list[CompletionOutput]]) -> None:
    """More often than a request may lose the devices by its own doing, each time before any has got a token."""
    assert llm.orchestrator is not None
    killed: list[int] = []

    def again() -> None:
        deadline = time.monotonic() + 60.0
        while len(killed) < 6 and time.monotonic() < deadline:
            health = llm.orchestrator.status()["health"]  # type: ignore[union-attr]
            ranks = health["ranks"]
            if ranks and health["steps_running"] and ranks[0]["pid"] not in killed and ranks[0]["pid"] > 0:
                killed.append(ranks[0]["pid"])
                os.kill(ranks[0]["pid"], signal.SIGKILL)
            time.sleep(0.0005)

    thread = threading.Thread(target=again)
    thread.start()
    same(run_streams(llm), expected)
    thread.join()
    assert len(killed) == 6


def test_the_agent_that_dies_is_replaced_with_its_ranks(llm: AsyncLLM, expected: list[list[CompletionOutput]]) -> None:
    def kill_agent() -> None:
        (parent,) = {_parent(pid) for pid in pids(llm)}
        os.kill(parent, signal.SIGKILL)

    same(run_streams(llm, Watch(100, kill_agent)), expected)


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return int(file.read().rpartition(")")[2].split()[1])
