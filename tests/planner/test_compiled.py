"""The engine's own programs compiled for GPUs that are not here, held against the plan."""

import dataclasses
import io
import sys

import pytest
from rich.console import Console

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.quantization import QUANTIZATIONS
from ryzanstein_jax.model.quantized_checkpoints import quantization_config
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.planner.compiled import CompileError, compile_jobs, engine_jobs, expected
from ryzanstein_jax.planner.devices import DEVICES
from ryzanstein_jax.planner.gpu_targets import TARGETS, target_config
from ryzanstein_jax.planner.report import compiled_table, same_collectives
from ryzanstein_jax.planner.shapes import config_of

#: Two layers of the real sizes: a program's kernels are the same as with all 32.
CONFIG = config_of("llama-3-8b") | {"num_hidden_layers": 2}
SPEC = spec_from_config(CONFIG)
WIDTHS = (1, 2, 4, 8)


#: By device and width. For one token the compiler used to gather a whole table.
BATCHES = {
    ("h100", 1): 8, ("h100", 2): 4, ("h100", 4): 8, ("h100", 8): 1,
    ("h200", 1): 4, ("h200", 2): 1, ("h200", 4): 4, ("h200", 8): 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def programs():
    """Decode and prefill by device and width; the sampler, which is of the same form everywhere, on one."""
    jobs = [
        dataclasses.replace(job, sampler=job.sampler and (device, width) == ("h100", 4))
        for (device, width), batch in BATCHES.items()
        for job in engine_jobs(device, width, batch, context=8192, prefill=512)
    ]
    return {(found.job.device, found.job.width, found.job.prefill > 0): found for found in compile_jobs(CONFIG, jobs)}


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("device", ["h100", "h200"])
def test_the_compiled_program_is_as_planned(programs, device, width, prefill):
    found = programs[device, width, prefill]
    planned = expected(SPEC, found.job)
    assert planned.total == pytest.approx(found.total, rel=0.02)
    assert found.total < DEVICES[device].memory
    # Two all-reduces a layer and that of the embedding, in bfloat16; the sampler gathers the logits.
    assert same_collectives(found, planned)
    reduces = [one.count for one in found.collectives if one.kind == "all-reduce"]
    assert reduces == ([2 * 2 + 1] if width > 1 else [])
    # The whole cache is written where it lies; no copy of one layer's keys is made beside it.
    assert found.cache_in_place
    if not prefill:
        assert found.temporaries < found.cache / 4
    # Nothing waits for the host: attention is a kernel, and what lies between all-reduces by NCCL a graph.
    assert found.loops == 0
    assert found.graphs == 1 if width == 1 or not prefill else 0 < found.graphs <= 2 * 2 + 2
    assert found.kernels > 2 * 4  # at least a layer's four products


def test_the_table_shows_them(programs):
    shown = io.StringIO()
    Console(file=shown, width=300).print(
        compiled_table([(found, expected(SPEC, found.job)) for found in programs.values()])
    )
    text = shown.getvalue()
    assert "NO" not in text and "5 all-reduce of 64 KiB" in text and "1 decodes" in text and "1 all-gather of" in text


def test_a_description_for_each_gpu():
    assert set(TARGETS) == {name for name, device in DEVICES.items() if device.platform == "gpu"}
    for name in TARGETS:
        text = target_config(name)
        assert f"memory_bandwidth: {int(DEVICES[name].memory_bandwidth)}" in text and text.count("{") == text.count("}")
    with pytest.raises(ConfigError, match="cpu"):
        target_config("cpu")


def test_what_fails_is_said():
    (job, _) = engine_jobs("h100", 2, 1, context=64, prefill=64)
    with pytest.raises(CompileError, match="more than 0.01 seconds"):
        compile_jobs(CONFIG, [job], timeout=0.01)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.split(".")[0] in ("jax_plugins", "nvidia")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"ryzanstein-jax\[plan\]"):
        compile_jobs(CONFIG, engine_jobs("h100", 1, 1, context=64, prefill=64))


@pytest.mark.parametrize(("device", "cache"), [("h100", "int8"), ("a100", "fp8")])
def test_a_cache_of_8_bits_is_read_by_the_kernel(device, cache):
    """Attention is a kernel also on GPUs that know no float8, and makes no copy of the cache in another precision."""
    jobs = engine_jobs(device, 1, 4, context=8192, prefill=512, kv_cache_dtype=cache)
    for found in compile_jobs(CONFIG, [dataclasses.replace(job, sampler=False) for job in jobs]):
        planned = expected(SPEC, found.job)
        assert planned.total == pytest.approx(found.total, rel=0.02)
        assert found.cache == found.job.num_pages * 16 * (2 * 2 * 8 * 132 + 4)
        assert found.cache_in_place and found.loops == 0
        assert found.temporaries < found.cache / 4 or found.job.prefill


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantized_programs_hold_quantized_weights(name):
    """4 bits lie in pairs on the device, and no kernel is written out in another precision to decode a token."""
    config = CONFIG | {"quantization_config": quantization_config(QUANTIZATIONS[name])}
    spec, (job, _) = spec_from_config(config), engine_jobs("h100", 2, 4, context=8192, prefill=512)
    (found,) = compile_jobs(config, [job])
    planned = expected(spec, job)
    sizes = PaddedSizes.of(spec, 2)
    weights, floats = sizes.weight_bytes_per_device(spec, 2), sizes.parameters_per_device(spec) * 2
    assert found.arguments - found.cache == pytest.approx(weights, rel=0.01)
    assert weights < {"int8": 0.52, "int4": 0.45, "fp8": 0.52}[name] * floats
    assert same_collectives(found, planned) and found.cache_in_place
    assert found.temporaries < 14336 // 2 * 4096 * 2, "less than the smallest of an MLP's kernels in bfloat16"
