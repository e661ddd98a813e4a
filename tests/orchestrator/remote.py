"""Machines that are processes: agents that dial a leader on this machine, as `ryzanstein worker` starts them."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ryzanstein_jax.orchestrator.coordinator import free_port
from tests.support import is_running

ROOT = Path(__file__).resolve().parents[2]
SECRET = "an open secret of the tests"


class Machines:
    """The leader's address and secret, and the agents started for it.

    Args:
        folder: for the file of the secret and what agents print.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.secret_file = folder / "secret"
        self.secret_file.write_text(SECRET + "\n")
        self.secret_file.chmod(0o600)
        self.address = f"127.0.0.1:{free_port()}"
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def options(self, **more: Any) -> dict[str, Any]:
        """Of a leader that has no devices of its own."""
        return {
            "listen": self.address,
            "secret_file": str(self.secret_file),
            "num_hosts": 2,
            "local_devices": 0,
            "timeout_sec": 180.0,
            "heartbeat_timeout_sec": 30.0,
            "restart_backoff_sec": 0.0,
            **more,
        }

    def start(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """An agent, which finds the secret in the file unless the arguments or the environment say otherwise."""
        if environment is None and not any(argument.startswith("--secret-file") for argument in arguments):
            arguments = (*arguments, f"--secret-file={self.secret_file}")
        if not any(argument.startswith(("--leader", "--port")) for argument in arguments):
            arguments = (*arguments, f"--leader={self.address}")
        command = [sys.executable, "-m", "ryzanstein_jax.cli", "worker", f"--name={name}", "--wait=60", *arguments]
        with (self.folder / f"{name}.log").open("ab") as log:
            agent = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.agents[name] = agent
        return agent

    def printed(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for agent in self.agents.values():
            agent.kill()
            agent.wait(20)


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """Agents that are gone afterwards, whatever happens."""
    made = Machines(folder)
    try:
        yield made
    finally:
        made.close()


def until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Waits for it to become true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def ranks_of(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that an agent has forked, and that have not ended."""
    return [child for child in psutil.Process(agent.pid).children() if is_running(child)]
