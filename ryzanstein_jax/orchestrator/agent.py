"""The agent of a machine: imports everything once, then forks a rank in milliseconds whenever the leader asks.

`python -m ryzanstein_jax.orchestrator.agent FD PARENT` serves the leader that it inherited a socket from. It runs one
thread and never touches a device, so a fork of it is clean. Ranks are its children: it reaps them and tells the leader
how they ended. Without a leader, all of them end: the kernel kills a child whose parent is gone, and the agent itself
sees its socket close.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import traceback

from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind, parse_json
from ryzanstein_jax.orchestrator.status import RankSpec

_PR_SET_PDEATHSIG = 1


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
    """

    def __init__(self, channel: Channel):
        self._channel = channel
        self._children: dict[int, RankSpec] = {}
        # A signal that arrives writes to this pipe, so that the one `poll` below wakes for it too.
        self._wake, self._woken = os.pipe()
        for fd in (self._wake, self._woken):
            os.set_blocking(fd, False)

    def run(self) -> None:
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for ignored in (signal.SIGINT, signal.SIGTERM):  # those of a terminal are the leader's to handle
            signal.signal(ignored, signal.SIG_IGN)
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        try:
            while True:
                poller.poll()
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
                self._reap()
                # One by one, since descriptors are those of all frames taken: two orders must not mix theirs.
                while (frame := self._channel.receive(0.0)) is not None:
                    self._obey(*frame)
        except ChannelClosedError:
            pass
        finally:
            self._kill(list(self._children))

    def _obey(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.SPAWN:
            self._spawn(RankSpec.from_json(parse_json(payload)), self._channel.take_fds(3))
        elif kind is Kind.KILL:
            wanted = parse_json(payload).get("pids")
            # Only its own children: the leader's word is no reason to signal anybody else.
            self._kill([pid for pid in wanted if pid in self._children] if isinstance(wanted, list) else [])
        elif kind is Kind.STOP:
            raise ChannelClosedError("the leader says that this is the end")
        else:
            raise FrameError(f"a frame {kind.name} is nothing that an agent obeys")

    def _spawn(self, spec: RankSpec, fds: list[int]) -> None:
        if len(fds) != 3:
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
            control, steps, log = fds
            os.dup2(log, 1)
            os.dup2(log, 2)
            for fd in (log, self._wake, self._woken):
                os.close(fd)
            self._channel.close()
            os.environ.update(spec.environment)
            _rename(f"ryzanstein:{spec.rank}")
            from ryzanstein_jax.orchestrator.worker import Worker

            Worker(spec, Channel(socket.socket(fileno=control)), Channel(socket.socket(fileno=steps))).run()
            status = 0
        except BaseException:  # noqa: BLE001 - this process must never go on as the agent
            traceback.print_exc()
        finally:
            _finish()
            os._exit(status)

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
