"""The agent of a machine: imports everything once, then forks a rank in milliseconds whenever the leader asks.

`python -m ryzanstein_jax.orchestrator.agent FD PARENT` serves the leader that it inherited a socket from; `join` is for
other machines. It runs one thread and never touches a device, so a fork of it is clean. Ranks are its children: it
reaps them and tells the leader how they ended. Without a leader, all of them end: the kernel kills a child whose parent
is gone, and the agent itself sees its socket close.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import select
import signal
import socket
import sys
import time
import traceback
from enum import Enum

from ryzanstein_jax.orchestrator.dial import Dialer
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, parse_json
from ryzanstein_jax.orchestrator.status import RankSpec

_PR_SET_PDEATHSIG = 1
#: A killed rank may take so long to end, in seconds: the driver gives its memory back first.
_REAP_SECONDS = 30.0


class End(Enum):
    """Why an agent has ended its service."""

    STOP = "the leader said so"
    LOST = "the leader is gone"
    SIGNAL = "a signal said so"


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent's thread ends; ends it now where the parent is gone already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def preload() -> None:
    """Imports what a rank needs and keeps it for all of them; makes no device and starts no thread."""
    import flax.nnx  # noqa: F401
    import jax  # noqa: F401

    import ryzanstein_jax.engine.local
    import ryzanstein_jax.orchestrator.worker  # noqa: F401


class Agent:
    """Serves one leader until it goes.

    Args:
        channel: to the leader.
        dialer: by which ranks reach the leader from another machine; None: they inherit sockets.
    """

    def __init__(self, channel: Channel, dialer: Dialer | None = None):
        self._channel, self._dialer = channel, dialer
        self._children: dict[int, RankSpec] = {}
        self._is_ended = False
        # A signal that arrives writes to this pipe, so that the one `poll` below wakes for it too.
        self._wake, self._woken = os.pipe()
        for fd in (self._wake, self._woken):
            os.set_blocking(fd, False)

    def run(self) -> End:
        """Until the leader goes, or SIGTERM or SIGINT asks for an end; all ranks are gone then."""
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGINT, signal.SIGTERM):  # on the leader's machine those are the leader's to handle
            signal.signal(number, signal.SIG_IGN if self._dialer is None else self._end)
        try:
            end = self._serve()
        except ChannelClosedError:
            end = End.LOST
        finally:
            self._finish()
        return End.SIGNAL if self._is_ended else end

    def _serve(self) -> End:
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._is_ended:
            poller.poll()
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
            self._reap()
            # One by one, since descriptors are those of all frames taken: two orders must not mix theirs.
            while (frame := self._channel.receive(0.0)) is not None:
                if frame[0] is Kind.STOP:
                    return End.STOP
                self._obey(*frame)
        return End.SIGNAL

    def _end(self, number: int, frame: object) -> None:
        self._is_ended = True

    def _finish(self) -> None:
        """Kills all ranks and waits for them: the next leader's shall find their devices free."""
        self._kill(list(self._children))
        self._channel.close()
        deadline = time.monotonic() + (_REAP_SECONDS if self._dialer is not None else 0.0)
        while self._children and time.monotonic() < deadline:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            self._children.pop(pid, None)
            if pid == 0:
                time.sleep(0.01)
        if self._dialer is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._woken)

    def _obey(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.SPAWN:
            spec = RankSpec.from_json(parse_json(payload))
            self._spawn(spec, self._channel.take_fds(3) if self._dialer is None else [])
        elif kind is Kind.KILL:
            generation = parse_json(payload).get("generation")
            self._kill([pid for pid, spec in self._children.items() if spec.generation == generation])
        else:
            raise FrameError(f"a frame {kind.name} is nothing that an agent obeys")

    def _spawn(self, spec: RankSpec, fds: list[int]) -> None:
        if len(fds) != 3 and self._dialer is None:
            raise FrameError(f"a rank needs three descriptors, {len(fds)} came")
        parent = os.getpid()
        # What is still in a buffer would be written by both.
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_rank(spec, fds, parent)
        for fd in fds:
            os.close(fd)
        self._children[pid] = spec
        self._channel.send_json(Kind.SPAWNED, {"rank": spec.rank, "generation": spec.generation, "pid": pid})

    def _become_rank(self, spec: RankSpec, fds: list[int], parent: int) -> None:
        """In the child; does not return."""
        status = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            for fd in (self._wake, self._woken):
                os.close(fd)
            self._channel.close()
            control, steps, log = self._channels(spec, fds)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            log.close()
            os.environ.update(spec.environment)
            _rename(f"ryzanstein:{spec.rank}")
            from ryzanstein_jax.orchestrator.worker import Worker

            Worker(spec, control, steps).run()
            status = 0
        except BaseException:  # noqa: BLE001 - this process must never go on as the agent
            traceback.print_exc()
        finally:
            _finish()
            os._exit(status)

    def _channels(self, spec: RankSpec, fds: list[int]) -> tuple[Channel, Channel, socket.socket | io.FileIO]:
        """Those of a rank: control, steps, and what its output goes to; inherited, or dialed."""
        dialer, self._dialer = self._dialer, None  # a rank has no more use for the secret
        if dialer is None:
            control, steps, log = fds
            sockets = [socket.socket(fileno=fd) for fd in (control, steps)]
            return Channel(sockets[0]), Channel(sockets[1]), io.FileIO(log, "w")

        def dial(name: str) -> Channel:
            hello = {"role": "rank", "rank": spec.rank, "generation": spec.generation, "ticket": spec.ticket}
            return dialer.dial({**hello, "channel": name})

        output = dial("log").detach()
        output.setblocking(True)
        steps_channel = dial("steps")
        return dial("control"), steps_channel, output  # in this order: with the last, the leader takes it for complete

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            spec = self._children.pop(pid, None)
            if spec is not None:
                code = os.waitstatus_to_exitcode(status)
                self._channel.send_json(
                    Kind.EXITED, {"rank": spec.rank, "generation": spec.generation, "pid": pid, "code": code}
                )

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _finish() -> None:
    """Runs what is registered for the end of a process, since `os._exit` will not; a stuck library can't hold it up."""
    import atexit

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    signal.alarm(5)
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()


def _rename(name: str) -> None:
    """The name that `ps` and `top` show."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name[:15])


def main() -> None:
    """Serves the leader at the other end of an inherited socket."""
    die_with_parent(int(sys.argv[2]))
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    preload()
    channel.send_json(Kind.HELLO, {"pid": os.getpid()})
    Agent(channel).run()


if __name__ == "__main__":
    main()
