"""How agents and ranks of other machines reach the leader: connect, prove the secret both ways, say who one is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from ryzanstein_jax.config import parse_address
from ryzanstein_jax.errors import RyzansteinError
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, authenticate, parse_json

#: Seconds until a machine counts as gone that answers nothing, not even that its port is closed.
_SILENCE_SECONDS = 15


class RefusedError(RyzansteinError):
    """The leader knows the secret and does not want us; `is_final` says that asking again is of no use."""

    def __init__(self, message: str, is_final: bool):
        super().__init__(message)
        self.is_final = is_final


def tune(sock: socket.socket) -> None:
    """Sends at once, and notices a machine that lost its power."""
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_SECONDS * 1000),
    ]
    for level, name, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, name, value)


def software() -> str:
    """What has to be the same on all machines, since their ranks run one program together."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder
            return "unknown"

    return ", ".join(f"{name} {version(name)}" for name in ("ryzanstein-jax", "jax", "jaxlib"))


@dataclass(frozen=True)
class Dialer:
    """Connects to a leader.

    Attributes:
        address: "host:port" of the leader.
        secret: that both know.
    """

    address: str
    secret: bytes = field(repr=False)

    def dial(self, hello: dict[str, Any], timeout: float = 10.0) -> Channel:
        """A channel to the leader, which took the greeting.

        Args:
            hello: who we are.
            timeout: seconds for all of it.

        Raises:
            ChannelClosedError: there is no leader, or not yet, or it hung up.
            FrameError: who answers does not know the secret.
            RefusedError: the leader does not want us.
        """
        deadline = time.monotonic() + timeout
        try:
            sock = socket.create_connection(parse_address("leader", self.address), timeout)
        except OSError as error:
            raise ChannelClosedError(f"nobody answers at {self.address}: {error}") from error
        tune(sock)
        channel = Channel(sock)
        try:
            authenticate(channel, self.secret, leader=False, timeout=max(0.1, deadline - time.monotonic()))
            channel.send_json(Kind.HELLO, hello)
            frame = channel.receive(max(0.1, deadline - time.monotonic()))
            if frame is None:
                raise ChannelClosedError(f"the leader did not answer within {timeout:g} s")
            kind, payload = frame
            if kind is Kind.ERROR:
                value = parse_json(payload)
                raise RefusedError(str(value.get("message"))[:1000], value.get("is_final") is True)
            if kind is not Kind.HELLO:
                raise FrameError(f"the leader answers with {kind.name}")
        except BaseException:
            channel.close()
            raise
        return channel
