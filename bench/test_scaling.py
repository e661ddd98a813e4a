"""Strong scaling of prefill, decode and both at once, one core per device, on two kinds of models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import scaling_report as report
from bench.harness import Bench
from bench.machine import describe_machine
from bench.scaling import (
    Workload,
    calibrate_cores,
    check_widths,
    collective_fits,
    device_of,
    groups,
    measure,
)
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.planner.calibration import Calibration
from ryzanstein_jax.planner.shapes import config_of

#: Wide, with few layers and a small vocabulary: nearly all of a prompt's time goes into large matrix products.
COMPUTE_BOUND = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 8192,
    "max_position_embeddings": 1024, "torch_dtype": "float32",
}  # fmt: skip
_TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}

WORKLOADS = (
    Workload("prefill", ((2, 512, 1),), 0, True),
    Workload("decode, batch 1", ((1, 16, 25),), 1, False),
    Workload("decode, batch 32", ((32, 16, 17),), 32, False),
    Workload("mixed, 16 + 512", ((16, 16, 6), (3, 512, 1)), 16, True),
)
_SMOKE_WORKLOADS = (
    Workload("prefill", ((2, 16, 1),), 0, True),
    Workload("decode, batch 2", ((2, 8, 4),), 2, False),
    Workload("mixed, 1 + 16", ((1, 16, 6), (2, 16, 1)), 1, True),
)


@pytest.fixture(scope="module")
def calibrated(request: pytest.FixtureRequest) -> Callable[[int], Calibration | None]:
    """A core, calibrated while as many others are; once a run, and not at all for tiny sizes, which it outlasts."""
    made: dict[int, Calibration] = {}

    def of(width: int) -> Calibration | None:
        if request.config.getoption("--smoke"):
            return None
        if width not in made:
            made[width] = calibrate_cores(width)
        return made[width]

    return of


@pytest.mark.parametrize("shape", ["compute_bound", "memory_bound"])
def test_scaling(
    bench: Bench,
    shape: str,
    calibrated: Callable[[int], Calibration | None],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """A wide model of random weights, and the one of `--model`: the same requests at each width of `--tp`."""
    smoke, name = request.config.getoption("--smoke"), f"scaling_{shape}"
    workloads = _SMOKE_WORKLOADS if smoke else WORKLOADS
    dtype = bench.settings["dtype"]
    try:
        widths = check_widths(request.config.getoption("--tp"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    model, settings = bench.settings["model"], engine_settings(workloads, dtype)
    if shape == "compute_bound":
        (tmp_path / "config.json").write_text(json.dumps(COMPUTE_BOUND | (_TINY if smoke else {})))
        model, settings = str(tmp_path), settings | {"load_format": "dummy"}
    config = config_of(model)
    spec, machine = spec_from_config(config), describe_machine()

    with groups(widths, {"model": model, **settings}) as made:
        rounds = measure(made, workloads, bench.runs, spec.vocab_size)
        description = made[0].description
    fits = {
        width: collective_fits(rounds.all_steps(width), width, dtype, 0.02 if smoke else 0.1)
        for width in widths
        if width > 1
    }
    calibrations = {width: one for width in widths if (one := calibrated(width)) is not None}
    devices = {width: device_of(one, width, fits.get(width, {})) for width, one in calibrations.items()}
    result: dict[str, Any] = {
        "benchmark": name,
        "shape": {key: value for key, value in config.items() if key in COMPUTE_BOUND},
        "model": "random weights" if shape == "compute_bound" else model,
        "dtype": dtype,
        "tensor_parallel_size": widths,
        "cores_per_device": 1,
        "requests": {workload.name: [list(one) for one in workload.requests] for workload in workloads},
        "rounds": bench.runs,
        "workloads": {
            workload.name: report.entries(workload, rounds, fits, devices, spec, dtype) for workload in workloads
        },
        "first_tokens": rounds.first_tokens,
        "first_tokens_as_on_one_device": rounds.same,
        "collectives": fits,
        "calibration": {width: dataclasses.asdict(one) for width, one in calibrations.items()},
        "runs": {
            workload.name: {width: rounds.seconds(workload.name, width) for width in widths} for workload in workloads
        },
        "rounds_disturbed": rounds.disturbed,
        "only_disturbed": rounds.only_disturbed,
        "versions": description["versions"],
        "machine": machine,
    }
    earlier = request.config.getoption("--compare") or bench.folder
    file = earlier / f"{name}.json"
    result["compared"] = report.regressions(result, json.loads(file.read_text()) if file.is_file() else None)
    bench.write(name, result, report.table_of(name, result))
    if importlib.util.find_spec("matplotlib") is not None:
        report.plot(name, result, bench.folder / f"{name}.png")


def engine_settings(workloads: tuple[Workload, ...], dtype: str) -> dict[str, Any]:
    """What an engine starts with to hold all requests of each workload at once."""
    requests = [one for workload in workloads for one in workload.requests]
    longest = max(length + out for _, length, out in requests)
    sequences = max(sum(count for count, _, _ in workload.requests) for workload in workloads)
    return {
        "dtype": dtype,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": max(length for _, length, _ in requests),
        "num_pages": 1 + sequences * -(-longest // 16),
        "page_size": 16,
        "max_model_len": longest,
    }
