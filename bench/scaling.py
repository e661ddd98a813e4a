"""The same work on groups of devices, one core each, in turns; and what of it is communication."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import psutil

from bench.harness import WrongResult, draw
from bench.machine import num_cores, other_cpu_seconds
from bench.protocol import Worker
from ryzanstein_jax.collectives.job import Job, run_job

T = TypeVar("T")
Steps = list[dict[str, Any]]
#: What a group is called: its width, or what else it differs in.
Key = int | str

#: What `ryzanstein_jax.collectives` calls the collectives of a compiled program that it has another name for.
_OPERATIONS = {"collective-permute": "send-recv"}
#: Least share of the requests whose first token has to be the same at all widths; others are ties.
_SAME = 0.9
#: Most of the processors that anything else may take in a round that counts. It hits the widths unequally: one device
#: leaves other cores to it, and with all cores taken it stands between ranks that wait for each other.
_QUIET = 0.1
TRIES = 3


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together, and which of their steps count.

    Attributes:
        name: for people.
        requests: (how many, tokens in, tokens out).
        decodes: of a step that counts.
        prefill: whether a step that counts computes prompt tokens.
    """

    name: str
    requests: tuple[tuple[int, int, int], ...]
    decodes: int
    prefill: bool

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        return draw([length for count, length, _ in self.requests for _ in range(count)], vocab_size, seed)

    @property
    def max_tokens(self) -> list[int]:
        return [out for count, _, out in self.requests for _ in range(count)]

    def counted(self, steps: Steps) -> Steps:
        """The steps that count.

        Raises:
            WrongResult: there are none.
        """
        found = [s for s in steps if s["asked_decodes"] == self.decodes and bool(s["asked_prefill"]) == self.prefill]
        if not found:
            raise WrongResult(f"{self.name}: no step of the kind that counts in {len(steps)} steps")
        return found


@contextmanager
def cores(chosen: Sequence[int]) -> Iterator[None]:
    """What is started meanwhile runs on these cores, by their place among those that this process may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[place] for place in chosen})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Group:
    """An engine on as many cores as it has devices, whose processes stand still unless it is its turn.

    Args:
        width: devices.
        settings: of the engine.
        key: what it is called in `Rounds`; None: its width.
    """

    def __init__(self, width: int, settings: Mapping[str, Any], key: Key | None = None):
        self.width, self.key = width, width if key is None else key
        with cores(range(width)):
            self._worker = Worker(sys.executable, "bench.scaling_worker")
        try:
            self._worker.call("start", **settings, tensor_parallel_size=width)
            self.description = self._worker.call("describe")
        except BaseException:
            self._worker.close()
            raise
        self._stopped: list[psutil.Process] = []

    def run(self, workload: Workload, prompts: list[list[int]]) -> tuple[list[list[int]], Steps]:
        """Tokens, and the steps that count."""
        self.wake()
        try:
            reply = self._worker.call("steps_of", prompts=prompts, max_tokens=workload.max_tokens)
        finally:
            self.sleep()
        return reply["tokens"], workload.counted(reply["steps"])

    def sleep(self) -> None:
        """Stops all of its processes: ranks that wait for work still poll, and would take from the others' cores."""
        leader = psutil.Process(self._worker.pid)
        self._stopped = [leader, *leader.children(recursive=True)]
        for process in self._stopped:
            process.suspend()

    def wake(self) -> None:
        for process in reversed(self._stopped):
            process.resume()
        self._stopped = []

    def close(self) -> None:
        self.wake()
        self._worker.close()


@contextmanager
def groups(chosen: Sequence[tuple[Key, int, Mapping[str, Any]]]) -> Iterator[list[Group]]:
    """A group for each key, width and settings."""
    with ExitStack() as stack:
        made = []
        for key, width, settings in chosen:
            made.append(stack.enter_context(closing(Group(width, settings, key))))
            made[-1].sleep()
        yield made


@dataclass
class Rounds:
    """What was measured: by workload and group, one entry a round. The first group is the one to compare with.

    Attributes:
        steps: the counted steps of each round.
        first_tokens, same: first tokens that were compared with those of the first group, and those that were equal.
        disturbed: by workload, rounds in which something else took more than `_QUIET` of the processors.
        only_disturbed: workloads of which no other round was to be had, so that these are what is counted.
    """

    steps: dict[str, dict[Key, list[Steps]]]
    first_tokens: int = 0
    same: int = 0
    disturbed: dict[str, int] = field(default_factory=dict)
    only_disturbed: list[str] = field(default_factory=list)

    def all_steps(self, key: Key) -> Steps:
        return [step for runs in self.steps.values() for steps in runs[key] for step in steps]

    def seconds(self, workload: str, key: Key) -> list[float]:
        """Mean time of a step, by round."""
        return [statistics.fmean(step["seconds"] for step in steps) for steps in self.steps[workload][key]]

    def speedups(self, workload: str, key: Key) -> list[float]:
        """Time of the first group over that of this one, by round."""
        first = next(iter(self.steps[workload]))
        pairs = zip(self.seconds(workload, first), self.seconds(workload, key), strict=True)
        return [one / other for one, other in pairs]


def quietly(run: Callable[[], T], tries: int = TRIES) -> tuple[T, float]:
    """What a measurement gives, and what share of the processors everything else took.

    It is repeated while that is more than `_QUIET`, up to `tries` times in all; then the quietest counts. What it
    starts has to live on, or to have been waited for.
    """
    found: list[tuple[float, T]] = []
    while len(found) < tries and (not found or found[-1][0] > _QUIET):
        began, others = time.perf_counter(), other_cpu_seconds()
        result = run()
        share = (other_cpu_seconds() - others) / (time.perf_counter() - began) / num_cores()
        found.append((max(share, 0.0), result))
    share, result = min(found, key=lambda pair: pair[0])
    return result, share


def measure(
    made: Sequence[Group], workloads: Sequence[Workload], runs: int, vocab_size: int, tries: int = TRIES
) -> Rounds:
    """All groups in turns on the same prompts, after a round that does not count; each round begins with another.

    Rounds in which something else had the processors are repeated, up to `tries` times as many as `runs` in all.

    Raises:
        WrongResult: a completion has another length, too many first tokens differ, or groups took other steps.
    """
    rounds = Rounds({workload.name: {group.key: [] for group in made} for workload in workloads})
    reference = made[0].key
    disturbed: dict[str, list[dict[Key, Steps]]] = {workload.name: [] for workload in workloads}
    for run in range(tries * runs + 1):
        for number, workload in enumerate(workloads):
            counted = rounds.steps[workload.name]
            if len(counted[reference]) == runs:
                continue
            prompts = workload.prompts(vocab_size, 1000 * number + run)
            first = run % len(made)
            tokens: dict[Key, list[list[int]]] = {}
            taken: dict[Key, Steps] = {}
            began, others = time.perf_counter(), other_cpu_seconds()
            for group in [*made[first:], *made[:first]]:
                tokens[group.key], taken[group.key] = group.run(workload, prompts)
            share = (other_cpu_seconds() - others) / (time.perf_counter() - began) / num_cores()
            _compare(workload, reference, tokens, taken, rounds)
            if run and share > _QUIET:
                disturbed[workload.name].append(taken)
            elif run:
                for key, steps in taken.items():
                    counted[key].append(steps)
    for name, found in disturbed.items():
        rounds.disturbed[name] = len(found)
        if not rounds.steps[name][reference]:  # better than nothing, and told
            rounds.steps[name] = {group.key: [taken[group.key] for taken in found] for group in made}
            rounds.only_disturbed.append(name)
    if rounds.same < _SAME * rounds.first_tokens:
        raise WrongResult(f"only {rounds.same} of {rounds.first_tokens} first tokens are those of {reference}")
    return rounds


def _compare(
    workload: Workload,
    reference: Key,
    tokens: Mapping[Key, list[list[int]]],
    taken: Mapping[Key, Steps],
    rounds: Rounds,
) -> None:
    asked = [(step["asked_decodes"], step["asked_prefill"]) for step in taken[reference]]
    for key, rows in tokens.items():
        if [len(row) for row in rows] != workload.max_tokens:
            raise WrongResult(f"{workload.name} at {key}: completions of {[len(row) for row in rows]} tokens")
        if [(step["asked_decodes"], step["asked_prefill"]) for step in taken[key]] != asked:
            raise WrongResult(f"{workload.name}: other steps at {key} than at {reference}")
        if key != reference:
            rounds.first_tokens += len(rows)
            rounds.same += sum(row[0] == one[0] for row, one in zip(rows, tokens[reference], strict=True))


# --- what communication costs, and predictions


def collective_fits(
    steps: Steps, width: int, dtype: str, budget: float, tries: int = TRIES
) -> dict[str, dict[str, float]]:
    """alpha and beta of each collective of the steps, over their range of sizes; nothing at width 1.

    Measured between as many processes as the group has ranks, on the same cores, one each. `cpu_share_of_others` of
    each is what everything else took meanwhile.
    """
    sizes: dict[str, set[int]] = {}
    for step in steps:
        for kind, size, group, _ in step["collectives"]:
            sizes.setdefault(_OPERATIONS.get(kind, kind), set()).add(_buffer(kind, size, group))
    found: dict[str, dict[str, float]] = {}
    for operation, all_sizes in sizes.items():
        least = max(min(all_sizes), 4)
        most = max(*all_sizes, 4 * least)
        job = Job(width, 1, (operation,), least, most, dtype=dtype, budget=budget)
        with cores(range(width)):
            result, share = quietly(partial(run_job, job), tries)
        found[operation] = {**result["fits"][operation], "cpu_share_of_others": round(share, 3)}
    return found


def communication_seconds(steps: Steps, fits: Mapping[str, Mapping[str, float]]) -> float:
    """Estimate of what the collectives of a step take, the mean of these steps: alpha + beta x bytes of each."""
    total = 0.0
    for step in steps:
        for kind, size, group, count in step["collectives"]:
            fit = fits[_OPERATIONS.get(kind, kind)]
            total += count * (fit["alpha"] + fit["beta"] * _buffer(kind, size, group))
    return total / len(steps)


def _buffer(kind: str, size: int, group: int) -> int:
    """Bytes of the larger of a device's two buffers, by which collectives are measured."""
    return size * group if kind == "reduce-scatter" else size


def check_widths(widths: Sequence[int]) -> list[int]:
    """Width 1 and those that were asked for, or all powers of two that there are cores for.

    Raises:
        ValueError: there are fewer cores: devices that share one say nothing about scaling.
    """
    most = num_cores()
    if list(widths) == [1]:
        widths = [2**power for power in range(most.bit_length()) if 2**power <= most]
    if max(widths) > most:
        raise ValueError(f"--tp {max(widths)}: one core per device, and this process may use {most}")
    return sorted({1, *widths})
