"""The agent of a machine that dials its leader: what `worker_command` starts."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from typing import Any

from ryzanstein_jax.errors import counted
from ryzanstein_jax.orchestrator.agent import Agent, End, die_with_parent, preload
from ryzanstein_jax.orchestrator.dial import Dialer, RefusedError, software
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError

_MOST_BACKOFF = 10.0


def dial_until(dialer: Dialer, hello: dict[str, Any], deadline: float) -> Channel:
    """Dials again and again, with longer and longer pauses that are no two machines' the same.

    Raises:
        ChannelClosedError: no leader took us until the deadline.
        FrameError, RefusedError: one answered, and asking again is of no use.
    """
    pause = 0.1
    while True:
        try:
            return dialer.dial(hello)
        except (ChannelClosedError, RefusedError) as error:
            left = deadline - time.monotonic()
            if left <= 0 or (isinstance(error, RefusedError) and error.is_final):
                raise
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(_MOST_BACKOFF, 1.6 * pause)


def serve(dialer: Dialer, hello: dict[str, Any], wait_sec: float, reconnect: bool) -> int:
    """Serves one leader, or one after the other; the exit status: 1 where a leader went without a word."""
    while True:
        channel = dial_until(dialer, hello, time.monotonic() + wait_sec)
        _say(f"joined {dialer.address} as {hello['name']} with {counted(hello['devices'], 'device')}")
        end = Agent(channel, dialer).run()
        _say(end.value)
        if end is End.SIGNAL or not reconnect:
            return 1 if end is End.LOST else 0


def _say(text: str) -> None:
    sys.stderr.write(f"ryzanstein worker: {text}\n")
    sys.stderr.flush()


def main() -> None:
    """Of the process that `worker_command` describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--leader", required=True)
    parser.add_argument("--secret-fd", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--wait", type=float, required=True)
    parser.add_argument("--parent", type=int, default=0)
    parser.add_argument("--reconnect", action="store_true")
    chosen = parser.parse_args()
    if chosen.parent:
        die_with_parent(chosen.parent)
    with open(chosen.secret_fd, "rb") as pipe:
        dialer = Dialer(chosen.leader, pipe.read())
    preload()
    hello = {
        "role": "agent",
        "name": chosen.name,
        "pid": os.getpid(),
        "devices": chosen.devices,
        "software": software(),
    }
    try:
        sys.exit(serve(dialer, hello, chosen.wait, chosen.reconnect))
    except (ChannelClosedError, FrameError, RefusedError) as error:
        _say(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
