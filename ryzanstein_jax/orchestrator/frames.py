"""Frames between the leader, its agents and the ranks: a kind, a length and bytes, over a stream socket.

Nothing on a socket is ever unpickled. A frame is bounded by its kind before a byte of it is read; what does not
parse closes the channel, and the other side of that channel counts as failed.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import json
import os
import select
import socket
import struct
import threading
import time
from enum import IntEnum
from typing import Any

from ryzanstein_jax.errors import ConfigError, RyzansteinError
from ryzanstein_jax.plan import MAX_PLAN_BYTES

_HEADER = struct.Struct("<4sBxxxI")
_MAGIC = b"RYZF"
_NONCE_BYTES = 32
#: Most descriptors that travel with a frame.
MAX_FDS = 8
#: What `pending` takes in one call, in bytes, each frame counting for so many more: a flood must not hold its reader.
_MOST_PENDING, _FRAME_COST = 1 << 20, 256


class Kind(IntEnum):
    """What a frame is. Those of the leader: SPAWN to HASTY_PLAN; of the other side: SPAWNED to PREPARED."""

    SPAWN = 1  # to an agent: start a rank
    KILL = 2  # to an agent: kill the ranks of a generation
    START = 3  # to a rank: load this model
    PROBE = 4  # to a rank: compute something on each device
    PING = 5  # to a rank
    INSPECT = 6  # to a rank: what do the programs communicate
    STOP = 7  # to a rank or an agent: end
    PLAN = 8  # to a rank: run this step
    PREPARE = 9  # to a rank: load this model's programs, and wait for START before taking memory of a device
    HASTY_PLAN = 10  # to a rank: run this step, with programs that all ranks loaded before they were ready
    SPAWNED = 32  # from an agent
    EXITED = 33  # from an agent: how a rank ended
    HELLO = 34  # from an agent or a rank: who it is; from a rank: its devices; to them: welcome
    PROGRESS = 35  # from a rank that loads
    READY = 36  # from a rank: the model is loaded
    HEARTBEAT = 37  # from a rank
    PROBED = 38  # from a rank
    INSPECTED = 39  # from a rank
    ERROR = 40  # from a rank: what went wrong; to who dials: why it is refused
    RESULT = 41  # from rank 0: what the step sampled
    PONG = 42  # from a rank
    PREPARED = 43  # from a rank: it did, and waits
    AUTH = 64  # both ways, on sockets that anybody could have opened


_LARGE = {
    Kind.PLAN: MAX_PLAN_BYTES, Kind.HASTY_PLAN: MAX_PLAN_BYTES, Kind.RESULT: MAX_PLAN_BYTES, Kind.INSPECTED: 16 << 20,
}  # fmt: skip
_SMALL = 1 << 20


class ChannelClosedError(RyzansteinError):
    """The other side of a channel is gone."""


class FrameError(RyzansteinError, ValueError):
    """Bytes that are no frame, or a frame that is not allowed; the channel can't be used any more."""


class Channel:
    """Frames over one stream socket. One thread reads; any number may send."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._fds: list[int] = []
        #: Most bytes of a frame, below its kind's own limit; for a side that has not proved anything yet.
        self.most = MAX_PLAN_BYTES
        sock.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """A channel, and the socket of its other side to hand to a child."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def fileno(self) -> int:
        """-1 once it is closed."""
        return self._socket.fileno()

    def send(
        self, kind: Kind, payload: bytes | bytearray = b"", *, fds: tuple[int, ...] = (), timeout: float = 30.0
    ) -> None:
        """Sends a frame, and descriptors with it where the socket is a local one.

        Raises:
            ChannelClosedError: the other side is gone, or did not take all of it within `timeout` seconds.
        """
        if len(fds) > MAX_FDS:
            raise FrameError(f"{len(fds)} descriptors are more than the {MAX_FDS} that travel with a frame")
        if len(payload) > _LARGE.get(kind, _SMALL):
            raise FrameError(f"a frame {kind.name} of {len(payload)} bytes is over its limit")
        parts = memoryview(b"".join((_HEADER.pack(_MAGIC, kind, len(payload)), payload)))
        size, deadline = len(parts), time.monotonic() + timeout
        with self._sending:
            try:
                while parts:
                    try:
                        if fds:
                            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                            sent, fds = self._socket.sendmsg([parts], rights), ()
                        else:
                            sent = self._socket.send(parts)
                        parts = parts[sent:]
                    except BlockingIOError:
                        left = deadline - time.monotonic()
                        if left <= 0 or not _wait(self._socket, select.POLLOUT, left):
                            if len(parts) < size:  # the next frame would stand in the middle of this one
                                self._socket.shutdown(socket.SHUT_RDWR)
                            raise ChannelClosedError(f"it was not taken within {timeout:g} s") from None
            except OSError as error:
                raise ChannelClosedError(f"the other side is gone: {error}") from error

    def send_json(self, kind: Kind, value: Any, *, fds: tuple[int, ...] = ()) -> None:
        self.send(kind, json.dumps(value).encode(), fds=fds)

    def receive(self, timeout: float | None = None) -> tuple[Kind, bytes] | None:
        """The next frame, or None where none came within `timeout` seconds (None: waits).

        Raises:
            ChannelClosedError: the other side is gone.
            FrameError: it sent something that is no frame.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            frame = self._take()
            if frame is not None:
                return frame
            if not self._fill(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None

    def pending(self) -> list[tuple[Kind, bytes]]:
        """Frames that have arrived; raises as `receive`, but only once what came before has been returned.

        After a flood some are left in the socket, which stays readable for them.
        """
        frames, room = [], _MOST_PENDING
        try:
            while room > 0 and (frame := self.receive(0.0)) is not None:
                frames.append(frame)
                room -= _FRAME_COST + len(frame[1])
            while (frame := self._take()) is not None:  # for what was read already nobody would be woken
                frames.append(frame)
        except ChannelClosedError:
            if not frames:
                raise
        except FrameError:
            if not frames:
                raise
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)  # stays readable, so that whoever waits comes back for the error
        return frames

    def take_fds(self, count: int | None = None) -> list[int]:
        """The first so many descriptors that came with frames, or all; the caller closes them."""
        taken, self._fds = self._fds[:count], [] if count is None else self._fds[count:]
        return taken

    def _take(self) -> tuple[Kind, bytes] | None:
        if len(self._buffer) < _HEADER.size:
            return None
        magic, kind, length = _HEADER.unpack_from(self._buffer)
        try:
            kind = Kind(kind)
        except ValueError:
            magic = b""
        if magic != _MAGIC:
            raise FrameError(f"not a frame: it begins with {bytes(self._buffer[:8])!r}")
        most = min(self.most, _LARGE.get(kind, _SMALL))
        if length > most:
            raise FrameError(f"a frame {kind.name} of {length} bytes is over its limit of {most}")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        return kind, payload

    def _fill(self, timeout: float | None) -> bool:
        """Reads what is there; False where nothing came in time."""
        while True:
            try:
                if self._socket.family == socket.AF_UNIX:
                    data, fds, flags, _ = socket.recv_fds(self._socket, 1 << 18, MAX_FDS)
                    for fd in fds:  # `recv_fds` ignores MSG_CMSG_CLOEXEC
                        os.set_inheritable(fd, False)
                    self._fds += fds
                    if len(self._fds) > 2 * MAX_FDS or flags & socket.MSG_CTRUNC:
                        raise FrameError("more descriptors came than any frame needs")
                else:
                    data = self._socket.recv(1 << 18)
            except BlockingIOError:
                if not _wait(self._socket, select.POLLIN, timeout):
                    return False
                continue
            except OSError as error:
                raise ChannelClosedError(f"the other side is gone: {error}") from error
            if not data:
                raise ChannelClosedError("the other side is gone")
            self._buffer += data
            return True

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)
        self._socket.close()

    def hang_up(self) -> None:
        """Has both sides find the channel ended. From any thread; whoever reads here closes it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def detach(self) -> socket.socket:
        """The socket, for bytes that are no frames; the channel counts as closed. None of them may have come yet."""
        fd = self._socket.detach()
        return socket.socket(fileno=fd)

    def address(self) -> str:
        """Of this machine on the network, as the other side reaches it."""
        return str(self._socket.getsockname()[0])

    def looks_closed(self) -> bool:
        """Whether the other side is gone and left nothing to read. From any thread, and nothing is taken."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


def _wait(sock: socket.socket, event: int, timeout: float | None) -> bool:
    if sock.fileno() < 0:
        raise ChannelClosedError("the channel is closed")
    poller = select.poll()
    poller.register(sock, event)
    return bool(poller.poll(None if timeout is None else timeout * 1000))


def parse_json(payload: bytes) -> dict[str, Any]:
    """The object of a frame.

    Raises:
        FrameError: the bytes are no JSON object.
    """
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {payload[:40]!r}") from error
    if not isinstance(value, dict):
        raise FrameError(f"not a JSON object: {payload[:40]!r}")
    return value


def _proof(secret: bytes, role: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(secret, b"ryzanstein " + role + b"".join(nonces), "sha256")


def authenticate(channel: Channel, secret: bytes, *, leader: bool, timeout: float = 10.0) -> None:
    """Each side proves that it knows the secret, without sending it; before that nothing else is read.

    Raises:
        ConfigError: the secret is empty, which everybody knows.
        FrameError: the other side does not know the secret, or speaks something else.
        ChannelClosedError: it went away or took too long.
    """
    if not secret:
        raise ConfigError("secret", "", "an empty one proves nothing: `openssl rand -hex 32` makes one")
    deadline = time.monotonic() + timeout
    channel.most = 64
    own_role, other_role = (b"leader", b"member") if leader else (b"member", b"leader")

    def next_auth(size: int) -> bytes:
        frame = channel.receive(max(0.0, deadline - time.monotonic()))
        if frame is None:
            raise ChannelClosedError(f"no proof of the secret within {timeout:g} s")
        if frame[0] is not Kind.AUTH or len(frame[1]) != size:
            raise FrameError("it did not prove that it knows the secret")
        return frame[1]

    ours = os.urandom(_NONCE_BYTES)
    channel.send(Kind.AUTH, ours)
    theirs = next_auth(_NONCE_BYTES)
    if theirs == ours:
        raise FrameError("it sent our own challenge back")
    channel.send(Kind.AUTH, _proof(secret, own_role, ours, theirs))
    if not hmac.compare_digest(next_auth(32), _proof(secret, other_role, theirs, ours)):
        raise FrameError("it does not know the secret")
    channel.most = MAX_PLAN_BYTES
