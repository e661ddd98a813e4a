"""A narrower group: which width it has, and how its programs are there before it is needed."""

import pytest

from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.errors import MemoryBudgetError
from ryzanstein_jax.orchestrator import standby as module
from ryzanstein_jax.orchestrator.capacity import Capacity
from ryzanstein_jax.orchestrator.devices import DeviceReport
from ryzanstein_jax.orchestrator.fault import Fault
from ryzanstein_jax.orchestrator.frames import Kind
from ryzanstein_jax.orchestrator.rehearsal import Rehearsal
from tests.orchestrator.test_standby import DEATH, Group, Stage, capacity
from tests.support import golden_spec


def sized(slot: int, memory_bytes: int) -> DeviceReport:
    return DeviceReport(slot, "gpu", "x", memory_bytes, f"host {slot}", slot, "")


def test_a_width_that_the_model_has_not_or_does_not_fit_is_passed_over():
    made, six = capacity(tensor_parallel_size=6, sharding="output", num_pages=9, memory_fraction=1.0), tuple(range(6))
    assert made.choose(six) == six
    made.check_fit(six, [sized(slot, 100_000) for slot in six])  # all weights are larger than that
    assert made.can_exclude((1,), 6)
    made.exclude(1, "it died three times")
    assert made.choose(six) == (0, 2, 3, 4), "five do not divide the hidden size of 48"
    assert made.widest(six) == 4, "and no wider group is waited for"
    for slot in (2, 3, 4):
        assert made.can_exclude((slot,), len(made.choose(six)))
        made.exclude(slot, "it died too")
    assert made.choose(six) == (0, 5) and not made.can_exclude((5,), 2)
    made.exclude(5, "it went with its machine")
    with pytest.raises(MemoryBudgetError, match="does not fit"):
        made.choose(six)
    assert made.widest(six) == 0


class Quiet(Stage):
    """A rehearsal of the width that is left without one of three devices, on the same made-up groups and clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, least: int = 1):
        super().__init__(monkeypatch)
        options = OrchestratorConfig(min_tensor_parallel_size=least)
        capacity = Capacity(golden_spec("llama"), EngineConfig("m", tensor_parallel_size=3, num_pages=9), options)
        capacity.choose((0, 1, 2))
        capacity.check_fit((0, 1, 2), [sized(slot, 1 << 30) for slot in range(3)])
        self.rehearsal = Rehearsal(options, self.events, self.launch, capacity)
        self.slots: list[tuple[int, ...]] = []

    def launch(self, slots: tuple[int, ...]) -> Group:
        self.slots.append(slots)
        return super().launch(slots)

    def tend(self, seconds: float = 0.0, *said: Kind | Fault, idle: float = 9.0, serving: tuple = (0, 1, 2)) -> None:
        self.now += seconds
        for what in said:
            self.groups[-1].said.append(what) if isinstance(what, Fault) else self.groups[-1].say(what)
        self.rehearsal.tend(serving, idle)


def test_in_a_quiet_moment_a_narrower_group_compiles_and_ends(monkeypatch):
    quiet = Quiet(monkeypatch)
    quiet.tend(1.0, idle=4.9)
    assert not quiet.groups
    quiet.tend(0.2, idle=5.1)
    assert quiet.slots == [(0, 1)]
    quiet.tend(0.0, Kind.HELLO)
    assert quiet.groups[0].told == [Kind.PREPARE]
    quiet.tend(30.0)
    assert not quiet.groups[0].killed
    quiet.tend(0.0, Kind.PREPARED)
    assert quiet.groups[0].killed and "a narrower group is prepared" in quiet.events.list()[-1].message
    quiet.tend(1000.0)
    assert len(quiet.groups) == 1, "once"
    quiet.tend(0.0, serving=(0, 2))
    assert quiet.slots[1:] == [(0,)], "the next width is another matter"


def test_a_request_ends_it_and_the_next_quiet_moment_goes_on(monkeypatch):
    quiet = Quiet(monkeypatch)
    quiet.tend(0.0)
    quiet.tend(0.0, Kind.HELLO)
    quiet.tend(1.0, idle=0.0)
    assert quiet.groups[0].killed
    quiet.tend(1.0, idle=1.0)
    assert len(quiet.groups) == 1
    quiet.tend(9.0)
    assert len(quiet.groups) == 2 and not quiet.groups[1].killed
    quiet.tend(0.0, DEATH)
    assert quiet.groups[1].killed
    quiet.tend(1.0)
    assert len(quiet.groups) == 2, "after a failure it is tried later"


def test_nothing_is_rehearsed_where_it_would_never_be_played(monkeypatch):
    for quiet, serving in ((Quiet(monkeypatch), (0,)), (Quiet(monkeypatch, least=3), (0, 1, 2))):
        quiet.tend(0.0, serving=serving)
        assert not quiet.groups
    monkeypatch.setattr(module, "_available_bytes", lambda: (2 << 30) - 1)
    full = Quiet(monkeypatch)
    full.tend(0.0)
    assert not full.groups
