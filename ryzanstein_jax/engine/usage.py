"""What the devices of this process use: their memory, looked at beside the steps, and what collectives brought."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import jax
import psutil

from ryzanstein_jax.engine.report import RankUsage
from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.step import StepPrograms

_LOOK_SECONDS = 1.0


def collective_bytes(programs: StepPrograms, table: str, size: Any) -> int:
    """Results of collectives that one run of a program brings to a device, in bytes.

    Computed, since reading it from a program (`sharding.collectives`) takes hundreds of MB for a moment: an all-reduce
    after the embedding, two a layer, and the logits gathered before they are sampled from. OLMo-2's norms over all
    heads exchange a number a token more, which is left out.
    """
    if programs.mesh.size == 1:
        return 0
    if table != "forwards":
        return 4 * int(size) * programs.sizes.vocab
    # A CPU adds up in float32 whatever the dtype is.
    width = 4 if programs.mesh.devices.flat[0].platform == "cpu" else programs.dtype.itemsize
    spec = programs.spec
    return (2 * spec.num_layers + 1) * int(size.tokens) * spec.hidden_size * width


class UsageMeter:
    """A thread that looks once a second.

    Args:
        programs: compiled.
        runner: counts their runs.
        devices: of this process.
    """

    def __init__(self, programs: StepPrograms, runner: Runner, devices: Sequence[jax.Device]):
        self._programs, self._runner, self._devices = programs, runner, devices
        self._stopped = threading.Event()
        self.latest = self.look()
        threading.Thread(target=self._run, name="usage", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> list[RankUsage]:
        """Memory now, and the bytes of all runs so far."""
        runs = self._runner.runs.copy()
        total = sum(count * collective_bytes(self._programs, *program) for program, count in runs.items())
        if self._devices[0].platform == "cpu":
            return [RankUsage(0, psutil.Process().memory_info().rss, total)]
        return [
            RankUsage(number, (device.memory_stats() or {}).get("bytes_in_use"), total)
            for number, device in enumerate(self._devices)
        ]

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            self.latest = self.look()
