"""Runs a measurement in processes of its own, with a deadline: a runtime that hangs or aborts ends only them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from ryzanstein_jax.budget import host_bytes, size_text
from ryzanstein_jax.collectives.bandwidth import OPERATIONS, fit_alpha_beta
from ryzanstein_jax.errors import ConfigError, ProcessGroupError
from ryzanstein_jax.orchestrator.coordinator import Coordinator

DTYPES = ("float32", "bfloat16", "float16")
_MOST_LINE = 1 << 20  # bytes that a process may write without a line's end
#: Buffers of one size that live at once on a device: input, result, and what making and checking them takes.
_BUFFERS = 6
#: What the design asks of an all-reduce over NVLink: 10 MB within a millisecond, at 90% of the link.
AIM_BYTES, AIM_SECONDS, AIM_SHARE = 10_000_000, 1e-3, 0.9


@dataclass(frozen=True)
class Job:
    """What to measure, and on what.

    Attributes:
        processes: ranks; several of them have one device each.
        devices: of the one process.
        operations: of `OPERATIONS`.
        least, most: bytes of the smallest and largest buffer.
        factor: from one size to the next.
        dtype: of the values.
        budget: seconds for the calls of a size, and as many for its loops.
        timeout: seconds for all of it.
        given: variables of the ranks' environment: see `OrchestratorConfig.communication_environment`.

    Raises:
        ConfigError: a field is invalid, or the buffers would not fit this machine's memory.
    """

    processes: int = 1
    devices: int = 2
    operations: tuple[str, ...] = OPERATIONS
    least: int = 1 << 10
    most: int = 1 << 28
    factor: int = 4
    dtype: str = "float32"
    budget: float = 0.3
    timeout: float = 1800.0
    given: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("processes", 1, 64), ("devices", 1, 64), ("factor", 2, 1024), ("least", 4, 1 << 34), ("most", 4, 1 << 34),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(name, value, f"use a whole number from {low} to {high}")
        if self.least > self.most:
            raise ConfigError("least", self.least, f"use at most most={self.most}")
        if self.width < 2:
            raise ConfigError("devices", self.devices, "two devices at least communicate")
        if self.processes > 1 and self.devices != 1:
            raise ConfigError("devices", self.devices, "several processes have one device each")
        if not self.operations or not set(self.operations) <= set(OPERATIONS):
            raise ConfigError("operations", self.operations, f"use some of {', '.join(OPERATIONS)}")
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", self.dtype, f"use one of {', '.join(DTYPES)}")
        for name in ("budget", "timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e6:
                raise ConfigError(name, value, "use a number of seconds above 0")
        needed, there = _BUFFERS * self.width * self.most, min(host_bytes(), psutil.virtual_memory().available)
        if needed > there:
            fits = size_text(there // (_BUFFERS * self.width))
            raise ConfigError(
                "most", self.most, f"{self.width} devices would take {size_text(needed)} of host memory, "
                f"{size_text(there)} are there: use at most {fits}",
            )  # fmt: skip

    @property
    def width(self) -> int:
        """Devices that communicate."""
        return self.processes * self.devices

    @property
    def sizes(self) -> list[int]:
        """Bytes of each measurement."""
        sizes, size = [], self.least
        while size <= self.most:
            sizes.append(size)
            size *= self.factor
        return sizes

    @property
    def points(self) -> list[tuple[str, int]]:
        """Collective and bytes of each measurement; of the all-reduce also `AIM_BYTES`, which the aim is for."""
        extra = {AIM_BYTES} if self.least <= AIM_BYTES <= self.most else set()
        return [
            (operation, size)
            for operation in self.operations
            for size in sorted({*self.sizes, *(extra if operation == "all-reduce" else ())})
        ]


def run_job(job: Job, report: Callable[[Mapping[str, Any]], None] = lambda event: None) -> dict[str, Any]:
    """Measures, and returns what rank 0 runs on, the points, and a fit for each collective.

    Args:
        report: called with each event of rank 0.

    Raises:
        ProcessGroupError: a process failed or died, a result was wrong, or the deadline passed; with its last words.
    """
    coordinator = Coordinator(job.processes) if job.processes > 1 else None
    order = {
        "processes": job.processes,
        "devices": job.devices,
        "points": job.points,
        "dtype": job.dtype,
        "budget": job.budget,
        "given": dict(job.given),
        "address": coordinator.address if coordinator else "",
        "hosted": coordinator.hosted if coordinator else False,
    }
    with contextlib.ExitStack() as stack:
        if coordinator is not None:
            stack.callback(coordinator.close)
        ranks = [stack.enter_context(_Rank(rank, order)) for rank in range(job.processes)]
        events = _listen(ranks, time.monotonic() + job.timeout, job.timeout, report)
    start = next((event for event in events if event["event"] == "start"), None)
    if start is None:
        raise ProcessGroupError("the measurement ended before it began")
    points = [_without_kind(event) for event in events if event["event"] == "point"]
    return {**_without_kind(start), "dtype": job.dtype, "points": points, "fits": fits(points)}


def fits(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Latency and cost of a byte of each collective of `points`; see `fit_alpha_beta`."""
    found = {}
    for operation in dict.fromkeys(point["operation"] for point in points):
        of_it = [point for point in points if point["operation"] == operation]
        if len({point["bytes"] for point in of_it}) >= 2:
            fit = fit_alpha_beta([p["bytes"] for p in of_it], [p["seconds"] for p in of_it])
            found[operation] = {"alpha": fit.alpha, "beta": fit.beta, "error": fit.error}
    return found


class _Rank:
    """A process of the measurement, with what it has written; ended with the block."""

    def __init__(self, rank: int, order: Mapping[str, Any]):
        self.rank, self.buffer, self.is_done = rank, b"", False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `__exit__`
        environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
        environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ryzanstein_jax.collectives.rank", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
        )  # fmt: skip
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(json.dumps({**order, "rank": rank}).encode())

    def __enter__(self) -> _Rank:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()

    def last_words(self) -> str:
        """The end of what it wrote to its standard error."""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        return self._errors.read().decode(errors="replace").strip()

    def lines(self, data: bytes) -> list[dict[str, Any]]:
        """Events of what it wrote; what is no event (a library's print) is left out."""
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        if len(self.buffer) > _MOST_LINE:
            raise ProcessGroupError(f"rank {self.rank} writes without end")
        events = []
        for line in lines:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and isinstance(value.get("event"), str):
                    events.append(value)
        return events


def _listen(
    ranks: list[_Rank], deadline: float, timeout: float, report: Callable[[Mapping[str, Any]], None]
) -> list[dict[str, Any]]:
    """Rank 0's events, once all have come to their end."""
    events: list[dict[str, Any]] = []
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            assert rank.process.stdout is not None
            selector.register(rank.process.stdout, selectors.EVENT_READ, rank)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                stuck = ", ".join(str(rank.rank) for rank in ranks if not rank.is_done)
                raise ProcessGroupError(f"no end within {timeout:g} s; rank {stuck} has not finished")
            for key, _ in selector.select(left):
                rank = key.data
                data = os.read(key.fd, 1 << 16)
                for event in rank.lines(data):
                    if event["event"] == "failed":
                        raise ProcessGroupError(f"rank {rank.rank}: {event.get('message')}")
                    rank.is_done = rank.is_done or event["event"] == "end"
                    if rank.rank == 0:
                        events.append(event)
                        report(event)
                if not data:
                    selector.unregister(key.fileobj)
                    if not rank.is_done:
                        code = rank.process.wait()
                        raise ProcessGroupError(f"rank {rank.rank} ended with {code}: {rank.last_words()}")
    return events


def _without_kind(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "event"}
