"""Speedups that shards of a model predict: a shard's measured time, plus the planner's time for the collectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.planner.devices import DEVICES, Device
from ryzanstein_jax.planner.links import all_gather, all_reduce
from ryzanstein_jax.planner.roofline import Step, sampler_collectives, step_collectives

#: The original design's speedups, by width.
TARGETS = {2: 1.9, 4: 3.9, 8: 7.9}

#: Seconds of a shard's step, by batch, width and layers.
Times = Mapping[int, Mapping[int, Mapping[int, float]]]


def device_of(kind: str) -> Device:
    """The planner's device for the kind that JAX names; a processor where it is no GPU of the table."""
    words = kind.lower().replace("-", " ").split()
    return next((device for name, device in DEVICES.items() if name in words), DEVICES["cpu"])


def whole_model(by_layers: Mapping[int, float], layers: int) -> float:
    """Seconds with all layers: measured, or on the line through the two numbers of layers that were."""
    if layers in by_layers:
        return by_layers[layers]
    (few, fast), (more, slow) = sorted(by_layers.items())[-2:]
    return slow + (layers - more) * (slow - fast) / (more - few)


def predicted_speedups(
    config: dict[str, Any], times: Times, samplers: Mapping[int, float], kind: str, dtype: str
) -> dict[str, Any]:
    """What each width would gain over one device.

    Args:
        config: `config.json` of the whole model.
        times: of forwards, measured on one device.
        samplers: seconds of the sampler, by batch; every device runs it over all logits.
        kind: of the device, whose links the planner knows.
        dtype: of the activations that are summed over devices.

    Returns:
        `link`: whose collectives were assumed; `layers`: of the model, and of those measured; `rows`: by batch and
        width, seconds of forward, sampler, collectives and step, the speedup and the design's.
    """
    spec, device = spec_from_config(config), device_of(kind)
    itemsize = 4 if dtype == "float32" else 2
    rows = []
    for batch, by_width in sorted(times.items()):
        one = whole_model(by_width[1], spec.num_layers) + samplers[batch]
        for width, by_layers in sorted(by_width.items()):
            sizes = PaddedSizes.of(spec, width)
            forward = whole_model(by_layers, spec.num_layers)
            communication = sum(
                found.count * all_reduce(found.bytes, width, device.link)[1]
                for found in step_collectives(spec, sizes, Step(decodes=batch), itemsize)
            ) + sum(
                found.count * all_gather(found.bytes, width, device.link) for found in sampler_collectives(sizes, batch)
            )
            step = forward + samplers[batch] + communication
            rows.append(
                {
                    "batch": batch, "width": width, "forward_seconds": forward, "sampler_seconds": samplers[batch],
                    "communication_seconds": communication, "step_seconds": step, "speedup": one / step,
                    "without_communication": one / (forward + samplers[batch]), "target": TARGETS.get(width),
                }
            )  # fmt: skip
    measured = sorted({layers for by_width in times.values() for found in by_width.values() for layers in found})
    return {
        "measured_on": kind, "link": device.title, "layers": spec.num_layers, "layers_measured": measured,
        "scaled": spec.num_layers not in measured, "rows": rows,
    }  # fmt: skip
