"""Faults on a serving group of worker processes: when they are seen, when every stream goes on, what is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from bench.harness import draw
from ryzanstein_jax import AsyncLLM, SamplingParams
from ryzanstein_jax.errors import RyzansteinError

STREAMS = 16
_PROMPT = 32  # tokens of each


@dataclass
class Round:
    """One run of all streams.

    Attributes:
        tokens: of each stream.
        errors: what streams ended with.
        arrivals: monotonic seconds of each chunk, by stream.
    """

    tokens: list[list[int]] = field(default_factory=lambda: [[] for _ in range(STREAMS)])
    errors: list[str] = field(default_factory=list)
    arrivals: list[list[float]] = field(default_factory=lambda: [[] for _ in range(STREAMS)])

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def longest_pause(self, since: float) -> float:
        """Seconds from `since` to the next chunk of the stream that waited longest for it."""
        pauses = [next((when - since for when in times if when > since + 0.1), 0.0) for times in self.arrivals]
        return max(pauses)


class Drill:
    """A group of ranks with sixteen streams, and what is done to it.

    Args:
        model, width: what serves.
        max_tokens: length of each stream.
        vocab_size: of the model; prompts are random tokens.
        replicas: how many groups there are.
        caching: of prefixes; without it a replica that takes over finds nothing of an earlier round.
        programs: folder of compiled programs; None is the user's.
        options: of the orchestrator, beside those that let it never give up.
    """

    def __init__(
        self,
        model: str,
        width: int,
        max_tokens: int,
        vocab_size: int,
        *,
        replicas: int = 1,
        caching: bool = True,
        programs: str | None = None,
        **options: Any,
    ):
        self._max_tokens, self._vocab_size = max_tokens, vocab_size
        patient = dict(restart_backoff_sec=0.0, max_restart_attempts=10_000, max_device_failures=10_000)
        began = time.monotonic()
        self.llm = AsyncLLM(
            model,
            executor="processes",
            tensor_parallel_size=width,
            data_parallel_size=replicas,
            enable_prefix_caching=caching,
            compilation_cache_dir=programs,
            max_num_seqs=STREAMS,
            max_num_batched_tokens=256,
            max_model_len=128,
            progress=False,
            orchestrator={**patient, **options},
        )
        self.start_seconds = time.monotonic() - began
        self._expected: dict[int, list[list[int]]] = {}
        self.expected(0)

    def expected(self, number: int) -> list[list[int]]:
        """The tokens of a round that nothing befalls."""
        if number not in self._expected:
            round_ = self.run(number)
            assert not round_.errors, round_.errors
            self._expected[number] = round_.tokens
        return self._expected[number]

    def run(self, number: int, round_: Round | None = None) -> Round:
        """All streams of a round at once, half of them sampled. No other round shares its prompts."""
        round_ = round_ or Round()
        prompts = draw([_PROMPT] * STREAMS, self._vocab_size, seed=number)

        async def one(stream: int, prompt: list[int]) -> None:
            params = SamplingParams(
                temperature=0.8 * (stream % 2), seed=stream, max_tokens=self._max_tokens, ignore_eos=True
            )
            try:
                async for chunk in self.llm.stream(prompt, params):
                    round_.tokens[stream] += chunk.token_ids
                    round_.arrivals[stream].append(time.monotonic())
            except RyzansteinError as error:
                round_.errors.append(repr(error))

        async def everything() -> None:
            await asyncio.gather(*(one(*pair) for pair in enumerate(prompts)))

        asyncio.run(everything())
        return round_

    def strike(self, number: int, act: Callable[[Drill], None], after_tokens: int) -> dict[str, Any]:
        """Runs a round in which `act` happens once so many tokens have come, and says what became of it.

        A standby is ready by then, as it is some seconds after the last fault.
        """
        self.await_standby()
        before = len(self.events("recovered"))
        found = self.disturb(number, act, after_tokens)
        assert len(self.events("recovered")) > before, "there was nothing to recover from"
        recovered = self.events("recovered")[-1]
        found["parts"] = {name: value for name, value in recovered.items() if name.endswith("_seconds")}
        return found | {"requests_replayed": recovered["requests"]}

    def disturb(self, number: int, act: Callable[[Drill], None], after_tokens: int) -> dict[str, Any]:
        """Runs a round in which `act` happens once so many tokens have come, and says what clients saw of it."""
        expected, round_, struck = self.expected(number), Round(), []

        def watch() -> None:
            while round_.num_tokens < after_tokens:
                time.sleep(0.001)
            struck.append(time.monotonic())
            act(self)

        thread = threading.Thread(target=watch)
        thread.start()
        self.run(number, round_)
        thread.join()
        fault = self.events("fault", "probe_failed")[-1]
        return {
            "seconds_to_detect": fault["monotonic"] - struck[0],
            "seconds_to_next_token_of_every_stream": round_.longest_pause(struck[0]),
            "requests_lost": len(round_.errors),
            "requests_with_other_tokens": sum(
                ours != theirs for ours, theirs in zip(round_.tokens, expected, strict=True)
            ),
        }

    def await_standby(self) -> None:
        """Until each group has a standby that is prepared."""
        deadline = time.monotonic() + 120.0
        while not all((one["standby"] or {}).get("prepared") for one in self.groups()):
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.05)

    def await_narrower(self) -> None:
        """Until the programs of the next narrower group are compiled."""
        deadline = time.monotonic() + 600.0
        while not any("narrower group is prepared" in event["message"] for event in self.events("standby")):
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.1)

    def await_ready(self) -> None:
        """Until all groups serve."""
        deadline = time.monotonic() + 120.0
        while not all(replica.is_up for replica in self.llm.replicas):
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.05)

    def groups(self) -> list[dict[str, Any]]:
        """The status of each group."""
        status = self.status()
        return status.get("replicas", [status])

    def pids(self) -> list[int]:
        """Processes of the ranks."""
        return [rank["pid"] for rank in self.status()["health"]["ranks"]]

    def status(self) -> dict[str, Any]:
        assert self.llm.orchestrator is not None
        return self.llm.orchestrator.status()

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """All events of some kinds, oldest first."""
        logs = [replica.orchestrator.events for replica in self.llm.replicas if replica.orchestrator is not None]
        found = [json.loads(event.to_json()) for log in logs for event in log.list() if event.kind in kinds]
        return sorted(found, key=lambda event: event["monotonic"])

    def close(self) -> None:
        self.llm.close()


def kill_rank(rank: int, number: int = signal.SIGKILL) -> Callable[[Drill], None]:
    """Signals one rank."""

    def act(drill: Drill) -> None:
        os.kill(drill.pids()[rank], number)

    return act


def kill_all(drill: Drill) -> None:
    for pid in drill.pids():
        os.kill(pid, signal.SIGKILL)


def kill_rank_and_standby(drill: Drill) -> None:
    """As when the next fault comes before a new standby is ready."""
    for pid in (*drill.status()["standby"]["pids"], drill.pids()[0]):
        os.kill(pid, signal.SIGKILL)


def kill_agent(drill: Drill) -> None:
    """The process that forks the ranks: a new one has to import everything first."""
    os.kill(psutil.Process(drill.pids()[0]).ppid(), signal.SIGKILL)


#: What befalls the group, by name.
FAULTS: dict[str, Callable[[Drill], None]] = {
    "SIGKILL of rank 0": kill_rank(0),
    "SIGKILL of the last rank": kill_rank(-1),
    "SIGKILL of all ranks": kill_all,
    "SIGKILL of rank 0 and the standby": kill_rank_and_standby,
    "SIGKILL of the agent": kill_agent,
    "SIGSTOP of rank 0": kill_rank(0, signal.SIGSTOP),
    "SIGSTOP of the last rank": kill_rank(-1, signal.SIGSTOP),
}
