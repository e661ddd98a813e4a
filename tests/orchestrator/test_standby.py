"""When there is a standby, whom it may stand in for, and which of two groups hears what."""

import ctypes
import json
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.errors import ConfigError, ProcessGroupError, RecoveryExhaustedError
from ryzanstein_jax.orchestrator import devices as device_reports
from ryzanstein_jax.orchestrator import standby as module
from ryzanstein_jax.orchestrator.capacity import Capacity
from ryzanstein_jax.orchestrator.devices import DeviceReport, cuda_bus_id
from ryzanstein_jax.orchestrator.events import EventKind, EventLog
from ryzanstein_jax.orchestrator.fault import Fault, FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import Channel, Kind
from ryzanstein_jax.orchestrator.host import HostAgent, LocalAgent
from ryzanstein_jax.orchestrator.process_group import Notice, ProcessGroup
from ryzanstein_jax.orchestrator.standby import Standby
from ryzanstein_jax.orchestrator.status import Heartbeat, RankSpec
from tests.support import golden_spec

CONFIG = EngineConfig("none", tensor_parallel_size=2, num_pages=9)
SLOTS = (0, 1)


def device(rank: int, platform: str = "cpu", bus: str = "") -> DeviceReport:
    return DeviceReport(0, platform, "x", 1 << 40, "here", rank, bus)


class Group:
    """Two ranks that say what was put down for them, and know whether they were killed."""

    def __init__(self, generation: int):
        self.generation, self.said, self.told, self.killed = generation, [], [], False
        self.ranks = [
            SimpleNamespace(
                rank=rank,
                pid=-1,
                beat_time=time.monotonic(),
                beat=Heartbeat(),
                logs=SimpleNamespace(tail=lambda count: []),
            )
            for rank in (0, 1)
        ]

    def poll(self, timeout: float) -> list[Notice]:
        said, self.said = self.said, []
        for entry in said:
            if isinstance(entry, Fault):
                raise GroupFault(entry)
        return said

    def say(self, kind: Kind) -> None:
        for rank in (0, 1):
            value = {"rank": rank, "generation": self.generation, "devices": [device(rank).to_json()]}
            self.said.append(Notice(rank, kind, json.dumps(value).encode()))

    def tell(self, kind: Kind, value: dict) -> None:
        self.told.append(kind)

    def kill(self) -> None:
        self.killed = True


class Stage:
    """A standby whose groups are made up, on a clock that is told what time it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options):
        self.now, self.config, self.groups, self.refuse = 1000.0, CONFIG, [], False
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.events = EventLog()
        self.standby = Standby(
            OrchestratorConfig(standby=True, **options), self.events, self.launch, lambda devices: self.config
        )
        self.standby.begin()

    def launch(self, slots: tuple[int, ...]) -> Group:
        if self.refuse:
            raise ProcessGroupError("no room")
        self.groups.append(Group(2 + len(self.groups)))
        return self.groups[-1]

    def tend(self, seconds: float = 0.0, *said: Kind | Fault, idle: float = 9.0) -> None:
        self.now += seconds
        for what in said:
            self.groups[-1].said.append(what) if isinstance(what, Fault) else self.groups[-1].say(what)
        self.standby.tend(SLOTS, idle)

    def prepare(self) -> Group:
        self.tend(60.0)
        self.tend(0.0, Kind.HELLO)
        self.tend(0.0, Kind.PREPARED)
        return self.groups[-1]


@pytest.fixture
def stage(monkeypatch) -> Stage:
    return Stage(monkeypatch)


DEATH = Fault(FaultKind.PROCESS_DEATH, "its process 7 was killed", (1,))


# -- Its life


def test_it_starts_after_a_calm_moment_and_loads_before_it_is_needed(stage):
    stage.tend(0.9)
    stage.tend(0.2, idle=0.2)
    assert not stage.groups and stage.standby.summary() is None
    stage.tend(0.0, idle=0.3)
    (group,) = stage.groups
    stage.tend()
    assert group.told == []
    stage.tend(0.0, Kind.HELLO)
    assert group.told == [Kind.PREPARE]
    assert stage.standby.summary() == {"generation": 2, "prepared": False, "pids": []}
    stage.tend(0.0, Kind.PREPARED)
    assert stage.standby.summary()["prepared"] and len(stage.events.list(kind=EventKind.STANDBY)) == 1
    launch = stage.standby.take(SLOTS)
    assert launch.group is group and launch.prepared_for == CONFIG and not group.killed
    assert stage.standby.summary() is None and stage.standby.take(SLOTS) is None


def test_without_a_calm_moment_it_starts_all_the_same_in_the_end(stage):
    stage.tend(30.0, idle=0.0)
    assert not stage.groups
    stage.tend(1.5, idle=0.0)
    assert len(stage.groups) == 1


@pytest.mark.parametrize("said", [(), (Kind.HELLO,)], ids=["joining", "loading"])
def test_half_of_one_is_of_no_use(stage, said):
    stage.tend(60.0)
    stage.tend(0.0, *said)
    assert stage.standby.take(SLOTS) is None and stage.groups[0].killed
    assert not stage.events.list(), "which is no failure"


def test_it_stands_in_for_the_same_devices_and_settings_only(stage):
    group = stage.prepare()
    assert stage.standby.take((0,)) is None and group.killed
    group = stage.prepare()
    stage.config = CONFIG.replace(num_pages=4)
    assert stage.standby.take(SLOTS) is None and group.killed


def test_one_that_died_just_now_is_not_taken(stage):
    group = stage.prepare()
    group.said.append(DEATH)
    assert stage.standby.take(SLOTS) is None and group.killed


def test_what_fails_is_tried_again_ever_later_until_it_works(stage):
    stage.tend(60.0)
    waits = []
    for _ in range(5):
        stage.tend(0.0, DEATH)
        assert stage.groups[-1].killed
        began, count = stage.now, len(stage.groups)
        while len(stage.groups) == count:
            stage.tend(0.5)
        waits.append(stage.now - began)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0]
    stage.tend(0.0, Kind.HELLO)
    stage.tend(0.0, Kind.PREPARED)
    stage.tend(0.0, DEATH)
    stage.tend(2.5)
    assert len(stage.groups) == 7, "it had worked: the count began anew"
    assert {event.severity for event in stage.events.list(kind=EventKind.STANDBY)} == {"warning", "info"}


def test_one_that_cannot_be_started_hurts_nobody(stage):
    stage.refuse = True
    stage.tend(60.0)
    (event,) = stage.events.list(kind=EventKind.STANDBY)
    assert "no room" in event.message and stage.standby.summary() is None


def test_one_that_takes_too_long_is_given_up(monkeypatch):
    stage = Stage(monkeypatch, timeout_sec=0.01)
    stage.tend(60.0)
    while not stage.groups[0].killed:  # by the launch's own clock
        stage.tend(0.0)
    assert "not hello within" in stage.events.list()[-1].message


# -- Whether to have one


@pytest.mark.parametrize(
    ("options", "platform", "cache", "free", "wanted"),
    [
        ({}, "cpu", None, 2 << 30, True),
        ({}, "cpu", None, None, True),
        ({}, "cpu", None, (2 << 30) - 1, False),
        ({}, "cpu", "", 2 << 30, False),
        ({}, "gpu", None, 1 << 40, False),
        ({"standby": True}, "cpu", "", 0, True),
        ({"standby": False}, "cpu", None, 1 << 40, False),
        ({"standby": True, "enable_auto_restart": False}, "cpu", None, 1 << 40, False),
        ({"standby": True, "max_restart_attempts": 0}, "cpu", None, 1 << 40, False),
    ],
)
def test_who_gets_one(monkeypatch, options, platform, cache, free, wanted):
    monkeypatch.setattr(module, "_available_bytes", lambda: free)
    standby = Standby(OrchestratorConfig(**options), EventLog(), lambda slots: None, lambda devices: CONFIG)
    config = CONFIG.replace(compilation_cache_dir=cache)
    assert standby.wanted([device(0, platform), device(1, platform)], config) is wanted


def test_on_a_gpu_there_is_none(stage):
    stage.standby.check([device(0), device(1)])
    with pytest.raises(ConfigError, match="GPU would reserve memory"):
        stage.standby.check([device(0, "gpu"), device(1, "gpu")])
    for setting in ("auto", False):
        Standby(OrchestratorConfig(standby=setting), EventLog(), stage.launch, lambda devices: CONFIG).check(
            [device(0, "gpu")]
        )


@pytest.mark.parametrize("value", ["yes", 1, None, ""])
def test_the_setting_is_checked(value):
    with pytest.raises(ConfigError, match="standby"):
        OrchestratorConfig(standby=value)


def test_free_memory_is_known_here():
    assert 1 << 20 < module._available_bytes() < 1 << 50


# -- Two groups of one agent


class ForkingAgent(HostAgent):
    """As `LocalAgent` asks for ranks, of a process that is this one."""

    spawn = LocalAgent.spawn


@pytest.fixture
def two() -> Iterator[tuple[ProcessGroup, ProcessGroup, Channel]]:
    """Groups of generations 1 and 2, of one rank each, and the agent's end of the channel that they share."""
    ours, other = Channel.pair()
    theirs, agent = Channel(other), ForkingAgent("this machine", 8, ours, is_local=True)
    groups = [ProcessGroup(generation, None) for generation in (1, 2)]
    with open(os.devnull, "w") as null:
        logs = SimpleNamespace(writer_fd=null.fileno(), started=lambda: None, close=lambda: None, tail=lambda n: [])
        for group in groups:
            group.add(RankSpec(0, 1, group.generation, 0, 0, 1, 1, "", False, 0.1), 0, agent, logs)
            theirs.receive(1.0)
            for fd in theirs.take_fds():
                os.close(fd)
    yield *groups, theirs
    for group in groups:
        group.release()
    ours.close()
    theirs.close()


def test_each_group_learns_what_the_other_one_read(two):
    first, second, agent = two
    for group in (first, second):
        agent.send_json(Kind.SPAWNED, {"rank": 0, "generation": group.generation, "pid": os.getpid()})
    for generation in (3, -1, True, "1", [1], None):
        agent.send_json(Kind.EXITED, {"rank": 0, "generation": generation, "code": 1})
    assert first.poll(1.0) == [] and (first.ranks[0].pid, second.ranks[0].pid) == (os.getpid(), -1)
    assert second.poll(0.0) == [] and second.ranks[0].pid == os.getpid()
    agent.send_json(Kind.EXITED, {"rank": 0, "generation": 2, "code": -9})
    assert first.poll(1.0) == []
    with pytest.raises(GroupFault, match="SIGKILL"):
        second.poll(0.0)


def test_both_groups_learn_that_the_agent_is_gone(two):
    first, second, agent = two
    agent.close()
    for group in (first, second):
        with pytest.raises(GroupFault, match="agent of this machine has ended"):
            group.poll(1.0)


# -- Capacity, and which GPU is which


def capacity(**settings) -> Capacity:
    return Capacity(golden_spec("llama"), EngineConfig("m", **settings), OrchestratorConfig())


def test_devices_that_are_left_out_come_back():
    made = capacity(tensor_parallel_size=2)
    assert made.choose((0, 1, 2)) == (0, 1)
    made.exclude(1, "broken")
    assert made.choose((0, 1, 2)) == (0, 2) and made.excluded == {1: "broken"}
    made.restore(1)
    assert made.choose((0, 1, 2)) == (0, 1)
    for slot in (0, 1, 2):
        made.exclude(slot, "broken")
    with pytest.raises(RecoveryExhaustedError, match="0 of 3 devices are left"):
        made.choose((0, 1, 2))


def test_gpus_are_told_apart_by_their_bus_and_by_number_only_where_no_rank_told():
    made = capacity(tensor_parallel_size=2)
    assert [made.slot_of("0000:0a:00.0", index, 2) for index in (0, 1, 2)] == [0, 1, None]
    made.choose((0, 1, 2))
    made.check_fit((0, 1), [device(0, "gpu", "0000:0b:00.0"), device(1, "gpu", "0000:0a:00.0")])
    assert made.slot_of("0000:0a:00.0", 0, 2) == 1 and made.slot_of("0000:0b:00.0", 1, 2) == 0
    assert made.slot_of("0000:0c:00.0", 0, 2) is None, "another one, that takes no part"
    assert made.slot_of("0000:0a:00.0", 0, 1) is None, "that slot is another machine's"
    assert made.slot_of(None, 0, 1) == 0


@pytest.mark.parametrize(
    ("text", "failed", "found"),
    [
        (b"0000:3B:00.0", 0, "0000:3b:00.0"),
        (b"00000000:3B:00.0", 0, "00000000:3b:00.0"),
        (b"0000:3B:00.0", 101, ""),
        (b"nonsense", 0, ""),
        (b"\xff", 0, ""),
    ],
)
def test_the_bus_id_is_cuda_s(monkeypatch, text, failed, found):
    def ask(buffer, size, ordinal):
        assert (size, ordinal) == (32, 3)
        buffer.value = text
        return failed

    fake = SimpleNamespace(
        create_string_buffer=ctypes.create_string_buffer,
        CDLL=lambda name: SimpleNamespace(cuDeviceGetPCIBusId=ask),
    )
    monkeypatch.setattr(device_reports, "ctypes", fake)
    assert cuda_bus_id(3) == found


def test_without_cuda_there_is_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(device_reports, "ctypes", SimpleNamespace(CDLL=missing, create_string_buffer=bytearray))
    assert cuda_bus_id(0) == ""
