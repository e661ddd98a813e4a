"""Starts the agent of a machine that dials its leader, without importing JAX.

The agent's environment, which all ranks inherit and which the kernel shows for as long as they live, does not have the
secret, and neither have its arguments: it comes through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.secret import SECRET_VARIABLE, check_secret, read_secret
from ryzanstein_jax.orchestrator.slots import visible_gpus


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


@dataclass(frozen=True)
class WorkerCommand:
    """What to start.

    Attributes:
        leader: "host:port" to dial.
        secret: that the leader knows.
        name: of this machine; no other agent of the leader may have it.
        devices: that it offers; None: all GPUs, or one CPU device.
        wait_sec: how long to dial until the leader answers.
        reconnect: dial again when the leader is gone.
        parent: process to end with; 0: none.
    """

    leader: str
    secret: bytes = field(repr=False)
    name: str
    devices: int | None = None
    wait_sec: float = 600.0
    reconnect: bool = False
    parent: int = 0

    def become(self) -> None:
        """Turns this process into the agent; does not return."""
        with self._prepared() as (command, environment, _):
            os.execve(command[0], command, environment)

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the agent as a child."""
        with self._prepared() as (command, environment, reading):
            return subprocess.Popen(command, env=environment, pass_fds=[reading], stdin=subprocess.DEVNULL)

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[tuple[list[str], dict[str, str], int]]:
        reading, writing = os.pipe()
        try:
            os.write(writing, self.secret)  # far less than a pipe holds
            os.close(writing)
            os.set_inheritable(reading, True)
            count = self.devices if self.devices is not None else max(1, visible_gpus())
            command = [sys.executable, "-m", "ryzanstein_jax.orchestrator.join", f"--leader={self.leader}"]
            command += [
                f"--secret-fd={reading}",
                f"--name={self.name}",
                f"--devices={count}",
                f"--wait={self.wait_sec}",
            ]
            command += [f"--parent={self.parent}", *(["--reconnect"] if self.reconnect else [])]
            environment = {key: value for key, value in os.environ.items() if key != SECRET_VARIABLE}
            yield command, environment, reading
        finally:
            os.close(reading)
