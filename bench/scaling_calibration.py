"""Cores calibrated for the planner as the scaling benchmark uses them, and what it predicts from that."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.machine import describe_machine
from bench.protocol import Worker
from bench.scaling import Group, Steps, Workload, collective_fits, communication_seconds, cores, quietly
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.planner import Step, predict
from ryzanstein_jax.planner.calibration import REFERENCE, TIMED, TINY, Calibration, Measured, Timed, fit_costs
from ryzanstein_jax.planner.devices import Device

#: A calibration for a width, and `cpu_share_of_others`; None where there is to be none.
Calibrated = Callable[[int], tuple[Calibration, float] | None]

_REPEATS = 4  # runs of each workload of the reference model, of which the first does not count

Fits = Mapping[str, Mapping[str, float]]


def calibrate(width: int, dtype: str, budget: float = 0.1) -> tuple[Calibration, float]:
    """What `ryzanstein plan --calibrate` measures, of one core each for so many worker processes.

    Products on all of the cores at once; collectives, the host's part and the steps of the reference model as the
    engine has them, between processes on these cores.

    Args:
        width: devices.
        dtype: of weights and activations.
        budget: seconds for the calls of each size of a collective, and as many for its loops.

    Returns:
        The calibration, and the largest share of the processors that anything else took during one of its parts.
    """
    shares = []
    (bandwidth, rates), share = _products(width, dtype)
    shares.append(share)
    seconds, steps, share = _reference_steps(REFERENCE, TIMED, width, dtype)
    shares.append(share)
    fits = collective_fits(steps, width, dtype, budget)
    shares += [fit["cpu_share_of_others"] for fit in fits.values()]
    (tiny,), tiny_steps, share = _reference_steps(TINY, (Timed(1, 8, 200),), width, dtype)
    shares.append(share)
    host = max(0.0, tiny - communication_seconds(tiny_steps, fits))
    one = Measured(width, bandwidth, rates, _pairs(fits), host, steps_of=width)
    machine = describe_machine()
    made = Calibration(
        f"a core of {machine['cpu']}", "cpu", dtype, psutil.virtual_memory().total,
        datetime.now(UTC).isoformat(timespec="seconds"), {}, (one,),
    )  # fmt: skip
    one = replace(one, costs=fit_costs(made.device(width), width, dtype, seconds))
    return replace(made, widths=(one,)), max(shares)


def device_of(calibration: Calibration, width: int, fits: Fits) -> Device:
    """A calibrated core as the planner's device, with the collectives of these sizes."""
    (one,) = calibration.widths
    return replace(calibration, widths=(replace(one, width=width, collectives=_pairs(fits)),)).device(width)


def predicted(
    spec: ModelSpec, device: Device, steps: Steps, width: int, dtype: str, sharding: str = "megatron"
) -> dict[str, float]:
    """The planner's mean time of a step and of its communication, for programs of the sizes that ran."""
    times = [
        predict(
            spec, device, Step(s["decodes"], round(s["context"]), s["prefill"], s["before"]),
            width=width, dtype=dtype, sharding=sharding,
        )
        for s in steps
    ]  # fmt: skip
    seconds = statistics.fmean(time.total for time in times)
    communication = statistics.fmean(time.communication for time in times)
    return {"seconds_per_step": seconds, "communication_share": communication / seconds}


def _pairs(fits: Fits) -> dict[str, tuple[float, float]]:
    return {kind: (fit["alpha"], fit["beta"]) for kind, fit in fits.items()}


def _products(width: int, dtype: str) -> tuple[tuple[float, tuple[tuple[int, float], ...]], float]:
    """Bandwidth and rates by rows of the slowest core, for which all devices wait."""
    with ExitStack() as stack:
        workers = []
        for core in range(width):
            with cores([core]):
                workers.append(stack.enter_context(closing(Worker(sys.executable, "bench.scaling_worker"))))
        pool = stack.enter_context(ThreadPoolExecutor(width))

        def run() -> list[dict[str, Any]]:
            return list(pool.map(lambda worker: worker.call("products", dtype=dtype), workers))

        replies, share = quietly(run)
    slowest = min(replies, key=lambda reply: reply["bandwidth"])
    return (slowest["bandwidth"], tuple((rows, rate) for rows, rate in slowest["rates"])), share


def _reference_steps(
    shape: Mapping[str, Any], timed: tuple[Timed, ...], width: int, dtype: str
) -> tuple[list[float], Steps, float]:
    """Median seconds of each of the steps, all of their steps, and what everything else took."""
    longest = max(one.prompt + one.tokens for one in timed)
    sequences = max(one.decodes for one in timed)
    settings = {
        "load_format": "dummy", "dtype": dtype, "max_num_seqs": sequences,
        "max_num_batched_tokens": max(16, *(one.prompt for one in timed)), "page_size": 16,
        "num_pages": 1 + sequences * -(-longest // 16), "max_model_len": longest, "enable_prefix_caching": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(shape)))
        with closing(Group(width, {"model": folder, **settings})) as group:
            runs, share = quietly(partial(_run, group, timed, shape["vocab_size"]))
    seconds = [statistics.median(step["seconds"] for step in steps) for steps in runs]
    return seconds, [step for steps in runs for step in steps], share


def _run(group: Group, timed: tuple[Timed, ...], vocab_size: int) -> list[Steps]:
    found: list[Steps] = []
    for number, one in enumerate(timed):
        requests = ((one.decodes, one.prompt, one.tokens),) if one.decodes else ((1, one.prompt, 1),)
        workload = Workload(f"reference {number}", requests, one.decodes, not one.decodes)
        steps: Steps = []
        for repeat in range(_REPEATS if not one.decodes else 2):
            _, taken = group.run(workload, workload.prompts(vocab_size, 100 * number + repeat))
            steps += taken if repeat else []
        found.append(steps)
    return found
