"""The ways to shard compared: the same requests with each, on as many cores as devices, in turns; and predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.harness import Bench
from bench.machine import describe_machine, num_cores
from bench.scaling import TRIES, Workload, collective_fits, groups, measure
from bench.scaling_calibration import Calibrated, device_of
from bench.strategies_report import entries, table_of
from bench.test_scaling import subject
from ryzanstein_jax.config import SHARDINGS
from ryzanstein_jax.model.families import spec_from_config

WORKLOADS = (
    Workload("prefill", ((2, 512, 1),), 0, True),
    Workload("decode, batch 32", ((32, 16, 17),), 32, False),
)
_SMOKE_WORKLOADS = (
    Workload("prefill", ((2, 16, 1),), 0, True),
    Workload("decode, batch 2", ((2, 8, 4),), 2, False),
)


@pytest.mark.parametrize("shape", ["compute_bound", "memory_bound"])
def test_strategies(
    bench: Bench, shape: str, calibrated: Calibrated, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Megatron's pair, every projection by output, and token shards between the pairs, at the largest `--tp`."""
    smoke, width = request.config.getoption("--smoke"), max(request.config.getoption("--tp"))
    tries = 1 if smoke else TRIES
    if not 2 <= width <= num_cores():
        raise pytest.UsageError(f"--tp {width}: from 2 devices on, a core for each, and there are {num_cores()}")
    workloads = _SMOKE_WORKLOADS if smoke else WORKLOADS
    dtype = bench.settings["dtype"]
    model, settings, config = subject(shape, bench, workloads, tmp_path, smoke=smoke)
    spec, machine = spec_from_config(config), describe_machine()

    with groups([(name, width, settings | {"sharding": name}) for name in SHARDINGS]) as made:
        rounds = measure(made, workloads, bench.runs, spec.vocab_size, tries)
        description = made[0].description
    steps = [step for name in SHARDINGS for step in rounds.all_steps(name)]
    fits = collective_fits(steps, width, dtype, 0.02 if smoke else 0.1, tries)
    calibration, share = calibrated(width) or (None, 0.0)
    device = None if calibration is None else device_of(calibration, width, fits)
    result: dict[str, Any] = {
        "benchmark": f"strategies_{shape}",
        "shape": {key: value for key, value in config.items() if isinstance(value, int | str)},
        "model": model,
        "dtype": dtype,
        "tensor_parallel_size": width,
        "cores_per_device": 1,
        "requests": {workload.name: [list(one) for one in workload.requests] for workload in workloads},
        "rounds": bench.runs,
        "workloads": {
            workload.name: entries(workload, rounds, fits, device, spec, width, dtype) for workload in workloads
        },
        "first_tokens": rounds.first_tokens,
        "first_tokens_as_with_megatron": rounds.same,
        "collectives": fits,
        "calibration": None if calibration is None else dataclasses.asdict(calibration),
        "calibration_cpu_share_of_others": round(share, 3),
        "runs": {
            workload.name: {name: rounds.seconds(workload.name, name) for name in SHARDINGS} for workload in workloads
        },
        "rounds_disturbed": rounds.disturbed,
        "only_disturbed": rounds.only_disturbed,
        "versions": description["versions"],
        "machine": machine,
    }
    bench.write(result["benchmark"], result, table_of(result))
