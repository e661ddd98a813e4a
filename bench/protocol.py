"""How the benchmarks talk to the engines: one process per engine, JSON lines over its stdin and stdout.

Standard library only, because the interpreter of the other engine need not have this package's dependencies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(Exception):
    """A worker failed or died; the message holds its traceback or its exit code."""


class Worker:
    """A process that runs one engine, the `module` under the interpreter `python`, and answers one call at a time.

    `variables` are put into its environment.
    """

    def __init__(self, python: str, module: str, variables: Mapping[str, str] | None = None):
        # Neither side may reach for a network, nor see the many devices that the tests ask JAX for.
        environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(variables or {})}
        self._name = module
        self._process = subprocess.Popen(
            [python, "-m", module], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """What the worker's handler of that name returns.

        Raises:
            WorkerError: the handler raised, or the process died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self._name} died in {operation!r} with exit code {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self._name} failed in {operation!r}:\n{reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.kill()
        self._process.wait()


def serve(handlers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers calls until stdin ends. What the engine prints goes to stderr, not between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = handlers[message.pop("operation")](**message)
        except Exception:  # noqa: BLE001 - whatever it is, it goes to the one who asked
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


def peak_memory_bytes() -> int:
    """The most physical memory that this process has held; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
