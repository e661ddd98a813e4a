"""The leader's port: lets in who proves the secret, and nobody else.

Strangers cost little: so many at a time, a few seconds and a few bytes each, and none of them reaches more than
`authenticate`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ryzanstein_jax.config import parse_address
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.dial import tune
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, authenticate, parse_json

logger = logging.getLogger("ryzanstein_jax.orchestrator")

#: Connections that have not proved anything yet; one more is closed at once.
MOST_STRANGERS = 32
#: What each of them gets to prove itself and to say who it is.
STRANGER_SECONDS = 5.0

#: Takes a channel, what came in its HELLO, and the address of the other side. FrameError and ChannelClosedError end it.
Admit = Callable[[Channel, dict[str, Any], str], None]


class Listener:
    """Accepts connections in threads of its own until it is closed.

    Args:
        address: "host:port" to listen at; port 0 takes a free one.
        secret: that the other side has to know.
        admit: gets every connection that proved itself; called from several threads.

    Raises:
        ConfigError: the address can't be listened at.
    """

    def __init__(self, address: str, secret: bytes, admit: Admit):
        self._secret, self._admit = secret, admit
        host, port = parse_address("listen", address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=MOST_STRANGERS)
        except OSError as error:
            raise ConfigError(
                "listen", address, f"give an address of this machine and a free port ({error})"
            ) from error
        self._socket.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        #: Where it listens, with the port that it got.
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        #: How many were turned away.
        self.num_refused = 0
        self._room = threading.BoundedSemaphore(MOST_STRANGERS)
        self._strangers: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._accept, name="listener", daemon=True)
        self._closed = False
        self._thread.start()

    def close(self) -> None:
        """Listens no more; those that were let in stay. May be called again."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._socket.close()
        os.close(self._wake)
        with self._lock:
            for stranger in self._strangers:
                with contextlib.suppress(OSError):
                    stranger.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._closed:
            poller.poll()
            try:
                connection, peer = self._socket.accept()
            except BlockingIOError:
                continue
            except OSError:  # no descriptors left, or it went away while it waited
                time.sleep(0.1)
                continue
            if not self._room.acquire(blocking=False):
                self.num_refused += 1
                connection.close()
                continue
            with self._lock:
                self._strangers.add(connection)
            threading.Thread(target=self._meet, args=(connection, str(peer[0])), name="stranger", daemon=True).start()

    def _meet(self, connection: socket.socket, peer: str) -> None:
        deadline = time.monotonic() + STRANGER_SECONDS
        tune(connection)
        channel = Channel(connection)
        try:
            authenticate(channel, self._secret, leader=True, timeout=STRANGER_SECONDS)
            frame = channel.receive(max(0.0, deadline - time.monotonic()))
            if frame is None or frame[0] is not Kind.HELLO:
                raise FrameError("it does not say who it is")
            with self._lock:
                self._strangers.discard(connection)  # a friend now, whom `close` leaves alone
            self._admit(channel, parse_json(frame[1]), peer)
        except (ChannelClosedError, FrameError, OSError) as error:
            self.num_refused += 1
            # Once in a while: a scanner of ports must not fill the disk.
            if self.num_refused & (self.num_refused - 1) == 0:
                logger.warning("refused a connection from %s (%d so far): %s", peer, self.num_refused, error)
            channel.close()
        finally:
            with self._lock:
                self._strangers.discard(connection)
            self._room.release()
