"""The benchmark for a GPU, without one: its stages on the processor, its programs compiled for an H100, its record."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from bench import gpu, gpu_study  # noqa: E402
from bench.gpu_cases import SMOKE, Sizes, decode_bytes, prefill_operations, shard_config, shard_jobs, speed_jobs  # noqa: E402
from bench.gpu_stages import Request, card, check_gpu, speed, transformers  # noqa: E402
from bench.gpu_trace import kernels_of  # noqa: E402
from bench.shards import predicted_speedups, whole_model  # noqa: E402
from ryzanstein_jax.model.families import spec_from_config  # noqa: E402
from ryzanstein_jax.model.sizes import PaddedSizes  # noqa: E402
from ryzanstein_jax.planner.compiled import compile_jobs  # noqa: E402
from ryzanstein_jax.planner.devices import DEVICES  # noqa: E402
from ryzanstein_jax.planner.shapes import config_of  # noqa: E402
from tests.support import quick_compiles  # noqa: E402

LLAMA = config_of("llama-3-8b")


def results_of(stage, sizes: Sizes, **known):
    found = {}
    with quick_compiles():
        stage(Request("cpu", sizes, known, None, None), found.__setitem__)
    json.dumps(found)  # it goes to a file
    return found


# --- the stages, on the processor


def test_card_and_speed() -> None:
    limits = results_of(card, SMOKE)
    assert limits["device"]["platform"] == "cpu" and limits["bytes_per_s"] >= limits["copy_bytes_per_s"] > 0
    found = results_of(speed, SMOKE, card=limits)
    names = ("compile_seconds", "decode_1", "decode_1_in_4", "decode_4", "prefill", "first_token")
    assert found.keys() == {f"tiny.{name}" for name in names}
    config, itemsize = SMOKE.speed["tiny"], 4
    for batch in (1, SMOKE.batch):
        one = found[f"tiny.decode_{batch}"]
        assert one["bytes"] == decode_bytes(config, batch, SMOKE.context, itemsize)
        assert one["share_of_bandwidth"] == pytest.approx(one["bytes"] / one["step_seconds"] / limits["bytes_per_s"])
        assert one["tokens_per_s"] == pytest.approx(batch / one["step_seconds"])
    prefill = found["tiny.prefill"]
    needed = prefill_operations(config, SMOKE.prompts, SMOKE.prompt)
    rate = prefill["share_of_matmul_rate"] * limits["operations_per_s"]
    assert rate * prefill["forward_seconds"] == pytest.approx(needed)


def test_attention_alone() -> None:
    (found,) = results_of(gpu_study.attention_alone, SMOKE, card={"bytes_per_s": 1e9}).values()
    assert found["error"] < 1e-5 and found["kernel_seconds"] > 0 and found["portable_seconds"] > 0


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_study.attention.attend_by_kernel
    monkeypatch.setattr(gpu_study.attention, "attend_by_kernel", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(gpu_study.WrongResultError, match="of their size off"):
        results_of(gpu_study.attention_alone, SMOKE)


def test_shards_are_timed_and_predict() -> None:
    sizes = dataclasses.replace(SMOKE, shard_batches=(4,))
    before = os.sched_getaffinity(0)
    try:
        found = results_of(gpu_study.shards, sizes)
    finally:
        os.sched_setaffinity(0, before)
    assert set(found["tiny.width_2"]["4"]) == {"1", "2"}
    predicted = found["tiny.predicted"]
    assert predicted["layers"] == 2 and not predicted["scaled"]
    (one, two) = predicted["rows"]
    assert one["speedup"] == 1 and two["communication_seconds"] > 0 == one["communication_seconds"]
    assert two["step_seconds"] == two["forward_seconds"] + two["sampler_seconds"] + two["communication_seconds"]


def test_the_right_tokens_and_logits() -> None:
    found = results_of(gpu_study.correct, SMOKE)
    assert found["logits.llama"]["largest_error"] < 1e-4
    assert found["tokens_as_on_cpu"] == {"equal": 4, "of": 4}
    assert "left out" in found["default_model"]
    assert "left_out" in results_of(transformers, SMOKE)


def test_without_a_gpu_a_stage_says_so() -> None:
    with pytest.raises(RuntimeError, match="--device cpu"):
        check_gpu()


# --- sizes


def test_a_shard_is_one_device_of_the_model() -> None:
    for name in ("llama-3-8b", "llama-3-70b", "llama-3.2-1b"):
        spec = spec_from_config(config_of(name))
        for width in (1, 2, 4, 8):
            shard = spec_from_config(shard_config(config_of(name), width, spec.num_layers))
            assert shard.num_parameters() == PaddedSizes.of(spec, width).parameters_per_device(spec)
            assert shard.hidden_size == spec.hidden_size and shard.num_heads * width == spec.num_heads


def test_what_a_decode_reads_and_a_prefill_computes() -> None:
    # 8.03e9 parameters, an embedding of 0.53e9 that is not read; 128 KiB of cache for each token.
    assert decode_bytes(LLAMA, 1, 1, 2) == pytest.approx(2 * (8.03e9 - 0.525e9), rel=1e-3)
    assert decode_bytes(LLAMA, 64, 1000, 2) - decode_bytes(LLAMA, 64, 0, 2) == 64 * 1000 * (128 << 10)
    assert prefill_operations(LLAMA, 8, 2048) == pytest.approx(8 * 2048 * 2 * 6.98e9, rel=0.05)


def test_speedups_follow_from_times() -> None:
    times = {32: {1: {4: 1.0, 12: 2.0}, 8: {4: 0.3, 12: 0.5}}}
    assert whole_model(times[32][1], 32) == 4.5
    found = predicted_speedups(LLAMA, times, {32: 0.1}, "NVIDIA H100 80GB HBM3", "bfloat16")
    assert found["scaled"] and found["link"] == DEVICES["h100"].title
    (one, eight) = found["rows"]
    assert eight["target"] == 7.9 and eight["without_communication"] == pytest.approx(4.6 / 1.1)
    # 65 all-reduces of 256 KiB and a gather of 16 MiB: about a millisecond.
    assert 5e-4 < eight["communication_seconds"] < 3e-3
    assert eight["speedup"] == pytest.approx(one["step_seconds"] / eight["step_seconds"])
    assert predicted_speedups(LLAMA, times, {32: 0.1}, "cpu", "float32")["link"] == DEVICES["cpu"].title


# --- the programs, compiled for an H100


def test_the_programs_compile_for_an_h100() -> None:
    """One layer of each: memory fits, and nothing waits for the host."""
    sizes = Sizes()
    one, _, _, prefill, _ = speed_jobs(sizes, "h100")["llama-3.1-8b"]
    found = compile_jobs(LLAMA | {"num_hidden_layers": 1}, [dataclasses.replace(one, sampler=False), prefill])
    found += compile_jobs(shard_config(config_of("llama-3-70b"), 8, 1), shard_jobs(sizes, "h100")[-1:])
    for one in found:
        assert one.total < 0.9 * DEVICES["h100"].memory and one.cache_in_place
        assert one.loops == 0 and one.graphs == 1 and not one.collectives, one.job.name


# --- a trace


def test_a_trace_is_summed() -> None:
    def event(name: str, start: float, duration: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration)

    def line(name: str, *events: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(name=name, events=events)

    streams = [
        line("Stream #14(Compute)", event("gemm", 1000, 300), event("attention", 1300, 100), event("gemm", 1500, 300)),
        line("Stream #15(Memcpy)", event("copy", 1750, 250)),
        line("XLA Modules", event("jit_forward", 1000, 1000)),
    ]
    host = [line("python", event("cuGraphLaunch", 900, 5), event("cuGraphLaunch", 950, 5), event("other", 1, 1))]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=streams), SimpleNamespace(name="/host:CPU", lines=host)]
    found = kernels_of(SimpleNamespace(planes=planes), steps=2)
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm", "copy", "attention"]
    assert found["kernels"][0]["launches"] == 1 and found["kernels"][0]["share"] == pytest.approx(600 / 950)
    assert found["launches"] == 2 and found["graph_launches"] == 1
    assert found["busy_share"] == pytest.approx(0.9)  # nothing ran from 1400 to 1500
    assert kernels_of(SimpleNamespace(planes=[]), 1)["busy_share"] is None


# --- the record


def recorded(tmp_path: Path, script: str, seconds: float = 20) -> dict:
    recorder = gpu.Recorder(tmp_path / "gpu_x.json", {"name": "x"})
    gpu.run_stage("card", {"sizes": "smoke"}, dict(os.environ), recorder, seconds, (sys.executable, "-c", script))
    return json.loads(recorder.path.read_text())["stages"]["card"]


FIRST = (
    "import sys, json, os, time; asked = json.load(sys.stdin); "
    "print(json.dumps({'key': 'a', 'value': asked}), flush=True)"
)


def test_what_a_stage_found_is_kept_however_it_ends(tmp_path: Path) -> None:
    done = recorded(tmp_path, FIRST)
    assert done["state"] == "done"
    assert done["results"]["a"] == {"stage": "card", "known": {"card": {}}, "sizes": "smoke"}
    failed = recorded(tmp_path, f"{FIRST}; sys.stderr.write('no memory'); os._exit(7)")
    assert failed["state"] == "failed with exit code 7" and failed["error"] == "no memory" and "a" in failed["results"]
    died = recorded(tmp_path, f"{FIRST}; os.kill(os.getpid(), 9)")
    assert died["state"] == "failed with exit code -9" and "a" in died["results"]
    late = recorded(tmp_path, f"{FIRST}; time.sleep(60)", seconds=1.5)
    assert late["state"] == "out of time after 2 s" and "a" in late["results"] and late["seconds"] < 15


def test_stages_are_chosen_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def stage(name, request, environment, recorder, seconds):
        ran.append((name, environment["JAX_PLATFORMS"], environment.get("XLA_FLAGS", "")))
        result = recorder.stage(name)
        result |= {"state": "failed with exit code 1" if name == "card" else "done", "seconds": 1.0}
        result["results"]["figure"] = {"a": 1.5, "b": [1]}

    monkeypatch.setattr(gpu, "run_stage", stage)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    command = ["--only", "card,shards,profile_kernels", "--json", str(tmp_path), "--hf-python", "", "--name", "h100"]
    assert gpu.main([*command, "--seconds", "100"]) == 1
    assert [name for name, _, _ in ran] == ["card", "shards", "profile_kernels"]
    assert [flags for _, _, flags in ran] == ["", "", gpu._NO_GRAPHS]
    assert {platforms for _, platforms, _ in ran} == {"cuda,cpu"}, "without a GPU it fails, rather than take hours"
    assert "a 1.5" in capsys.readouterr().out
    assert gpu.main([*command, "--seconds", "0"]) == 1
    content = json.loads((tmp_path / "gpu_h100.json").read_text())
    assert all(found["state"].startswith("left out") for found in content["stages"].values()) and content["machine"]
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])
    *others, last = gpu.STAGES.values()
    assert sum(others) + 70 <= gpu.SECONDS == last < 8 * 60
