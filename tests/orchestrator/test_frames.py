"""Frames over real sockets: in order, and bounded before they are read, whatever the other side sends."""

import json
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ryzanstein_jax.orchestrator.agent import Agent
from ryzanstein_jax.orchestrator.frames import (
    MAX_FDS,
    Channel,
    ChannelClosedError,
    FrameError,
    Kind,
    parse_json,
)
from ryzanstein_jax.plan import MAX_PLAN_BYTES

HEADER = struct.Struct("<4sBxxxI")


def header(kind: int, length: int, magic: bytes = b"RYZF") -> bytes:
    return HEADER.pack(magic, kind, length)


def unix() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


@pytest.fixture(params=[unix, tcp])
def ends(request) -> Iterator[tuple[Channel, Channel]]:
    left, right = map(Channel, request.param())
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the bare socket of the other side."""
    channel, other = Channel.pair()
    with other:
        yield channel, other
    channel.close()


def read(channel: Channel, frames: int) -> None:
    for _ in range(frames):
        assert channel.receive(1.0) is not None


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_frames_arrive_whole_and_in_order(ends):
    left, right = ends
    sent = [(Kind.PLAN, b"x" * size) for size in (0, 1, 11, 12, 13, 70_000)] + [(Kind.PING, b"{}"), (Kind.PONG, b"")]
    for kind, payload in sent:
        left.send(kind, payload)
    assert [right.receive(5.0) for _ in sent] == sent
    assert right.receive(0.0) is None
    right.send(Kind.RESULT, bytearray(b"back"))
    assert left.receive(5.0) == (Kind.RESULT, b"back")
    left.send_json(Kind.START, {"ä": [1]})
    assert parse_json(right.receive(5.0)[1]) == {"ä": [1]}


def test_a_frame_larger_than_any_buffer_arrives(ends):
    left, right = ends
    payload = os.urandom(1 << 20) * 24
    thread = threading.Thread(target=left.send, args=(Kind.PLAN, payload))
    thread.start()
    assert right.receive(20.0) == (Kind.PLAN, payload)
    thread.join(5)


def test_many_threads_may_send(ends):
    left, right = ends

    def send(name: int) -> None:
        for number in range(50):
            left.send(Kind.RESULT, bytes([name, number]) * (7_000 if number % 10 == 0 else 3))

    threads = [threading.Thread(target=send, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {name: [] for name in range(6)}
    for _ in range(300):
        _, payload = right.receive(10.0)
        name, number = payload[:2]
        assert payload == bytes([name, number]) * (7_000 if number % 10 == 0 else 3)
        seen[name].append(number)
    assert all(numbers == list(range(50)) for numbers in seen.values())
    for thread in threads:
        thread.join(5)


def test_an_end_is_seen_once_what_came_before_was_read(ends):
    left, right = ends
    left.send(Kind.PING)
    left.send(Kind.PONG)
    left.close()
    assert select.select([right], [], [], 5.0)[0]
    time.sleep(0.05)
    assert right.pending() == [(Kind.PING, b""), (Kind.PONG, b"")]
    for again in (right.pending, right.receive):
        with pytest.raises(ChannelClosedError):
            again()
    with pytest.raises(ChannelClosedError):
        right.send(Kind.PLAN, b"x" * (8 << 20))


def test_a_closed_channel_says_so(ends):
    left, _ = ends
    left.close()
    assert left.fileno() == -1
    with pytest.raises(ChannelClosedError):
        left.receive(0.1)
    with pytest.raises(ChannelClosedError):
        left.send(Kind.PING)


def test_waiting_ends_with_its_timeout(ends):
    left, right = ends
    began = time.monotonic()
    assert right.receive(0.1) is None
    left.send(Kind.PING)
    left._socket.send(header(Kind.PONG, 5) + b"abc")
    assert right.receive(1.0) == (Kind.PING, b"")
    assert right.receive(0.1) is None, "two bytes are missing"
    left._socket.send(b"de")
    assert right.receive(1.0) == (Kind.PONG, b"abcde")
    assert 0.2 <= time.monotonic() - began < 3.0


def test_who_takes_nothing_is_gone_and_half_a_frame_is_never_followed_by_another(ends):
    left, right = ends
    with pytest.raises(ChannelClosedError, match=r"within 0.1 s"):
        left.send(Kind.PLAN, b"x" * (32 << 20), timeout=0.1)
    with pytest.raises(ChannelClosedError):
        left.send(Kind.PING)
    with pytest.raises(ChannelClosedError):
        right.receive(1.0)


def test_what_could_not_be_sent_at_all_leaves_the_channel_as_it_was(raw):
    channel, other = raw
    other.setblocking(False)
    filled = 0
    try:
        while True:
            filled += channel._socket.send(b"x" * 4096)
    except BlockingIOError:
        pass
    with pytest.raises(ChannelClosedError, match="was not taken"):
        channel.send(Kind.PING, timeout=0.05)
    while filled:
        filled -= len(other.recv(min(filled, 1 << 20)))
    channel.send(Kind.PING)
    assert other.recv(100) == header(Kind.PING, 0)


# -- Descriptors


def test_descriptors_travel_and_are_closed():
    left, other = Channel.pair()
    right = Channel(other)
    before = num_fds()
    reading, writing = os.pipe()
    left.send_json(Kind.SPAWN, {"rank": 0}, fds=(writing, writing))
    left.send(Kind.PING)
    os.close(writing)
    assert right.receive(1.0) == (Kind.SPAWN, b'{"rank": 0}')
    first, second = right.take_fds()
    assert right.take_fds() == []
    assert not os.get_inheritable(first), "a program that a rank starts would keep the leader waiting for its end"
    os.write(first, b"hello")
    for fd in (first, second):
        os.close(fd)
    assert os.read(reading, 9) == b"hello" and os.read(reading, 9) == b"", "nobody holds the other end any more"
    assert right.receive(1.0) == (Kind.PING, b"")
    left.send(Kind.SPAWN, fds=(reading,))
    os.close(reading)
    right.receive(1.0)
    assert num_fds() == before + 1
    right.close()
    left.close()
    assert num_fds() == before - 2, "nobody took it, so the channel closed it"


def test_descriptors_that_nobody_wants_do_not_pile_up(raw):
    channel, other = raw
    before = num_fds()
    for _ in range(100):
        socket.send_fds(other, [header(Kind.PONG, 0)], [0] * MAX_FDS)
    with pytest.raises(FrameError, match="descriptors"):
        read(channel, 100)
    assert num_fds() <= before + 3 * MAX_FDS
    channel.close()
    assert num_fds() <= before


def test_too_many_descriptors_are_refused_on_both_sides(raw):
    channel, other = raw
    with pytest.raises(FrameError, match="descriptors"):
        channel.send(Kind.SPAWN, fds=(0,) * (MAX_FDS + 1))
    socket.send_fds(other, [header(Kind.SPAWN, 0)], [0] * (MAX_FDS + 1))
    with pytest.raises(FrameError, match="descriptors"):
        channel.receive(1.0)


def test_orders_that_arrive_together_keep_their_descriptors_apart():
    """An agent that was busy finds several ranks to start at once."""
    leader, other = Channel.pair()
    spawned = []

    class Recorder(Agent):
        def _spawn(self, spec, fds):
            spawned.append((spec.rank, len(fds)))
            for fd in fds:
                os.close(fd)

    spec = dict(num_processes=4, generation=1, slot=0, local_index=0, local_count=1, width=1, address="", hosted=False)
    with open(os.devnull) as null:
        for rank in range(4):
            value = {**spec, "rank": rank, "heartbeat_interval_sec": 0.1}
            leader.send_json(Kind.SPAWN, value, fds=(null.fileno(),) * 3)
    leader.send(Kind.STOP)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)}
    try:
        Recorder(Channel(other)).run()
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert spawned == [(rank, 3) for rank in range(4)]
    leader.close()


# -- What is no frame


@pytest.mark.parametrize(
    ("kind", "most"), [(Kind.HEARTBEAT, 1 << 20), (Kind.PLAN, MAX_PLAN_BYTES), (Kind.INSPECTED, 16 << 20)]
)
def test_a_frame_over_its_limit_is_refused_on_both_sides_before_it_is_read(raw, kind, most):
    channel, other = raw

    class Huge(bytes):
        def __len__(self):
            return most + 1

    with pytest.raises(FrameError, match="over its limit"):
        channel.send(kind, Huge())
    other.send(header(kind, most))
    assert channel.receive(0.0) is None, "the largest that is allowed is waited for"
    channel._buffer.clear()
    other.send(header(kind, most + 1))
    for _ in range(2):
        with pytest.raises(FrameError, match=f"{kind.name} of {most + 1} bytes is over its limit of {most}"):
            channel.receive(1.0)
    assert len(channel._buffer) == HEADER.size


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95" + b"." * 20,
        header(Kind.PING, 0, b"RYZP"),
        header(0, 0),
        header(200, 0),
        header(Kind.PING, 0xFFFFFFFF),
    ],
)
def test_garbage_is_an_error_each_time(raw, garbage):
    channel, other = raw
    other.send(header(Kind.PING, 2) + b"{}" + garbage)
    assert channel.pending() == [(Kind.PING, b"{}")], "what came before it counts"
    for _ in range(2):
        assert select.select([channel], [], [], 0.5)[0], "whoever waits for the channel must learn of it"
        with pytest.raises(FrameError):
            channel.pending()


def read_all(channel: Channel) -> tuple[list[tuple[Kind, bytes]], Exception]:
    frames = []
    while True:
        try:
            frames += channel.pending()
        except (ChannelClosedError, FrameError) as error:
            return frames, error


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_bytes_are_frames_or_a_typed_error(data):
    frame = st.tuples(st.sampled_from(list(Kind)), st.binary(max_size=40)).map(
        lambda pair: header(pair[0], len(pair[1])) + pair[1]
    )
    parts = data.draw(st.lists(st.one_of(frame, frame, st.binary(max_size=30)), max_size=8))
    sent = bytearray(b"".join(parts))
    if sent and data.draw(st.booleans()):
        sent[data.draw(st.integers(0, len(sent) - 1))] ^= data.draw(st.integers(1, 255))
    channel, other = Channel.pair()
    with other:
        for begin in range(0, len(sent), 23):
            other.send(sent[begin : begin + 23])
    frames, error = read_all(channel)
    channel.close()
    again = b"".join(header(kind, len(payload)) + payload for kind, payload in frames)
    assert sent.startswith(_blank(again, sent))
    if isinstance(error, ChannelClosedError):
        rest = sent[len(again) :]
        assert len(rest) < HEADER.size or HEADER.unpack_from(rest)[2] > len(rest) - HEADER.size


def _blank(frames: bytes, sent: bytearray) -> bytes:
    """With the header's padding as it was sent: nobody reads it."""
    result, at = bytearray(frames), 0
    while at < len(result):
        result[at + 5 : at + 8] = sent[at + 5 : at + 8]
        at += HEADER.size + HEADER.unpack_from(result, at)[2]
    return bytes(result)


def test_a_flood_of_empty_frames_does_not_hold_its_reader(raw):
    channel, other = raw
    stop = threading.Event()

    def flood() -> None:
        frames = header(Kind.PONG, 0) * 10_000
        other.settimeout(0.2)
        while not stop.is_set():
            try:
                other.sendall(frames)
            except TimeoutError:
                return

    thread = threading.Thread(target=flood)
    thread.start()
    answered = threading.Event()
    reader = threading.Thread(target=lambda: (channel.pending(), channel.pending(), answered.set()))
    reader.start()
    try:
        assert answered.wait(5.0), "the reader never comes back"
    finally:
        stop.set()
        reader.join()
        thread.join()


def test_a_flood_is_read_completely_by_who_waits_for_the_socket(raw):
    channel, other = raw
    number, seen = 40_000, 0
    thread = threading.Thread(target=other.sendall, args=(header(Kind.PONG, 0) * number,))
    thread.start()
    while seen < number:
        assert select.select([channel], [], [], 5.0)[0], f"{number - seen} frames are left and nobody is woken"
        seen += len(channel.pending())
    thread.join()


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b"1", b"null", b'"x"', b"{", b"\xff{}", b"[" * 500_000, b'{"a":' * 200_000, b"9" * 5000, b"{}{}"],
    ids=lambda payload: payload[:8].decode(errors="replace") or "nothing",
)
def test_what_is_no_json_object_is_refused(payload):
    with pytest.raises(FrameError) as caught:
        parse_json(payload)
    assert len(str(caught.value)) < 300


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60))
def test_any_payload_is_an_object_or_refused(payload):
    try:
        assert isinstance(parse_json(payload), dict)
    except FrameError:
        pass
    assert parse_json(json.dumps({"x": payload.hex()}).encode()) == {"x": payload.hex()}
