"""What was measured of this machine, in a file of the user's cache folder; `calibrate` makes it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.planner.devices import Device, Link

_VERSION = 2
_MOST_BYTES = 1 << 20
#: Bytes a second where there is nobody to send to: a number still, as JSON wants it.
NO_LINK = 1e18


@dataclass(frozen=True)
class Measured:
    """Of one device while all devices of a width work at once.

    Attributes:
        width: devices at work.
        bandwidth: bytes of weights a second, in products of one row.
        rates: (rows, operations a second) of matrix products.
        alpha, beta: an all-reduce takes `alpha + beta * bytes` seconds; 0 at width 1.
        host_seconds: of a step of a model so small that nothing else takes time.
        overheads: (tokens of a step, factor) by which a small model's steps took longer than predicted without it.
    """

    width: int
    bandwidth: float
    rates: tuple[tuple[int, float], ...]
    alpha: float
    beta: float
    host_seconds: float
    overheads: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured.

    Attributes:
        title: of the machine.
        platform: "cpu" or "gpu".
        dtype: in which products were measured.
        memory: bytes of one device at width 1.
        made: when, in ISO format.
        versions: of what it was measured with.
        widths: the measurements.
    """

    title: str
    platform: str
    dtype: str
    memory: int
    made: str
    versions: dict[str, str]
    widths: tuple[Measured, ...]

    def device(self, width: int) -> Device:
        """This machine as a device, at one width.

        Raises:
            ConfigError: the width was not measured.
        """
        found = {one.width: one for one in self.widths}.get(width)
        if found is None:
            known = ", ".join(str(one.width) for one in self.widths)
            raise ConfigError("tensor_parallel_size", width, f"this machine was measured at {known}")
        bus = 2 * (width - 1) / width / found.beta if found.beta else NO_LINK
        memory = self.memory // width if self.platform == "cpu" else self.memory  # CPU devices share the host's
        source = f"measured by ryzanstein plan --calibrate, {self.made}"
        return Device(
            "this", self.title, memory, found.bandwidth, {self.dtype: max(rate for _, rate in found.rates)},
            Link(bus, bus, start=found.alpha, hop=0.0), found.host_seconds, memory_share=1.0, compute_share=1.0,
            sources=dict.fromkeys(("memory_bandwidth", "rates", "link", "collectives", "host_seconds"), source),
            rate_by_rows=found.rates, overheads=found.overheads, platform=self.platform,
        )  # fmt: skip


def calibration_path() -> Path:
    return cache_dir() / "calibration.json"


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Writes the file, whole or not at all, and returns where it is."""
    path = path or calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps({"version": _VERSION, **dataclasses.asdict(calibration)}, indent=1))
    scratch.replace(path)
    return path


def load_calibration(path: Path | None = None) -> Calibration:
    """Reads the file.

    Raises:
        ConfigError: there is none yet, or it is damaged; measuring again makes a new one.
    """
    path = path or calibration_path()
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        facts = json.loads(path.read_bytes())
        if facts.pop("version") != _VERSION:
            raise ValueError("of another version")
        widths = tuple(_measured(one) for one in facts.pop("widths"))
        return Calibration(**facts, widths=widths)
    except FileNotFoundError as error:
        raise ConfigError("device", "this", "measure it first: ryzanstein plan --calibrate") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError("device", "this", f"{path} is damaged ({error}): ryzanstein plan --calibrate") from error


def _measured(facts: dict[str, Any]) -> Measured:
    pairs = {name: tuple((int(at), float(value)) for at, value in facts[name]) for name in ("rates", "overheads")}
    one = Measured(**{**facts, **pairs})
    numbers = (one.bandwidth, *(value for _, value in (*one.rates, *one.overheads)))
    if not one.rates or not all(math.isfinite(x) and x > 0 for x in numbers):
        raise ValueError("no rates above 0")
    if not all(math.isfinite(x) and x >= 0 for x in (one.alpha, one.beta, one.host_seconds)):
        raise ValueError("a negative time")
    return one
