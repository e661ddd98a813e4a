"""Strong scaling of prefill, decode and both at once, one core per device, on two kinds of models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bench import scaling_report as report
from bench.harness import Bench
from bench.machine import describe_machine
from bench.scaling import TRIES, Workload, check_widths, collective_fits, groups, measure
from bench.scaling_calibration import Calibrated, device_of
from ryzanstein_jax.model.families import spec_from_config
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


@pytest.mark.parametrize("shape", ["compute_bound", "memory_bound"])
def test_scaling(
    bench: Bench,
    shape: str,
    calibrated: Calibrated,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """A wide model of random weights, and the one of `--model`: the same requests at each width of `--tp`."""
    smoke, name = request.config.getoption("--smoke"), f"scaling_{shape}"
    tries = 1 if smoke else TRIES
    workloads = _SMOKE_WORKLOADS if smoke else WORKLOADS
    try:
        widths = check_widths(request.config.getoption("--tp"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    dtype = bench.settings["dtype"]
    model, settings, config = subject(shape, bench, workloads, tmp_path, smoke=smoke)
    spec, machine = spec_from_config(config), describe_machine()

    with groups([(width, width, settings) for width in widths]) as made:
        rounds = measure(made, workloads, bench.runs, spec.vocab_size, tries)
        description = made[0].description
    budget = 0.02 if smoke else 0.1
    fits = {width: collective_fits(rounds.all_steps(width), width, dtype, budget, tries) for width in widths}
    calibrations = {width: found for width in widths if (found := calibrated(width)) is not None}
    devices = {width: device_of(found[0], width, fits[width]) for width, found in calibrations.items()}
    result: dict[str, Any] = {
        "benchmark": name,
        "shape": {key: value for key, value in config.items() if key in COMPUTE_BOUND},
        "model": model,
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
        "collectives": {width: found for width, found in fits.items() if found},
        "calibration": {
            width: {**dataclasses.asdict(one), "cpu_share_of_others": round(share, 3)}
            for width, (one, share) in calibrations.items()
        },
        "runs": {
            workload.name: {width: rounds.seconds(workload.name, width) for width in widths} for workload in workloads
        },
        "rounds_disturbed": rounds.disturbed,
        "only_disturbed": rounds.only_disturbed,
        "versions": description["versions"],
        "machine": machine,
    }
    earlier = request.config.getoption("--compare") or bench.folder
    file = earlier / f"{bench.file_name(name)}.json"
    result["compared"] = report.regressions(result, json.loads(file.read_text()) if file.is_file() else None)
    bench.write(name, result, report.table_of(name, result))
    if importlib.util.find_spec("matplotlib") is not None:
        report.plot(name, result, bench.folder / f"{bench.file_name(name)}.png")


def subject(
    shape: str, bench: Bench, workloads: tuple[Workload, ...], folder: Path, *, smoke: bool
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, engine settings and `config.json` of the model of that shape, which may be written to `folder`."""
    settings = engine_settings(workloads, bench.settings["dtype"])
    if shape == "memory_bound":
        model = bench.settings["model"]
        return model, {"model": model, **settings}, config_of(model)
    config = COMPUTE_BOUND | (_TINY if smoke else {})
    (folder / "config.json").write_text(json.dumps(config))
    return "random weights", {"model": str(folder), "load_format": "dummy", **settings}, config


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
