"""Sixteen streams on real worker processes, something that befalls them, and what has to hold afterwards."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ryzanstein_jax import AsyncLLM, SamplingParams
from ryzanstein_jax.request import CompletionOutput
from tests.support import GOLDEN

MODEL = str(GOLDEN / "llama")
SETTINGS: dict[str, Any] = dict(
    tensor_parallel_size=2, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=64, progress=False
)
#: Patient enough for a machine with other work, and never worn out: tests fault the same group again and again.
#: Without a standby: all that can go wrong with a start has to be seen.
OPTIONS: dict[str, Any] = dict(
    max_restart_attempts=1000,
    max_device_failures=1000,
    restart_backoff_sec=0.0,
    health_check_interval_sec=0.5,
    standby=False,
)
NUM_STREAMS = 16


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Greedy and sampled, with log-probabilities, penalties, biases, stops and several completions."""
    kinds = [
        dict(temperature=0.0),
        dict(temperature=0.8, seed=7),
        dict(temperature=0.9, seed=8, logprobs=2),
        dict(temperature=0.0, logprobs=1, prompt_logprobs=1),
        dict(temperature=1.0, seed=9, top_p=0.9, frequency_penalty=0.5),
        dict(temperature=0.7, seed=10, top_k=20, n=2),
        dict(temperature=0.0, stop_token_ids=(70, 71)),
        dict(temperature=0.6, seed=11, min_p=0.05, repetition_penalty=1.1, logit_bias={5: 2.0}),
    ]
    found = []
    for number in range(NUM_STREAMS):
        prompt = [(7 * number + 3 * place) % 120 + 1 for place in range(4 + number)]
        found.append((prompt, SamplingParams(max_tokens=28, ignore_eos=True, **kinds[number % len(kinds)])))
    return found


class Watch:
    """Counts the tokens of all streams, and calls `act` once when there are so many."""

    def __init__(self, when: int, act: Callable[[], None]):
        self._when, self._act, self.count = when, act, 0
        self.done = False

    def note(self, tokens: int) -> None:
        self.count += tokens
        if self.count >= self._when and not self.done:
            self.done = True
            self._act()


def run_streams(llm: AsyncLLM, watch: Watch | None = None) -> list[list[CompletionOutput]]:
    """All requests at once, each a stream; every token arrives exactly once, in order. The first error is raised."""
    found = ends_of_streams(llm, watch)
    for end in found:
        if isinstance(end, BaseException):
            raise end
    return found  # type: ignore[return-value]


def ends_of_streams(llm: AsyncLLM, watch: Watch | None = None) -> list[list[CompletionOutput] | BaseException]:
    """As `run_streams`; errors stand where the outputs of their requests would."""

    async def one(prompt: list[int], params: SamplingParams) -> list[CompletionOutput]:
        seen: dict[int, list[int]] = {}
        output = None
        async for chunk in llm.stream(prompt, params):
            seen.setdefault(chunk.index, []).extend(chunk.token_ids)
            output = chunk.output
            if watch is not None:
                watch.note(len(chunk.token_ids))
        assert output is not None and output.finished
        for completion in output.outputs:
            assert seen[completion.index] == completion.token_ids
        return output.outputs

    async def everything() -> list[list[CompletionOutput] | BaseException]:
        return await asyncio.gather(*(one(*request) for request in requests()), return_exceptions=True)

    return asyncio.run(everything())


def same(found: list[list[CompletionOutput]], expected: list[list[CompletionOutput]]) -> None:
    """Tokens, ends and log-probabilities are those of the undisturbed run."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.token_ids == other.token_ids, f"request {number}"
            assert (mine.finish_reason, mine.stop_reason) == (other.finish_reason, other.stop_reason)
            if other.logprobs is None:
                assert mine.logprobs is None
                continue
            assert mine.logprobs is not None
            for entry, wanted in zip(mine.logprobs, other.logprobs, strict=True):
                assert entry.keys() == wanted.keys()
                for token, logprob in wanted.items():
                    assert abs(entry[token].logprob - logprob.logprob) < 1e-3


def pids(llm: AsyncLLM) -> list[int]:
    """Processes of the ranks, in order."""
    assert llm.orchestrator is not None
    return [rank["pid"] for rank in llm.orchestrator.status()["health"]["ranks"]]


def kill(llm: AsyncLLM, *ranks: int, with_signal: int = signal.SIGKILL) -> None:
    """Signals ranks (negative ones count from the end; none means all), as an operator or the kernel would."""
    found = pids(llm)
    for rank in ranks or range(len(found)):
        os.kill(found[rank], with_signal)


def await_state(llm: AsyncLLM, *states: str, timeout: float = 120.0) -> None:
    assert llm.orchestrator is not None
    deadline = time.monotonic() + timeout
    while llm.orchestrator.state not in states:
        assert time.monotonic() < deadline, llm.orchestrator.status()
        time.sleep(0.02)


def events(llm: AsyncLLM, kind: str) -> list[dict[str, Any]]:
    assert llm.orchestrator is not None
    return [event for event in llm.orchestrator.status()["events"] if event["kind"] == kind]


@contextmanager
def nothing_left_behind(*folders: Path) -> Iterator[None]:
    """No process, descriptor, thread, shared memory or file more than before."""

    def state() -> dict[str, Any]:
        return {
            "children": {child.pid for child in psutil.Process().children(recursive=True)},
            "descriptors": len(os.listdir("/proc/self/fd")),
            "shared memory": set(os.listdir("/dev/shm")),
            "connections": len(psutil.Process().net_connections("tcp")),
            "files": {str(path) for folder in folders for path in folder.rglob("*") if path.name != ".lock"},
        }

    before = state()
    yield
    deadline = time.monotonic() + 5.0
    while True:
        after = state()
        left = {name: (before[name], after[name]) for name in before if not _no_more(after[name], before[name])}
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert not left, f"left behind (before, after): {left}"


def _no_more(after: Any, before: Any) -> bool:
    return bool(after <= before)
