"""The agent of a machine that dials its leader; `ryzanstein worker` becomes it.

`start_worker` runs in the command and ends in `exec`: the agent's environment, which all ranks inherit and which the
kernel shows for as long as they live, does not have the secret. It comes through a pipe.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from typing import Any

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.agent import Agent, End, die_with_parent, preload
from ryzanstein_jax.orchestrator.dial import Dialer, RefusedError, software
from ryzanstein_jax.orchestrator.frames import Channel, ChannelClosedError, FrameError
from ryzanstein_jax.orchestrator.secret import SECRET_VARIABLE, check_secret, read_secret
from ryzanstein_jax.orchestrator.slots import visible_gpus

_MOST_BACKOFF = 10.0


def find_secret(secret_file: str | None) -> bytes:
    """From the file, or else from the environment.

    Raises:
        ConfigError: it is in neither, or no good.
    """
    if secret_file is not None:
        return read_secret(secret_file)
    secret = os.environ.get(SECRET_VARIABLE)
    if secret is None:
        raise ConfigError("secret_file", None, f"give the file of the leader's secret, or set {SECRET_VARIABLE}")
    return check_secret(secret.encode(), SECRET_VARIABLE, "***")


def start_worker(
    leader: str, secret: bytes, *, name: str, devices: int | None, wait_sec: float, reconnect: bool, parent: int = 0
) -> None:
    """Becomes the agent of this machine; does not return.

    Args:
        leader: "host:port" to dial.
        secret: that the leader knows.
        name: of this machine; no other agent of the leader may have it.
        devices: that it offers; None: all GPUs, or one CPU device.
        wait_sec: how long to dial until the leader answers.
        reconnect: dial again when the leader is gone.
        parent: process to end with; 0: none.
    """
    reading, writing = os.pipe()
    os.write(writing, secret)  # far less than a pipe holds
    os.close(writing)
    os.set_inheritable(reading, True)
    environment = {key: value for key, value in os.environ.items() if key != SECRET_VARIABLE}
    count = devices if devices is not None else max(1, visible_gpus())
    arguments = [f"--leader={leader}", f"--secret-fd={reading}", f"--name={name}", f"--devices={count}"]
    arguments += [f"--wait={wait_sec}", f"--parent={parent}", *(["--reconnect"] if reconnect else [])]
    os.execve(sys.executable, [sys.executable, "-m", "ryzanstein_jax.orchestrator.join", *arguments], environment)


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
        _say(f"joined {dialer.address} as {hello['name']} with {hello['devices']} devices")
        end = Agent(channel, dialer).run()
        _say(end.value)
        if end is End.SIGNAL or not reconnect:
            return 1 if end is End.LOST else 0


def _say(text: str) -> None:
    sys.stderr.write(f"ryzanstein worker: {text}\n")
    sys.stderr.flush()


def main() -> None:
    """Of the process that `start_worker` has become."""
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
