"""Which fault is behind another one: a collective fails on the ranks that live."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ryzanstein_jax.orchestrator import launch
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import Kind
from ryzanstein_jax.orchestrator.rank import Notice

EFFECT = Fault(FaultKind.COLLECTIVE, "connection reset", (0,), is_effect=True, seen=5.0)
DEATH = Fault(FaultKind.PROCESS_DEATH, "killed", (2,))


class Group:
    """Three ranks, and what each `poll` brings, after a moment; in the end nothing more."""

    def __init__(self, *news: Any):
        logs = SimpleNamespace(tail=lambda count: [])
        self.ranks = [SimpleNamespace(rank=rank, logs=logs) for rank in range(3)]
        self.news = list(news)

    def poll(self, timeout: float) -> list[Notice]:
        if not self.news:
            time.sleep(timeout)
            return []
        found = self.news.pop(0)
        if isinstance(found, Fault):
            raise GroupFault(found)
        return found


def error(rank: int, kind: FaultKind) -> Notice:
    return Notice(rank, Kind.ERROR, json.dumps({"kind": kind, "message": "", "type": ""}).encode())


def test_a_death_is_waited_for_and_is_the_cause() -> None:
    group = Group([], [error(1, FaultKind.COLLECTIVE)], [], DEATH)
    found = launch.cause_of(group, EFFECT)
    assert (found.kind, found.ranks, found.seen) == (FaultKind.PROCESS_DEATH, (2,), 5.0)


def test_an_error_behind_another_in_the_same_breath_is_seen() -> None:
    group = Group([error(1, FaultKind.COLLECTIVE), error(2, FaultKind.OUT_OF_MEMORY)])
    assert launch.cause_of(group, EFFECT).kind is FaultKind.OUT_OF_MEMORY


def test_when_all_ranks_tell_of_effects_nothing_is_waited_for() -> None:
    group = Group([error(1, FaultKind.COLLECTIVE)], [error(2, FaultKind.COLLECTIVE)], DEATH)
    assert launch.cause_of(group, EFFECT) is EFFECT and group.news == [DEATH]


def test_the_end_of_a_rank_that_told_is_no_cause() -> None:
    group = Group(Fault(FaultKind.PROCESS_DEATH, "exited with 1", (0,)), DEATH)
    assert launch.cause_of(group, EFFECT).ranks == (2,)


def test_it_is_not_waited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_CAUSE_SECONDS", 0.05)
    assert launch.cause_of(Group(), EFFECT) is EFFECT
    assert launch.cause_of(Group(DEATH), DEATH) is DEATH
