"""Calibration: measured here in small, kept in a file, used by plans."""

import dataclasses
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from ryzanstein_jax.batch import bucket_ladder
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.planner import calibrate, calibration, plan, predict
from ryzanstein_jax.planner.calibration import (
    REFERENCE,
    TIMED,
    TINY,
    Calibration,
    Measured,
    Timed,
    calibration_path,
    fit_costs,
    load_calibration,
    save_calibration,
)
from ryzanstein_jax.planner.devices import Costs
from ryzanstein_jax.sharding import make_mesh
from tests.support import quick_compiles

ONE = Measured(1, 40e9, ((1, 20e9), (64, 200e9)), {}, 1e-4, steps_of=1)
COLLECTIVES = {"all-reduce": (1e-5, 2e-10), "all-gather": (2e-5, 1e-10)}
TWO = Measured(2, 30e9, ((1, 15e9), (64, 180e9)), COLLECTIVES, 2e-4, Costs(1e-5, 1e-11, 1e-12, 1e-10), steps_of=2)
MADE = Calibration("a machine", "cpu", "float32", 16 << 30, "2026-01-01T00:00:00+00:00", {"jax": "0"}, (ONE, TWO))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path))


def test_it_is_kept_and_used():
    with pytest.raises(ConfigError, match="plan --calibrate"):
        plan("llama-3.2-1b", "this", [1])
    assert save_calibration(MADE) == calibration_path()
    assert load_calibration() == MADE
    rows = plan("llama-3.2-1b", "this", [1, 2], [1], context=64, prompt=64).rows
    # One device of 16 GiB or two of 8: a CPU's devices share its memory.
    assert [row.memory.card for row in rows] == [16 << 30, 8 << 30]
    assert rows[0].step.weights == pytest.approx(4 * 1.2358e9 / 40e9, rel=0.02)
    # 33 all-reduces of one token's 2048 values, at alpha + beta * bytes; and its logits, gathered.
    communication = 33 * (1e-5 + 2e-10 * 4 * 2048) + 2e-5 + 1e-10 * 4 * 128256
    assert rows[1].step.communication == pytest.approx(communication)
    # A CPU is its own host: its time comes on top.
    assert rows[1].step.total == pytest.approx(rows[1].step.device + 2e-4)
    assert rows[0].step.other == 0 < rows[1].step.other
    assert rows[1].speedup == pytest.approx(rows[0].step.total / rows[1].step.total)
    with pytest.raises(ConfigError, match="tensor_parallel_size=4.*measured at 1, 2"):
        plan("llama-3.2-1b", "this", [4])
    with pytest.raises(ConfigError, match="bfloat16"):
        plan("llama-3.2-1b", "this", [1], dtype="bfloat16")


@pytest.mark.parametrize(
    "damage",
    [
        b"not json", b"[]", b"{}", b'{"version": 1}', b"\xff" * 10, b"[" * 100_000, b"1" * (2 << 20),
        json.dumps({"version": 3, "widths": [{"width": 1}]}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_to_be(damage):
    calibration_path().parent.mkdir(parents=True, exist_ok=True)
    calibration_path().write_bytes(damage)
    with pytest.raises(ConfigError, match="damaged"):
        load_calibration()


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth": 0.0}, {"collectives": {"all-reduce": [-1.0, 0.0]}}, {"rates": []}, {"rates": [[1, float("nan")]]},
        {"host_seconds": "x"}, {"costs": {"layer": -1.0}}, {"costs": {"unknown": 1.0}}, {"collectives": []},
    ],
)  # fmt: skip
def test_figures_that_none_can_be_are_damage(change):
    path = save_calibration(MADE)
    facts = json.loads(path.read_text())
    facts["widths"][0] |= change
    path.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="damaged"):
        load_calibration()


def test_costs_are_what_the_steps_took_beyond_their_roofline():
    """Steps that took exactly what a device with costs takes give these costs back; faster ones give none."""
    device = MADE.device(2)
    spec = spec_from_config(REFERENCE)

    def seconds(costs: Costs) -> list[float]:
        one = dataclasses.replace(device, costs=costs)
        return [predict(spec, one, timed.step, width=2, dtype="float32").total for timed in TIMED]

    for costs in (Costs(2e-5, 1e-10, 3e-12, 2e-10), Costs(layer=1e-4), Costs(activation=1e-9, cache=1e-9), Costs()):
        found = fit_costs(device, 2, "float32", seconds(costs))
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(costs), rel=1e-3, abs=1e-14)
    assert fit_costs(device, 2, "float32", [0.5 * one for one in seconds(Costs())]) == Costs()


def test_the_prompts_that_are_timed_are_not_padded():
    prompts = {timed.prompt for timed in TIMED if not timed.decodes}
    assert max(timed.decodes for timed in TIMED) == 8
    assert prompts <= {bucket.prefill_tokens for bucket in bucket_ladder(8, max(prompts))}


@pytest.fixture
def small(monkeypatch):
    sizes = {"_PAIRS": 1, "_ROWS": (1, 8), "_SIZES": (4096, 262144), "_SECONDS": 0.01, "_HOST": Timed(1, 2, 4)}
    for name, value in (sizes | {"REFERENCE": TINY, "TIMED": (Timed(2, 4, 3), Timed(0, 16))}).items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibration, "TIMED", calibrate.TIMED)


def test_measuring(small):
    """In small: that all of it is measured, and by what law, not how fast this machine is."""
    said: list[str] = []
    with quick_compiles():
        found = calibrate.calibrate([2], said.append)
    (measured,) = found.widths
    assert measured.width == measured.steps_of == 2 and found.platform == "cpu" and len(said) == 4
    assert measured.collectives.keys() == {"all-reduce", "all-gather", "reduce-scatter"}
    assert all(alpha + beta > 0 for alpha, beta in measured.collectives.values()) and measured.host_seconds > 0
    assert [rows for rows, _ in measured.rates] == [1, 8]
    # One row: two operations for each of a weight's four bytes, which pass at least as fast in one of the products.
    assert measured.bandwidth >= 2 * measured.rates[0][1] * 0.999
    assert calibrate._collectives(make_mesh(1), np.dtype("float32")) == {}
    save_calibration(found)
    assert load_calibration() == found


def test_it_ends_when_its_time_is_over(small, monkeypatch):
    """The first width is measured whole; one for whose steps there is no time takes those before; then none is."""
    now = [0.0]
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))

    def taking(seconds, result):
        def run(*arguments):
            now[0] += seconds
            return result

        return run

    monkeypatch.setattr(calibrate, "products", taking(10, (1e9, ((1, 1e9),))))
    monkeypatch.setattr(calibrate, "_collectives", taking(0, {}))
    monkeypatch.setattr(calibrate, "_host_seconds", taking(5, 1e-3))
    monkeypatch.setattr(calibrate, "_step_seconds", taking(20, [1.0, 1.0]))
    found = calibrate.calibrate([1, 2, 4], seconds=50)  # 35 for the first; 10 more and not 25 for the next
    assert [(one.width, one.steps_of) for one in found.widths] == [(1, 1), (2, 1)]
    assert found.widths[1].costs == found.widths[0].costs and now[0] == 45
    now[0] = 0.0
    assert [one.steps_of for one in calibrate.calibrate([1, 2, 4], seconds=110).widths] == [1, 2, 4]
    now[0] = 0.0
    assert [one.width for one in calibrate.calibrate([4, 2], seconds=1).widths] == [4]
