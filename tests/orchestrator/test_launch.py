"""Bringing a group up: what its ranks say is checked, what they do not say in time is a fault, whatever they say."""

import dataclasses
import json
import os
import threading
import time
from types import SimpleNamespace

import pytest

from ryzanstein_jax.budget import MemoryPlan
from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.engine.report import SetupReport
from ryzanstein_jax.orchestrator import slots
from ryzanstein_jax.orchestrator.devices import DeviceReport
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import Kind
from ryzanstein_jax.orchestrator.launch import Launch, fault_if_error, rank_config
from ryzanstein_jax.orchestrator.process_group import Notice
from ryzanstein_jax.orchestrator.slots import visible_slots
from tests.engine.fake_executor import limits

CONFIG = EngineConfig("none", tensor_parallel_size=2)
LIMITS = dataclasses.asdict(limits())
READY = {
    "limits": LIMITS,
    "report": SetupReport("cpu", "float32", MemoryPlan(*range(1, 9)), {}, 0.1, 0.2, 3, 3).to_json(),
    "counters": {"compiles": 4},
}


def device(rank: int = 0, platform: str = "cpu", host: str = "here") -> DeviceReport:
    return DeviceReport(index=0, platform=platform, kind="x", memory_bytes=1 << 30, host=host, rank=rank)


def hello(rank: int, **changes) -> dict:
    return {"rank": rank, "generation": 1, "devices": [device(rank).to_json()], **changes}


class Group:
    """Two ranks that say what is in a script: a list of notices for each poll."""

    generation = 1

    def __init__(self, *script: list[tuple[int, Kind, object]]):
        self.ranks = [
            SimpleNamespace(rank=rank, logs=SimpleNamespace(tail=lambda count, rank=rank: [f"log of {rank}"][:count]))
            for rank in (0, 1)
        ]
        self.script, self.told = list(script), []

    def poll(self, timeout: float) -> list[Notice]:
        said = self.script.pop(0) if self.script else []
        return [
            Notice(rank, kind, value if isinstance(value, bytes) else json.dumps(value).encode())
            for rank, kind, value in said
        ]

    def tell(self, kind: Kind, value: object) -> None:
        self.told.append((kind, value))


def launch(group: Group, *, fault: Fault | None = None, closing: bool = False, timeout: float = 5.0) -> Launch:
    options = OrchestratorConfig(timeout_sec=timeout)
    return Launch(group, SimpleNamespace(check=lambda: fault), options, lambda: closing)


def load(*script, progress=lambda what, done, total: None):
    return launch(Group(*script)).load(CONFIG, progress)


# -- Joining


def test_devices_come_in_the_order_of_ranks():
    group = Group([(1, Kind.HELLO, hello(1))], [], [(0, Kind.PROGRESS, {}), (0, Kind.HELLO, hello(0))])
    assert [report.rank for report in launch(group).join()] == [0, 1]


def test_what_ranks_communicate_by_is_kept_and_bounded():
    settings = [["NCCL_DEBUG", "WARN", "default"], ["NCCL_ALGO", None, "absent"]]
    first, second = hello(0, communication=settings), hello(1, communication=[["x" * 999, "y", "z"]] * 999)
    made = launch(Group([(0, Kind.HELLO, first), (1, Kind.HELLO, second)]))
    made.join()
    assert made.communication["0"] == settings
    assert len(made.communication["1"]) == 200
    assert made.communication["1"][0] == ["x" * 300, "y", "z"]


@pytest.mark.parametrize(
    "greeting",
    [
        hello(0),
        hello(1, generation=2),
        hello(1, devices=["{}"]),
        hello(1, devices=[3]),
        hello(1, devices=7),
        hello(1, communication=[[1, 2]]),
        hello(1, communication=3),
        hello(1, communication={}),
        {"rank": 1},
        {},
    ],
    ids=["rank", "generation", "device", "type", "list", "pairs", "number", "object", "less", "nothing"],
)
def test_who_greets_wrongly_is_a_fault(greeting):
    with pytest.raises(GroupFault, match="greets wrongly") as caught:
        launch(Group([(0, Kind.HELLO, hello(0)), (1, Kind.HELLO, greeting)])).join()
    assert (caught.value.fault.kind, caught.value.fault.ranks) == (FaultKind.START, (1,))


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.ERROR])
@pytest.mark.parametrize("payload", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_a_fault_of_its_rank(kind, payload):
    with pytest.raises(GroupFault, match="what no rank sends") as caught:
        launch(Group([(1, kind, payload)])).join()
    assert caught.value.fault.ranks == (1,)


def test_who_does_not_come_in_time_is_named():
    with pytest.raises(GroupFault, match=r"not hello within timeout_sec=0.05") as caught:
        launch(Group([(0, Kind.HELLO, hello(0))]), timeout=0.05).join()
    fault = caught.value.fault
    assert (fault.kind, fault.ranks, fault.log) == (FaultKind.START, (1,), ("log of 1",))


def test_what_the_monitor_finds_ends_the_wait():
    hang = Fault(FaultKind.HANG, "x", (1,))
    with pytest.raises(GroupFault) as caught:
        launch(Group(), fault=hang).join()
    assert caught.value.fault is hang


def test_closing_ends_the_wait():
    with pytest.raises(GroupFault, match="closing"):
        launch(Group(), closing=True).join()


# -- Waiting for the order to load


def test_ranks_are_listened_to_until_the_order_comes():
    """Else their heartbeats fill the socket, and the thread that sends them gives up."""
    event, polls = threading.Event(), []

    class Waiting(Group):
        def poll(self, timeout):
            polls.append(timeout)
            if len(polls) == 5:
                event.set()
            time.sleep(0.05 if len(polls) <= 5 else 0)
            return super().poll(timeout)

    group = Waiting(*[[]] * 6, [(0, Kind.READY, READY), (1, Kind.READY, READY)])
    start = launch(group, timeout=0.2)
    start.wait(event)
    assert len(polls) == 5 and polls[0] <= 0.1
    ready = start.load(CONFIG, lambda what, done, total: None)
    assert ready.join_seconds < 0.2, "the wait is no part of the start"


def test_an_order_that_came_already_is_obeyed_at_once():
    event = threading.Event()
    event.set()
    group = Group([(0, Kind.READY, READY)])
    launch(group).wait(event)
    assert len(group.script) == 1, "nothing was read that the next one needs"


def test_faults_are_seen_while_the_order_is_awaited():
    hang = Fault(FaultKind.HANG, "x", (1,))
    with pytest.raises(GroupFault, match="x"):
        launch(Group(), fault=hang).wait(threading.Event())
    error = {"kind": "device", "type": "X", "message": "no"}
    with pytest.raises(GroupFault, match="no"):
        launch(Group([(1, Kind.ERROR, error)])).wait(threading.Event())


# -- Loading


def test_a_group_that_agrees_is_ready():
    seen = []
    group = Group(
        [(0, Kind.PROGRESS, {"what": "weights" * 100, "done": 3, "total": 9}), (1, Kind.PROGRESS, {"what": "no"})],
        [(0, Kind.PROGRESS, {"what": "x", "done": "3", "total": float("inf")}), (0, Kind.PROGRESS, {})],
        [(0, Kind.READY, READY), (1, Kind.READY, READY)],
    )
    ready = launch(group).load(CONFIG, lambda *values: seen.append(values))
    assert ready.limits == limits() and ready.counters == {"compiles": 4}
    assert ready.report.to_json() == READY["report"]
    assert 0 <= ready.join_seconds < 5 and 0 <= ready.load_seconds < 5
    assert seen == [(("weights" * 100)[:40], 3, 9)], "of rank 0, and what is no progress is none"
    assert group.told == [(Kind.START, {"config": dataclasses.asdict(CONFIG)})]
    assert EngineConfig(**group.told[0][1]["config"]) == CONFIG


def test_ranks_that_disagree_are_refused():
    other = {**READY, "limits": {**LIMITS, "num_pages": 7}}
    with pytest.raises(GroupFault, match="other limits than rank 0") as caught:
        load([(0, Kind.READY, READY), (1, Kind.READY, other)])
    assert (caught.value.fault.kind, caught.value.fault.ranks) == (FaultKind.REFUSED, (1,))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"limits": {}},
        {"limits": []},
        {"limits": {**LIMITS, "num_pages": "7"}},
        {"limits": {**LIMITS, "num_pages": 0}},
        {"limits": {**LIMITS, "more": 1}},
        {"report": {}},
        {"report": 3},
        {"counters": []},
        {"counters": {"x": "y"}},
        {"counters": {"x": float("inf")}},
    ],
    ids=str,
)
def test_who_is_ready_in_another_way_is_a_fault(wrong):
    value = {**READY, **wrong} if wrong else {}
    with pytest.raises(GroupFault, match="another language") as caught:
        load([(0, Kind.READY, value), (1, Kind.READY, value)])
    assert caught.value.fault.kind is FaultKind.START and len(caught.value.fault.message) < 600


# -- Errors


@pytest.mark.parametrize(
    ("told", "serving", "kind"),
    [
        ("refused", False, FaultKind.REFUSED),
        ("out_of_memory", False, FaultKind.OUT_OF_MEMORY),
        ("collective", True, FaultKind.COLLECTIVE),
        ("exception", True, FaultKind.EXCEPTION),
        ("exception", False, FaultKind.START),
        ("no such thing", True, FaultKind.EXCEPTION),
        (["?"], False, FaultKind.START),
    ],
)
def test_what_a_rank_s_error_stands_for(told, serving, kind):
    group, value = Group(), {"kind": told, "type": "ValueError", "message": "no", "trace": "..."}
    notice = Notice(1, Kind.ERROR, json.dumps(value).encode())
    with pytest.raises(GroupFault) as caught:
        fault_if_error(group, notice, serving=serving)
    fault = caught.value.fault
    assert (fault.kind, fault.ranks, fault.serving) == (kind, (1,), serving)
    assert (fault.error_type, fault.message) == ("ValueError", "no")
    assert fault.log == (() if kind is FaultKind.REFUSED else ("log of 1",)), "a user's mistake needs no log"


def test_other_frames_are_no_errors():
    fault_if_error(Group(), Notice(0, Kind.READY, b"anything"), serving=True)


# -- What ranks load with


def test_cpu_devices_of_a_host_share_its_memory():
    config = EngineConfig("none", tensor_parallel_size=8, memory_fraction=0.6)
    here, there = device(), device(host="there")
    assert rank_config(config, [here] * 4, None).memory_fraction == pytest.approx(0.15)
    assert rank_config(config, [here, there, there], None).memory_fraction == pytest.approx(0.3)
    assert rank_config(EngineConfig("none"), [here] * 2, None).memory_fraction == pytest.approx(0.125)


@pytest.mark.parametrize("fraction", [None, 0.6])
def test_gpus_do_not(fraction):
    config = EngineConfig("none", memory_fraction=fraction)
    assert rank_config(config, [device(platform="gpu")] * 4, None).memory_fraction == (fraction or 0.9)


def test_width_and_pages_are_those_of_the_group():
    config = EngineConfig("none", tensor_parallel_size=4, num_pages=50)
    changed = rank_config(config, [device(platform="gpu")] * 3, None)
    assert (changed.tensor_parallel_size, changed.num_pages) == (3, 50)
    assert rank_config(config, [device(platform="gpu")], 20).num_pages == 20


def test_after_out_of_memory_pages_are_fewer_whether_or_not_they_were_counted_before():
    gpu = [device(platform="gpu")]
    counted = EngineConfig("none", num_pages=50)
    assert rank_config(counted, gpu, None, 0.5).num_pages == 25
    assert rank_config(counted, gpu, 12, 0.5).num_pages == 12, "what a generation settled on was halved already"
    free = EngineConfig("none", memory_fraction=0.8)
    assert rank_config(free, gpu, None, 0.5).memory_fraction == pytest.approx(0.4)
    assert rank_config(free, gpu, None, 0.5).num_pages is None


@pytest.mark.parametrize(
    ("platforms", "devices", "gpus", "count"),
    [
        ("cpu", "0,1,2,3", 8, 2),
        ("cpu,cuda", None, 8, 2),
        ("", "0,1,2,3", 0, 4),
        (None, "GPU-aa, GPU-bb,,GPU-cc", 0, 3),
        (None, "", 8, 2),
        (None, None, 8, 8),
        ("cuda,cpu", None, 8, 8),
        (None, None, None, 2),
        (None, "0", 8, 2),
    ],
)
def test_which_devices_ranks_may_take(monkeypatch, platforms, devices, gpus, count):
    for name, value in (("JAX_PLATFORMS", platforms), ("CUDA_VISIBLE_DEVICES", devices)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)

    def listdir(path: str) -> list[str]:
        if gpus is None:
            raise FileNotFoundError(path)
        return [f"gpu {number}" for number in range(gpus)]

    monkeypatch.setattr(slots, "os", SimpleNamespace(environ=os.environ, listdir=listdir))
    assert visible_slots(2) == count
