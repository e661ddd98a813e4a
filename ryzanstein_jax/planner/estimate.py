"""The plan: memory, time, speedup and limit of a model on devices, by width and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.budget import resolve_dtype, resolve_fraction
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.planner.calibration import load_calibration
from ryzanstein_jax.planner.devices import Device, device_named
from ryzanstein_jax.planner.roofline import Step, StepTime, predict
from ryzanstein_jax.planner.shapes import config_of
from ryzanstein_jax.planner.usage import MemoryUse, Setting, largest_batch, memory_use, whole

_MOST_WIDTH, _MOST_BATCH, _MOST_ROWS = 1024, 1 << 16, 4096


@dataclass(frozen=True)
class Estimate:
    """One row: a device, a width and a batch.

    Attributes:
        device: name of the device.
        width, batch: tensor-parallel size, and sequences that decode together.
        memory: of one device.
        largest_batch: most sequences of `context` tokens that fit; 0 where the weights do not.
        step: one decode step.
        first_token: seconds from a prompt to its first token, with nothing else running.
        prefill: where those seconds go, summed over its chunks.
        speedup: of the decode step over width 1, whether or not that fits there.
        prefill_speedup: the same of the prompt.
    """

    device: str
    width: int
    batch: int
    memory: MemoryUse
    largest_batch: int
    step: StepTime
    first_token: float
    prefill: StepTime
    speedup: float
    prefill_speedup: float

    @property
    def efficiency(self) -> float:
        return self.speedup / self.width

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.step.total

    def communication_budget(self, speedup: float) -> float:
        """Seconds of communication at which the step would be so much faster than on one device; below 0: never."""
        return self.speedup * self.step.total / speedup - (self.step.device - self.step.communication)

    def as_dict(self) -> dict[str, Any]:
        facts = dataclasses.asdict(self)
        facts["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        for name, time in (("step", self.step), ("prefill", self.prefill)):
            facts[name] |= {"total": time.total, "communication_share": time.communication_share, "limit": time.limit}
        return {**facts, "efficiency": self.efficiency, "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Plan:
    """A model's estimates. `rows` are in the order of devices, widths, batches."""

    model: str
    spec: ModelSpec
    setting: Setting
    devices: dict[str, Device]
    rows: tuple[Estimate, ...]

    @property
    def widths(self) -> list[int]:
        return list(dict.fromkeys(row.width for row in self.rows))

    @property
    def dtype(self) -> str:
        """Of activations, and of weights that are not quantized, on an accelerator: "auto" is the checkpoint's."""
        return str(resolve_dtype(self.setting.dtype, self.spec.dtype, "gpu"))

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON; times in seconds, sizes in bytes."""
        return {
            "model": self.model,
            "parameters": self.spec.num_parameters(),
            "setting": dataclasses.asdict(self.setting),
            "devices": {name: dataclasses.asdict(device) for name, device in self.devices.items()},
            "rows": [row.as_dict() for row in self.rows],
        }


def plan(
    model: str,
    device: str | Sequence[str] = "h100",
    tensor_parallel_size: Sequence[int] = (1, 2, 4, 8),
    batch: Sequence[int] = (1, 8, 32),
    *,
    shares: tuple[float, float] | None = None,
    **setting: Any,
) -> Plan:
    """Estimates what a model takes and how fast it would be. Nothing is loaded, compiled or measured.

    Args:
        model: a name of `shapes.SHAPES`, or what `LLM` takes: a folder, a `.gguf` file, "smollm2" or a hub id.
        device: names of `devices.DEVICES`; "this" is what `ryzanstein plan --calibrate` measured here.
        tensor_parallel_size: widths.
        batch: sequences that decode together.
        shares: of nominal memory bandwidth and arithmetic that programs reach; None: each device's own.
        setting: fields of `Setting`.

    Raises:
        ConfigError: a device, model or setting is unknown or out of range.
    """
    devices = [device] if isinstance(device, str) else list(device)
    widths, batches = list(tensor_parallel_size), list(batch)
    for name, values, most in (("tensor_parallel_size", widths, _MOST_WIDTH), ("batch", batches, _MOST_BATCH)):
        for value in values:
            whole(name, value, most)
    if not 1 <= len(devices) * len(widths) * len(batches) <= _MOST_ROWS:
        raise ConfigError("batch", batches, f"give 1 to {_MOST_ROWS} combinations of device, width and batch")
    chosen = Setting(**setting)
    spec = spec_from_config(config_of(model), quantization=chosen.quantization)
    most = spec.max_position_embeddings
    for name in ("context", "prompt"):
        if getattr(chosen, name) > most:
            raise ConfigError(name, getattr(chosen, name), f"the model's own limit is {most} tokens")
    rows: list[Estimate] = []
    used: dict[str, Device] = {}
    for name in devices:
        for width in widths:
            one = _device(name, width, shares)
            used[one.name] = one  # of a measured machine the last width's figures, of others always the same
            rows += _estimates(spec, one, _device(name, 1, shares), width, batches, chosen)
    return Plan(model, spec, chosen, used, tuple(rows))


def _device(name: str, width: int, shares: tuple[float, float] | None) -> Device:
    found = load_calibration().device(width) if name == "this" else device_named(name)
    return found if shares is None else found.shares(*shares)


def _estimates(
    spec: ModelSpec, device: Device, single: Device, width: int, batches: Sequence[int], setting: Setting
) -> list[Estimate]:
    dtype = str(resolve_dtype(setting.dtype, spec.dtype, device.platform))
    fraction = resolve_fraction(setting.memory_fraction, device.platform)
    cached = setting.kv_cache_dtype
    prefill, alone = (
        prompt_time(
            spec, one, setting.prompt, setting.max_num_batched_tokens, width=w, dtype=dtype, sharding=setting.sharding,
            kv_cache_dtype=cached,
        )
        for one, w in ((device, width), (single, 1))
    )  # fmt: skip
    most = largest_batch(spec, device, width, dtype, setting, fraction)
    rows = []
    for batch in batches:
        step = Step(decodes=batch, context=setting.context)
        time = predict(spec, device, step, width=width, dtype=dtype, sharding=setting.sharding, kv_cache_dtype=cached)
        one = predict(spec, single, step, width=1, dtype=dtype, kv_cache_dtype=cached)
        memory = memory_use(spec, device, width, dtype, batch, setting, fraction)
        rows.append(
            Estimate(
                device.name, width, batch, memory, most, time, prefill.total, prefill,
                one.total / time.total, alone.total / prefill.total,
            )
        )  # fmt: skip
    return rows


def prompt_time(
    spec: ModelSpec,
    device: Device,
    prompt: int,
    chunk: int,
    *,
    width: int,
    dtype: str,
    sharding: str = "megatron",
    kv_cache_dtype: str = "auto",
) -> StepTime:
    """Where the time of a prompt alone goes, in chunks of at most `chunk` tokens."""
    parts: dict[str, float] = dict.fromkeys(("weights", "compute", "kv", "communication", "host", "other"), 0.0)
    for before in range(0, prompt, chunk):
        step = Step(prefill=min(chunk, prompt - before), before=before)
        time = predict(spec, device, step, width=width, dtype=dtype, sharding=sharding, kv_cache_dtype=kv_cache_dtype)
        for name in parts:
            parts[name] += getattr(time, name)
    return StepTime(**parts, beside=time.beside)
