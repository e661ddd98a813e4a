"""What was measured of this machine, in a file of the user's cache folder; `calibrate` makes it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.planner.devices import Costs, Device, Link
from ryzanstein_jax.planner.roofline import Step, cost_units, predict

_VERSION = 3
_MOST_BYTES = 1 << 20
#: Bytes a second where there is nobody to send to: a number still, as JSON wants it.
NO_LINK = 1e18

#: One layer, and so little of everything that a step of it is the host's work.
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64,
    "max_position_embeddings": 256, "torch_dtype": "float32",
}  # fmt: skip
#: A model of usual proportions, larger than caches, of which steps are timed for `fit_costs`.
REFERENCE: dict[str, Any] = {
    **TINY, "vocab_size": 16384, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "intermediate_size": 2816, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Steps of the reference model to time: how many sequences of so many tokens decode, or one prompt of so many."""

    decodes: int
    prompt: int
    tokens: int = 24

    @property
    def step(self) -> Step:
        """The step in the middle."""
        if not self.decodes:
            return Step(prefill=self.prompt)
        return Step(self.decodes, context=self.prompt + self.tokens // 2)


#: Few and many decodes behind short and long prompts, and prompts: so that each of the `Costs` weighs much in one.
#: Prompts are of the engine's own sizes (`batch.bucket_ladder`), else padding would count as costs.
TIMED = (Timed(1, 16), Timed(8, 16), Timed(8, 384), Timed(0, 120), Timed(0, 480))


@dataclass(frozen=True)
class Measured:
    """Of one device while all devices of a width work at once.

    Attributes:
        width: devices at work.
        bandwidth: bytes of weights a second, in products of one row.
        rates: (rows, operations a second) of matrix products.
        collectives: kind -> (alpha, beta): one takes `alpha + beta * bytes` seconds; empty at width 1.
        host_seconds: of a step of a model so small that nothing else takes time.
        costs: what steps of a small model took beyond all that.
        steps_of: width at which the last two were measured; another one where the time did not suffice.
    """

    width: int
    bandwidth: float
    rates: tuple[tuple[int, float], ...]
    collectives: dict[str, tuple[float, float]]
    host_seconds: float
    costs: Costs = field(default_factory=Costs)
    steps_of: int = 0


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
        beta = found.collectives.get("all-reduce", (0.0, 0.0))[1]
        bus = 2 * (width - 1) / width / beta if beta else NO_LINK
        memory = self.memory // width if self.platform == "cpu" else self.memory  # CPU devices share the host's
        source = f"measured by ryzanstein plan --calibrate, {self.made}"
        start = found.collectives.get("all-reduce", (0.0, 0.0))[0]
        return Device(
            "this", self.title, memory, found.bandwidth, {self.dtype: max(rate for _, rate in found.rates)},
            Link(bus, bus, start=start, hop=0.0, measured=found.collectives), found.host_seconds, memory_share=1.0,
            compute_share=1.0,
            sources=dict.fromkeys(
                ("memory_bandwidth", "rates", "link", "collectives", "host_seconds", "costs"), source
            ),
            rate_by_rows=found.rates, costs=found.costs, platform=self.platform,
        )  # fmt: skip


def fit_costs(device: Device, width: int, dtype: str, seconds: Sequence[float]) -> Costs:
    """What steps of the reference model took beyond their prediction, as costs of what they consist of.

    None comes out below 0, and the squared errors relative to the steps' times are least.

    Args:
        device: without costs.
        seconds: of a step of each of `TIMED`.
    """
    spec, names = spec_from_config(REFERENCE), [one.name for one in dataclasses.fields(Costs)]
    plain, sizes = replace(device, costs=Costs()), PaddedSizes.of(spec, width)
    itemsize = 4 if dtype == "float32" else 2
    rows, left = [], []
    for timed, taken in zip(TIMED, seconds, strict=True):
        units = cost_units(spec, sizes, timed.step, itemsize)
        rows.append([getattr(units, name) / taken for name in names])
        left.append(1 - predict(spec, plain, timed.step, width=width, dtype=dtype).total / taken)
    matrix, right = np.asarray(rows), np.asarray(left)
    # Few enough to try which of them are 0; each is of another size, so the columns are scaled.
    scale = np.linalg.norm(matrix, axis=0)
    best, found = float(right @ right), np.zeros(len(names))
    for count in range(1, len(names) + 1):
        for chosen in map(list, combinations(range(len(names)), count)):
            solved = np.linalg.lstsq(matrix[:, chosen] / scale[chosen], right)[0] / scale[chosen]
            error = float(np.sum((matrix[:, chosen] @ solved - right) ** 2))
            if (solved >= 0).all() and error < best:
                best, found = error, np.zeros(len(names))
                found[chosen] = solved
    return Costs(*map(float, found))


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
    rates = tuple((int(at), float(value)) for at, value in facts["rates"])
    collectives = {str(kind): (float(a), float(b)) for kind, (a, b) in facts["collectives"].items()}
    costs = Costs(**{str(name): float(value) for name, value in facts["costs"].items()})
    one = Measured(**{**facts, "rates": rates, "collectives": collectives, "costs": costs})
    numbers = (one.bandwidth, *(value for _, value in one.rates))
    if not one.rates or not all(math.isfinite(x) and x > 0 for x in numbers):
        raise ValueError("no rates above 0")
    numbers = (one.host_seconds, *dataclasses.astuple(costs), *(x for pair in collectives.values() for x in pair))
    if not all(math.isfinite(x) and x >= 0 for x in numbers):
        raise ValueError("a negative time")
    return one
