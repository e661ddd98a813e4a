"""What a group hears from its ranks: frames in order, heartbeats kept, nonsense blamed on who sent it."""

import os
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from ryzanstein_jax.orchestrator.fault import FaultKind, GroupFault
from ryzanstein_jax.orchestrator.frames import Channel, Kind
from ryzanstein_jax.orchestrator.host import HostAgent, LocalAgent
from ryzanstein_jax.orchestrator.process_group import Notice, ProcessGroup
from ryzanstein_jax.orchestrator.rank import Rank
from ryzanstein_jax.orchestrator.status import Heartbeat, Phase, RankSpec


class ForkingAgent(HostAgent):
    """As `LocalAgent` asks for ranks, of a process that is this one."""

    spawn = LocalAgent.spawn


@pytest.fixture
def pair() -> Iterator[tuple[ProcessGroup, Channel]]:
    """A group of one rank, and the rank's end of its control channel."""
    ours, other = Channel.pair()
    agent = Channel(other)
    group = ProcessGroup(1, None)
    with open(os.devnull, "w") as null:
        logs = SimpleNamespace(writer_fd=null.fileno(), started=lambda: None, close=lambda: None, tail=lambda n: [])
        spec = RankSpec(0, 1, 1, 4, 0, 1, 1, "", False, 0.1)
        group.add(spec, 4, ForkingAgent("this machine", 8, ours, is_local=True), logs)
    kind, payload = agent.receive(1.0)
    control, steps, log = agent.take_fds()
    assert kind is Kind.SPAWN and b'"slot": 4' in payload
    os.close(steps)
    os.close(log)
    rank = Channel(socket.socket(fileno=control))
    yield group, rank
    rank.close()
    group.release()
    ours.close()
    agent.close()


def test_heartbeats_are_kept_and_the_rest_is_passed_on(pair):
    group, rank = pair
    before = time.monotonic()
    rank.send(Kind.HEARTBEAT, Heartbeat(Phase.SERVING, 3, 2, 1).to_bytes())
    rank.send(Kind.PONG, b"{}")
    assert group.poll(1.0) == [Notice(0, Kind.PONG, b"{}")]
    assert group.ranks[0].beat == Heartbeat(Phase.SERVING, 3, 2, 1) and group.ranks[0].beat_time >= before


def test_all_ranks_run_a_step_in_haste_until_the_last_one_has_loaded():
    """What one has loaded another may not have: steps of unlike programs would mix up their collectives."""
    group, ends = ProcessGroup(1, None), []
    for number in range(2):
        steps, other = Channel.pair()
        ends.append(Channel(other))
        group.ranks.append(Rank(number, number, steps, steps, SimpleNamespace(close=lambda: None)))
    for loaded in ((False, False), (True, False), (True, True)):
        for rank, has_loaded in zip(group.ranks, loaded, strict=True):
            rank.beat = Heartbeat(Phase.SERVING, has_loaded=has_loaded)
        group.broadcast(b"plan")
        kind = Kind.PLAN if all(loaded) else Kind.HASTY_PLAN
        assert [end.receive(1.0) for end in ends] == 2 * [(kind, b"plan")]
    for end in ends:
        end.close()
    group.release()


@pytest.mark.parametrize("payload", [b"", Heartbeat().to_bytes() + b"!"])
def test_nonsense_is_a_fault_of_who_sent_it(pair, payload):
    group, rank = pair
    rank.send(Kind.HEARTBEAT, payload)
    with pytest.raises(GroupFault) as caught:
        group.poll(1.0)
    assert (caught.value.fault.kind, caught.value.fault.ranks) == (FaultKind.EXCEPTION, (0,))


def test_garbage_after_a_frame_is_noticed_though_nothing_follows(pair):
    group, rank = pair
    rank.send(Kind.PONG)
    rank._socket.send(b"Traceback (most recent call last)")
    assert [notice.kind for notice in group.poll(1.0)] == [Kind.PONG]
    with pytest.raises(GroupFault, match="what no rank sends"):
        group.poll(1.0)


def test_a_rank_that_hangs_up_is_left_to_its_sentinel(pair):
    group, rank = pair
    rank.close()
    assert group.poll(1.0) == []
    assert group.poll(0.05) == [], "and does not keep the leader busy"
    with pytest.raises(GroupFault, match="takes nothing") as caught:
        group.tell(Kind.PING, {})
    assert caught.value.fault.kind is FaultKind.PROCESS_DEATH


def test_wake_ends_a_wait_and_writes_to_nobody_once_the_group_is_gone(pair):
    group, _ = pair
    group.wake()
    began = time.monotonic()
    assert group.poll(5.0) == [] and time.monotonic() - began < 2.0
    number, release = group._wake, group.release
    release()
    group.release = lambda: None
    reading, writing = os.pipe()
    if number not in (reading, writing):
        os.dup2(writing, number)  # as any file that is opened now might be
    os.set_blocking(reading, False)
    group.wake()
    with pytest.raises(BlockingIOError):
        os.read(reading, 8)
    for fd in {reading, writing, number}:
        os.close(fd)
