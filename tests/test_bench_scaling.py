"""The scaling benchmark: who takes turns, what counts, what is said of it; and one run of it in small."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from bench import scaling, scaling_calibration, scaling_report, strategies_report  # noqa: E402
from bench.harness import WrongResult  # noqa: E402
from bench.machine import num_cores  # noqa: E402
from bench.scaling import Rounds, Workload, communication_seconds, cores, measure, quietly  # noqa: E402
from bench.scaling_calibration import device_of, predicted  # noqa: E402
from bench.scaling_report import entries, plot, regressions, table_of, targets_of  # noqa: E402
from bench.test_scaling import COMPUTE_BOUND, WORKLOADS, engine_settings  # noqa: E402
from ryzanstein_jax.model.families import spec_from_config  # noqa: E402
from ryzanstein_jax.planner import predict  # noqa: E402
from ryzanstein_jax.planner.calibration import REFERENCE, TINY, Calibration, Measured, Timed  # noqa: E402
from ryzanstein_jax.planner.devices import Costs  # noqa: E402

DECODE = Workload("decode", ((2, 4, 3),), 2, False)
SPEC = spec_from_config(COMPUTE_BOUND)
ONE = Calibration(
    "a core", "cpu", "float32", 1 << 34, "2026-01-01T00:00:00+00:00", {"jax": "0"},
    (Measured(1, 20e9, ((1, 10e9), (512, 100e9)), {}, 1e-4),),
)  # fmt: skip
FITS = {"all-reduce": {"alpha": 1e-4, "beta": 1e-9, "error": 0.0}, "all-gather": {"alpha": 2e-4, "beta": 0.0}}


def step(decodes: int = 2, prefill: int = 0, seconds: float = 1.0, collectives: tuple = ()) -> dict:
    return {
        "decodes": decodes, "prefill": prefill, "asked_decodes": decodes, "asked_prefill": prefill,
        "context": 5.0, "before": 0, "seconds": seconds, "collectives": [list(one) for one in collectives],
    }  # fmt: skip


class FakeGroup:
    """A width whose steps take 1 / width seconds; `token` is the first one of each completion."""

    log: list[int] = []  # noqa: RUF012 - of all groups, in order

    def __init__(self, width: int, token: int = 7, length: int = 3, steps: int = 2):
        self.width, self.key, self.token, self.length, self.steps = width, width, token, length, steps

    def run(self, workload: Workload, prompts: list[list[int]]) -> tuple[list[list[int]], list[dict]]:
        FakeGroup.log.append(self.width)
        return [[self.token] * self.length for _ in prompts], [step(seconds=1 / self.width)] * self.steps


def run_fakes(*made: FakeGroup) -> Rounds:
    FakeGroup.log.clear()
    return measure(made, [DECODE], 3, 100)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "other_cpu_seconds", lambda: 0.0)


def test_disturbed_rounds_are_repeated_or_told(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0, 0, 0, 1e9, *[1e9] * 1000])  # something else computes in the second round
    monkeypatch.setattr(scaling, "other_cpu_seconds", lambda: next(used))
    rounds = run_fakes(FakeGroup(1), FakeGroup(2))
    assert rounds.disturbed == {"decode": 1} and not rounds.only_disturbed
    assert len(rounds.steps["decode"][2]) == 3 and len(FakeGroup.log) == 2 * 5
    seconds = iter(range(0, 10**12, 10**9))  # something else computes all the time
    monkeypatch.setattr(scaling, "other_cpu_seconds", lambda: next(seconds))
    rounds = run_fakes(FakeGroup(1), FakeGroup(2))
    assert rounds.disturbed == {"decode": 9} and rounds.only_disturbed == ["decode"]
    assert len(rounds.steps["decode"][1]) == 9


def test_a_disturbed_measurement_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.0, 1e9, 1e9, 1e9])  # something else computes during the first
    monkeypatch.setattr(scaling, "other_cpu_seconds", lambda: next(used))
    results = iter("abc")
    assert quietly(lambda: next(results)) == ("b", 0.0)
    seconds = iter([0.0, 3e9, 0.0, 1e9, 0.0, 2e9])
    monkeypatch.setattr(scaling, "other_cpu_seconds", lambda: next(seconds))
    results = iter("abcd")
    found, share = quietly(lambda: (next(results), time.sleep(0.01))[0])
    assert found == "b" and share > 0.1  # none was quiet: the quietest counts


def test_a_core_is_calibrated_as_the_engine_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """From cores and a group that follow a law of their own, the calibration finds the law."""
    fits = {"all-reduce": {"alpha": 1e-4, "beta": 1e-9, "error": 0.0, "cpu_share_of_others": 0.2}}
    rates = ((1, 10e9), (512, 100e9))
    law = Measured(2, 20e9, rates, {"all-reduce": (1e-4, 1e-9)}, 3e-4, Costs(1e-4, 1e-10, 1e-11, 1e-10))
    device = dataclasses.replace(ONE, widths=(law,)).device(2)
    spec = spec_from_config(REFERENCE)

    class LawfulGroup:
        def __init__(self, width: int, settings: dict):
            assert width == 2 and settings["load_format"] == "dummy"
            self.config = json.loads((Path(settings["model"]) / "config.json").read_text())

        def run(self, workload: Workload, prompts: list[list[int]]) -> tuple[list, list[dict]]:
            ((count, length, _),) = workload.requests
            timed = Timed(workload.decodes, length)
            seconds = predict(spec, device, timed.step, width=2, dtype="float32").total
            if self.config == TINY:
                seconds = 3e-4 + 3 * (1e-4 + 1e-9 * 256)  # the host's part, and what two devices say to each other
            assert len(prompts) == count and max(map(max, prompts)) < self.config["vocab_size"]
            return [], [step(seconds=seconds, collectives=(("all-reduce", 256, 2, 3),))] * 3

        def close(self) -> None: ...

    monkeypatch.setattr(scaling_calibration, "Group", LawfulGroup)
    monkeypatch.setattr(scaling_calibration, "_products", lambda width, dtype: ((20e9, rates), 0.05))
    monkeypatch.setattr(scaling_calibration, "collective_fits", lambda *arguments: fits)
    found, share = scaling_calibration.calibrate(2, "float32")
    (measured,) = found.widths
    assert share == 0.2  # the most disturbed of its parts
    assert measured.host_seconds == pytest.approx(law.host_seconds)
    assert dataclasses.astuple(measured.costs) == pytest.approx(dataclasses.astuple(law.costs), rel=1e-3)
    assert measured.collectives == law.collectives


def test_widths_take_turns_and_the_first_round_does_not_count() -> None:
    rounds = run_fakes(FakeGroup(1), FakeGroup(2))
    assert FakeGroup.log == [1, 2, 2, 1, 1, 2, 2, 1]
    assert rounds.seconds("decode", 1) == [1.0, 1.0, 1.0]
    assert rounds.speedups("decode", 2) == [2.0, 2.0, 2.0]
    assert (rounds.first_tokens, rounds.same) == (8, 8)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (FakeGroup(2, token=8), "only 0 of 8 first tokens"),
        (FakeGroup(2, length=2), "completions of"),
        (FakeGroup(2, steps=3), "other steps at 2 than at 1"),
    ],
)
def test_wrong_results_fail(other: FakeGroup, message: str) -> None:
    with pytest.raises(WrongResult, match=message):
        run_fakes(FakeGroup(1), other)


def test_only_steps_of_the_kind_count() -> None:
    wanted = step()
    assert DECODE.counted([step(0, 16), step(1), wanted, step(2, 16)]) == [wanted]
    with pytest.raises(WrongResult, match="decode"):
        DECODE.counted([step(1)])


def test_every_workload_fits_the_engine_that_runs_it() -> None:
    settings = engine_settings(WORKLOADS, "float32")
    for workload in WORKLOADS:
        pages = sum(count * -(-(length + out) // 16) for count, length, out in workload.requests)
        assert pages < settings["num_pages"]
        assert len(workload.max_tokens) == len(workload.prompts(100, 0)) <= settings["max_num_seqs"]


def test_children_run_on_the_cores_that_are_named() -> None:
    before = os.sched_getaffinity(0)
    command = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    with cores([num_cores() - 1]):
        child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stdout.split() == [str(max(before))]
    assert os.sched_getaffinity(0) == before


def test_a_device_for_each_core() -> None:
    most = num_cores()
    assert scaling.check_widths([1])[-1] <= most
    assert scaling.check_widths([most]) == sorted({1, most})
    with pytest.raises(ValueError, match="one core per device"):
        scaling.check_widths([1, most + 1])


def test_communication_is_alpha_and_beta_of_each_collective() -> None:
    reduced = ("all-reduce", 1000, 2, 5)
    fits = {**FITS, "reduce-scatter": {"alpha": 0.0, "beta": 1e-9}}
    found = communication_seconds(
        [step(collectives=(reduced, ("all-gather", 10, 2, 1))), step(collectives=(("reduce-scatter", 100, 4, 1),))],
        fits,
    )
    # The result of a reduce-scatter is a part of what was sent, by which it is measured.
    assert found == pytest.approx((5 * (1e-4 + 1e-6) + 2e-4 + 400e-9) / 2)


def test_predictions_are_those_of_the_planner_with_the_measured_all_reduce() -> None:
    steps = [step(0, 512)]
    alone = predicted(SPEC, device_of(ONE, 1, {}), steps, 1, "float32")
    pair = predicted(SPEC, device_of(ONE, 2, FITS), steps, 2, "float32")
    free = predicted(SPEC, device_of(ONE, 2, {}), steps, 2, "float32")
    # 126 million weights in the layers, multiplied and added for each of 512 tokens, at 100 GFLOP/s.
    assert alone["seconds_per_step"] == pytest.approx(2 * 126e6 * 512 / 100e9, rel=0.05)
    assert alone["communication_share"] == 0 and free["communication_share"] < 1e-9
    # The sampler's all-gather was measured too, and takes 0.2 ms of any size.
    assert pair["seconds_per_step"] - free["seconds_per_step"] == pytest.approx(
        5 * (1e-4 + 1e-9 * 512 * 2048 * 4) + 2e-4, rel=0.01
    )


def measured(speedup: float = 2.0) -> Rounds:
    collectives = (("all-reduce", 1000, 2, 5),)
    runs = {1: [[step(seconds=1.0)]], 2: [[step(seconds=1 / speedup, collectives=collectives)]]}
    return Rounds({"decode": runs})


def result(speedup: float = 2.0, **other: object) -> dict:
    devices = {width: device_of(ONE, width, FITS if width > 1 else {}) for width in (1, 2)}
    found = entries(DECODE, measured(speedup), {2: FITS}, devices, SPEC, "float32")
    made = {
        "shape": COMPUTE_BOUND,
        "dtype": "float32",
        "requests": {"decode": [[2, 4, 3]]},
        "machine": {"cpu": "a CPU"},
    }
    return {**made, "workloads": {"decode": found}, **other}


def test_each_figure_says_whether_it_was_measured() -> None:
    one, two = result()["workloads"]["decode"]
    assert one.keys() == {"width", "steps_per_round", "measured", "predicted"}
    assert one["measured"] == {"seconds_per_step": 1.0, "tokens_per_s": 2.0}
    assert (two["measured"]["speedup"], two["measured"]["efficiency"]) == (2.0, 1.0)
    assert two["estimated"]["communication_share"] == pytest.approx(5 * (1e-4 + 1e-6) / 0.5)
    assert two["target"] == {"speedup": 1.9, "communication_share": 0.1}
    assert 1 < two["predicted"]["speedup"] < 2
    assert two["predicted"]["of_measured"] == two["predicted"]["seconds_per_step"] / 0.5
    bare = entries(DECODE, measured(), {2: FITS}, {}, SPEC, "float32")
    assert all("predicted" not in entry for entry in bare)
    assert targets_of(8)["speedup"] == 7.9
    assert targets_of(3) == {"communication_share": 0.1}


def test_ways_to_shard_are_compared_with_the_first(tmp_path: Path) -> None:
    kinds = {
        "megatron": (("all-reduce", 1000, 2, 5),),
        "sequence": (("all-gather", 1000, 2, 5), ("reduce-scatter", 500, 2, 5)),
    }
    runs = {
        name: [[step(512, seconds=seconds, collectives=kinds[name])] for seconds in times]
        for name, times in (("megatron", (1.0, 2.0, 4.0)), ("sequence", (1.5, 2.2, 2.0)))
    }
    fits = {**FITS, "reduce-scatter": {"alpha": 1e-3, "beta": 1e-9}}
    device = device_of(ONE, 1, fits)
    found = strategies_report.entries(DECODE, Rounds({"decode": runs}), fits, device, SPEC, 2, "float32")
    one, other = found
    assert one["measured"]["ratio"] == 1 and one["measured"]["seconds_per_step"] == 2
    assert [other["measured"][name] for name in ("ratio", "ratio_least", "ratio_most")] == pytest.approx(
        [1.1, 0.5, 1.5]
    )
    # An all-reduce sends each value twice, a reduce-scatter and an all-gather once each.
    assert one["sent_bytes"] == other["sent_bytes"] == 5 * 1000
    assert other["predicted"]["ratio"] > 1 == one["predicted"]["ratio"]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(strategies_report.table_of({"benchmark": "strategies", "workloads": {"decode": found}}))
    text = console.export_text()
    assert "5 all-gather" in text and "1.100" in text


def test_a_fallen_ratio_is_flagged() -> None:
    old = json.loads(json.dumps(result(2.0)))
    assert regressions(result(1.9), old)["regressions"] == []
    fallen = regressions(result(1.7), old)
    assert fallen["regressions"] == [
        "decode, width 2, speed against prediction",
        "decode, width 2, speedup",
    ]
    assert fallen["ratios"]["decode, width 2, speedup"] == pytest.approx(0.85)
    assert "dtype" in regressions(result(1.0, dtype="bfloat16"), old)["note"]
    assert regressions(result(), None)["regressions"] == []


def test_table_and_picture_show_it(tmp_path: Path) -> None:
    made = result(1.7)
    made["compared"] = regressions(made, json.loads(json.dumps(result(2.0))))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table_of("scaling", made))
    text = console.export_text()
    for word in ("measured", "estimated", "predicted", "target", "1.70x", "1.90x", "slower than"):
        assert word in text
    plot("scaling", made, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(scope="module")
def in_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the results and what was printed; the ways to shard take two cores."""
    folder = tmp_path_factory.mktemp("results")
    widths, chosen = ("1,2", "scaling or strategies") if num_cores() > 1 else ("1", "scaling")
    options = ["--smoke", "--runs", "1", "--tp", widths, "--json", str(folder), "--hf-python", ""]
    command = [sys.executable, "-m", "pytest", "bench", "-k", f"compute_bound and ({chosen})", *options]
    command += ["--model", str(ROOT / "tests" / "golden" / "llama")]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run.stdout


def test_the_benchmark_runs_in_small(in_small: tuple[Path, str]) -> None:
    folder, printed = in_small
    widths = [1, 2] if num_cores() > 1 else [1]
    made = json.loads((folder / "scaling_compute_bound.json").read_text())
    assert {"machine", "versions", "commit", "date", "rounds"} <= made.keys()
    for found in made["workloads"].values():
        assert [entry["width"] for entry in found] == widths
        for entry in found[1:]:
            assert entry["estimated"]["communication_share"] > 0
    if widths == [1, 2]:
        # Two layers: an all-reduce after attention, one after the MLP, and one of the embedding.
        assert made["collectives"]["2"].keys() == {"all-reduce", "all-gather"}
        assert made["first_tokens_as_on_one_device"] == made["first_tokens"] > 0
    assert (folder / "scaling_compute_bound.png").exists()
    assert scaling_report.REGRESSION < 1 and "measured" in printed  # the table is shown without -s


def test_the_ways_to_shard_run_in_small(in_small: tuple[Path, str]) -> None:
    if num_cores() == 1:
        return
    folder, _ = in_small
    made = json.loads((folder / "strategies_compute_bound.json").read_text())
    found = {entry["sharding"]: entry for entry in made["workloads"]["prefill"]}
    kinds = {name: [(one["kind"], one["count"]) for one in entry["collectives"]] for name, entry in found.items()}
    # Two layers; the sampler gathers the logits once more.
    assert kinds["megatron"] == [("all-reduce", 5), ("all-gather", 1)]
    assert sum(count for kind, count in kinds["output"] if kind == "all-gather") == 4 * 2 + 1
    assert ("reduce-scatter", 5) in kinds["sequence"]
    assert made["first_tokens_as_with_megatron"] == made["first_tokens"] > 0
