"""Executors that lose their devices, at chosen calls or whenever some request is in a step; and a client of theirs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np

from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.engine.sequence import sampling_key
from ryzanstein_jax.errors import DeviceStateLostError, RecoveryExhaustedError
from ryzanstein_jax.plan import StepPlan, StepResult
from ryzanstein_jax.request import RequestOutput, SamplingParams
from tests.engine.fake_executor import FakeExecutor, limits, reference


class Restarting(FakeExecutor):
    """Loses its devices at some of its calls of `submit` and `collect`, which are counted together from 0.

    Args:
        deaths: at which calls.
        not_ready: how many calls of `restart` wait in vain, after each death.
        restarts: how often new devices come; after that `restart` raises.
        next_limits: those of the devices after each death; the last ones stay.
    """

    def __init__(
        self,
        machine: ExecutorLimits | None = None,
        *,
        deaths: Collection[int] = (),
        not_ready: int = 0,
        restarts: int = 1000,
        next_limits: Sequence[ExecutorLimits] = (),
    ):
        super().__init__(machine or limits())
        self.deaths, self.not_ready, self.restarts = set(deaths), not_ready, restarts
        self.next_limits = list(next_limits)
        self.num_calls = self.num_deaths = self.num_steps = self._waits = 0
        self.dead = False
        #: What `restart` was told, each time that it was ready.
        self.replayed: list[int] = []

    def die(self) -> None:
        """As a process does: whenever, and whatever it holds is gone."""
        self.dead, self._waits = True, self.not_ready
        self.num_deaths += 1

    def submit(self, plan: StepPlan) -> None:
        self._call()
        self.num_steps += 1
        super().submit(plan)

    def collect(self) -> StepResult:
        self._call()
        return super().collect()

    def _call(self) -> None:
        if not self.dead and self.num_calls in self.deaths:
            self.die()
        self.num_calls += 1
        if self.dead:
            raise DeviceStateLostError("the devices are gone")

    blames_requests = True

    def restart(self, timeout: float, num_requests: int) -> bool:
        assert self.dead, "nothing was lost"
        assert 0 < timeout < 10
        if self._waits:
            self._waits -= 1
            return False
        if len(self.replayed) >= self.restarts:
            raise RecoveryExhaustedError("gave up")
        if self.next_limits:
            self.limits = self.next_limits.pop(0)
        self.replayed.append(num_requests)
        self._forget()
        return True

    def _forget(self) -> None:
        """New devices: an empty cache, no step in flight, steps from 0."""
        self.dead, self.plans, self._results, self._previous = False, [], deque(), None
        self._cache = np.full((self.limits.num_pages, self.limits.page_size, 2), -1, np.int64)


class Poisoned(Restarting):
    """Dies some calls after a step that says so: its devices break while it runs.

    Args:
        breaks: whether a step with these tokens (one list for each of its sequences, from the first token on) does.
    """

    def __init__(self, breaks: Callable[[list[int]], bool], machine: ExecutorLimits | None = None, **more):
        super().__init__(machine, **more)
        self.breaks = breaks

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        for table, position in zip(plan.page_tables, self._last_positions(plan), strict=True):
            seen = self._cache[table].reshape(-1, 2)[: position + 1, 0].tolist()
            if self.breaks(seen):
                # The caller may learn of it when it next submits or when it collects.
                self.die()

    def _last_positions(self, plan: StepPlan) -> list[int]:
        return [int(plan.positions[end - 1]) for end in np.cumsum(plan.query_lens)]


class Client:
    """Adds requests and reads their streams, as a server does, and knows what each must be."""

    def __init__(self, engine: Engine, eos: Collection[int] = (39,), max_length: int = 64):
        self.engine, self.eos, self.max_length = engine, eos, max_length
        self.asked: dict[str, tuple[list[int], SamplingParams]] = {}
        self.streams: dict[str, list[list[int]]] = {}
        self.finished: dict[str, RequestOutput] = {}

    def add(self, name: str, prompt: list[int], **params) -> None:
        params = SamplingParams(**{"max_tokens": 12, "seed": len(self.asked), **params})
        self.engine.add(name, prompt, params)
        self.asked[name] = prompt, params
        self.streams[name] = [[] for _ in range(params.n)]

    def step(self) -> None:
        for output in self.engine.step():
            for stream, completion in zip(self.streams[output.request_id], output.outputs, strict=True):
                assert completion.token_ids[: len(stream)] == stream, "a token that was handed out has changed"
                stream += completion.token_ids[len(stream) :]
            if output.finished:
                assert output.request_id not in self.finished, "a request ended twice"
                self.finished[output.request_id] = output
        self.engine._scheduler.check()

    def run(self, most: int = 3000) -> None:
        for _ in range(most):
            if not self.engine.has_unfinished():
                break
            self.step()
        else:
            raise AssertionError(f"does not end: {self.engine.stats()}")
        stats = self.engine.stats()
        assert stats.num_pages_used == stats.num_running == stats.num_waiting == 0

    def expected(self, name: str, index: int = 0) -> tuple[list[int], str, int | None]:
        prompt, params = self.asked[name]
        key = sampling_key(params.seed, index)
        vocab = self.engine._limits.vocab_size
        return reference(prompt, params, key, eos=self.eos, vocab=vocab, max_length=self.max_length)

    def verify(self, *others: str) -> None:
        """All requests but those named ended with the tokens that they get alone."""
        assert self.finished.keys() == self.asked.keys()
        for name in self.asked.keys() - set(others):
            output = self.finished[name]
            assert output.error is None, name
            for completion in output.outputs:
                found = completion.token_ids, completion.finish_reason, completion.stop_reason
                assert found == self.expected(name, completion.index), name
                assert self.streams[name][completion.index] == completion.token_ids
