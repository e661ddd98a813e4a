"""This machine's agent as the leader holds it: starts it, talks to it, ends it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

from ryzanstein_jax.errors import ProcessGroupError
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError, Kind

_END_SECONDS = 3.0


class LocalAgent:
    """This machine's agent, as the leader holds it. Start it from a thread that lives as long as it shall."""

    def __init__(self) -> None:
        self.channel, theirs = Channel.pair()
        command = [sys.executable, "-m", "ryzanstein_jax.orchestrator.agent", str(theirs.fileno()), str(os.getpid())]
        # A session of its own: Ctrl-C in the leader's terminal is for the leader to handle.
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self.is_ready = False

    def wait(self, deadline: float) -> None:
        """Until it has imported all.

        Raises:
            ProcessGroupError: it ended, or took too long.
        """
        if self.is_ready:
            return
        try:
            frame = self.channel.receive(max(0.0, deadline - time.monotonic()))
        except (ChannelClosedError, FrameError) as error:
            code = self.process.wait(_END_SECONDS)
            raise ProcessGroupError(f"the agent of this machine ended with {code} while it started: {error}") from error
        if frame is None or frame[0] is not Kind.HELLO:
            raise ProcessGroupError("the agent of this machine did not start in time")
        self.is_ready = True

    def close(self) -> None:
        with contextlib.suppress(ChannelClosedError):
            self.channel.send(Kind.STOP)
        self.channel.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
