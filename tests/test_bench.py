"""The benchmarks still run, and notice wrong results; nothing here looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "golden" / "llama"

sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from bench import test_cache_dtypes, test_kernels, test_start  # noqa: E402
from bench.export import export_hf_folder  # noqa: E402
from bench.harness import OURS, SMOKE, THEIRS, Bench, Side, WrongResult, times_better  # noqa: E402
from bench.machine import read_bandwidth  # noqa: E402
from bench.protocol import Worker, WorkerError  # noqa: E402


class FakeWorker:
    """A side whose next token is the last one plus one; `slip` makes the last token of each completion wrong."""

    def __init__(self, slip: int = 0, margin: float = 9.0, short: bool = False):
        self.slip, self.logits, self.short, self.seconds = slip, margin, short, 2.0
        self.seen: list[list[list[int]]] = []

    def call(self, operation: str, **arguments: object) -> dict:
        return getattr(self, operation)(**arguments)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        self.seen.append(prompts)
        tokens = [[p[-1] + i + 1 for i in range(max_tokens - self.short)] for p in prompts]
        for row in tokens:
            row[-1] += self.slip
        return {"tokens": tokens, "seconds": self.seconds, "first_token_seconds": 1.0}

    def margin(self, prompt: list[int], one: int, other: int) -> dict:
        return {"logits": self.logits}

    def start(self, **settings: object) -> dict:
        return {}

    def describe(self) -> dict:
        cache = {"kv_bytes_per_token": 8.0, "num_pages": 3, "cache_tokens": 32}
        return {"versions": {"fake": "1"}, "device": "none", **cache}

    def peak_memory(self) -> dict:
        return {"bytes": 5_000_000_000}

    def close(self) -> None:
        pass


def make_bench(folder: Path, runs: int = 2) -> Bench:
    settings = {"model": "toy", "dtype": "float32", "tensor_parallel_size": 1}
    return Bench(settings, SMOKE, runs, folder / "results", folder, 100, "python")


def run_pair(bench: Bench, **other: object) -> tuple[dict, list[FakeWorker]]:
    workers = [FakeWorker(), FakeWorker(**other)]  # type: ignore[arg-type]
    sides = [Side(name, worker, worker.describe()) for name, worker in zip((OURS, THEIRS), workers, strict=True)]  # type: ignore[arg-type]
    results = bench.take_turns(
        sides, lambda run: [[run, run + 1], [run + 2]], 4, lambda reply: {"seconds": reply["seconds"]}
    )
    bench.record("pair", sides, results)
    return json.loads((bench.folder / f"{bench.file_name('pair')}.json").read_text()), workers


def test_sides_take_turns_on_equal_prompts_that_change(tmp_path: Path) -> None:
    result, workers = run_pair(make_bench(tmp_path))
    assert workers[0].seen == workers[1].seen == [[[run, run + 1], [run + 2]] for run in range(3)]
    assert result["figures"] == {OURS: {"seconds": 2.0}, THEIRS: {"seconds": 2.0}}
    assert result["ratio"] == {"seconds": 1.0}
    assert (result["ties"], result["requests_compared"], len(result["runs"][OURS])) == (0, 6, 2)
    assert {"machine", "versions", "commit", "date", "dtype", "tensor_parallel_size"} <= result.keys()


def test_other_tokens_fail_unless_their_logits_tie(tmp_path: Path) -> None:
    assert run_pair(make_bench(tmp_path), slip=1, margin=1e-4)[0]["ties"] == 6
    for margin in (0.1, float("nan")):
        with pytest.raises(WrongResult, match="token 3"):
            run_pair(make_bench(tmp_path), slip=1, margin=margin)


def test_a_completion_of_another_length_fails(tmp_path: Path) -> None:
    with pytest.raises(WrongResult, match="transformers returned"):
        run_pair(make_bench(tmp_path), short=True)


def test_ratios_above_one_are_better() -> None:
    assert times_better("first_token_seconds", 1.0, 2.0) == times_better("tokens_per_s", 2.0, 1.0) == 2.0
    assert times_better("peak_memory_gb", 1.0, 2.0) == times_better("achieved_gb_per_s", 2.0, 1.0) == 2.0


def test_start_measures_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_start, "Worker", lambda python, module: FakeWorker())
    bench = make_bench(tmp_path)
    test_start.test_start(bench, tmp_path)
    result = json.loads((bench.folder / f"{bench.file_name('start')}.json").read_text())
    assert result["figures"][THEIRS]["peak_memory_gb"] == 5.0
    assert set(result["ratio"]) == {"cold_seconds", "warm_seconds", "peak_memory_gb"}


def test_caches_take_turns_and_are_compared_with_the_first(tmp_path: Path) -> None:
    workers = [FakeWorker(), FakeWorker()]
    workers[1].seconds = 1.0
    sides = [Side(name, worker, worker.describe()) for name, worker in zip(("auto", "int8"), workers, strict=True)]  # type: ignore[arg-type]
    bench = make_bench(tmp_path)
    test_cache_dtypes.compare(bench, sides, {"batch": (3, 4, 8, 6)})
    result = json.loads((bench.folder / f"{bench.file_name('cache_dtypes')}.json").read_text())
    assert result["figures"]["auto"]["batch"] == {"tokens_per_s": 9.0, "ratio": 1.0}
    assert result["figures"]["int8"] == {
        "kv_bytes_per_token": 8.0, "num_pages": 3, "cache_tokens": 32, "batch": {"tokens_per_s": 18.0, "ratio": 2.0},
    }  # fmt: skip
    assert workers[0].seen == workers[1].seen and [len(p) for p in workers[0].seen[0]] == [4, 6, 8]
    assert len(result["runs"]["batch"]["int8"]) == 2 and workers[0].seen[1] != workers[0].seen[2]


def test_kernels_are_compared_by_kinds_of_steps(tmp_path: Path) -> None:
    class Timed(FakeWorker):
        """As long as a prompt takes 1 ms a token and a decode step `pace` ms, whatever its rows."""

        def __init__(self, pace: float):
            super().__init__()
            self.pace = pace

        def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
            self.seconds = (sum(map(len, prompts)) + self.pace * (max_tokens - 1)) / 1000
            return super().generate(prompts, max_tokens)

    workers = [Timed(2.0), Timed(5.0)]
    sides = [Side(n, w, w.describe()) for n, w in zip(test_kernels.SIDES, workers, strict=True)]  # type: ignore[arg-type]
    bench = make_bench(tmp_path)
    test_kernels.compare(bench, sides, 32, (3, 7))
    result = json.loads((bench.folder / f"{bench.file_name('kernels')}.json").read_text())
    expected = {"one decode token": 2.0, "2 decode tokens": 2.0, "a prompt of 8 tokens": 8.0, "32 prompt tokens": 32.0}
    assert result["milliseconds"]["kernels"] == pytest.approx(expected)
    gains = {"one decode token": 2.5, "2 decode tokens": 2.5, "a prompt of 8 tokens": 1.0, "32 prompt tokens": 1.0}
    assert result["times_faster"] == pytest.approx(gains)
    prompts = [tuple(prompt) for batch in workers[0].seen for prompt in batch]
    assert len(set(prompts)) == len(prompts) and workers[0].seen == workers[1].seen, "nothing comes out of a cache"


def test_exported_weights_are_the_models(tmp_path: Path) -> None:
    vocab_size = export_hf_folder(str(MODEL), tmp_path)
    exported, original = load_file(tmp_path / "model.safetensors"), load_file(MODEL / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, values in exported.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, original[name].astype(np.float32))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["vocab_size"]) == ("float32", vocab_size)


def test_a_worker_that_fails_or_dies_says_so() -> None:
    worker = Worker(sys.executable, "bench.our_worker")
    try:
        with pytest.raises(WorkerError, match="no_such"):
            worker.call("no_such")
        with pytest.raises(WorkerError, match="ConfigError"):
            worker.call("start", model="", dtype="float32")
    finally:
        worker.close()
    dead = Worker(sys.executable, "bench.no_such_module")
    try:
        with pytest.raises(WorkerError, match="exit code 1"):
            dead.call("describe")
    finally:
        dead.close()


def test_bandwidth_is_a_speed() -> None:
    assert 1e7 < read_bandwidth(1) < 1e14


def test_the_benchmarks_run_on_a_tiny_model(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--smoke",
        "--runs",
        "1",
        "-k",
        "not start and not scaling and not replicas and not load and not constrained and not strategies and"
        " not narrower and not cache_dtypes and not kernels",
        "--model",
        str(MODEL),
    ]
    command += ["--json", str(tmp_path), "--hf-python", ""]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {path.stem.removesuffix("-portable"): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found.keys() == {"single_stream", "batch", "shared_prefix", "recovery", "quality"}
    quality = found["quality"]["figures"]
    assert quality["float32"]["perplexity_over_float32"] == 1 and quality["float32"]["same_most_likely_token"] == 1
    assert 0.5 < quality["int8"]["perplexity_over_float32"] < 2 and quality["int8"]["perplexity"] > 1
    single = found["single_stream"]
    assert set(single["figures"]) == {OURS}
    assert all(value > 0 for value in single["figures"][OURS].values())
    assert "single_stream" in run.stdout  # the tables are shown without -s
