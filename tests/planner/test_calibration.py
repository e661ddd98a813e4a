"""Calibration: measured here in small, kept in a file, used by plans."""

import json

import numpy as np
import pytest

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.planner import calibrate, plan
from ryzanstein_jax.planner.calibration import (
    Calibration,
    Measured,
    calibration_path,
    load_calibration,
    save_calibration,
)
from ryzanstein_jax.sharding import make_mesh
from tests.support import quick_compiles

ONE = Measured(1, 40e9, ((1, 20e9), (64, 200e9)), 0.0, 0.0, 1e-4)
TWO = Measured(2, 30e9, ((1, 15e9), (64, 180e9)), 1e-5, 2e-10, 2e-4, ((1, 1.0), (64, 1.0)))
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
    # 33 all-reduces of one token's 2048 values, at alpha + beta * bytes; the logits come on top.
    least = 33 * (1e-5 + 2e-10 * 4 * 2048)
    assert least < rows[1].step.communication < 1.5 * least
    assert rows[1].speedup == pytest.approx(rows[0].step.total / rows[1].step.total)
    with pytest.raises(ConfigError, match="tensor_parallel_size=4.*measured at 1, 2"):
        plan("llama-3.2-1b", "this", [4])
    with pytest.raises(ConfigError, match="bfloat16"):
        plan("llama-3.2-1b", "this", [1], dtype="bfloat16")


@pytest.mark.parametrize(
    "damage",
    [
        b"not json", b"[]", b"{}", b'{"version": 1}', b"\xff" * 10, b"[" * 100_000, b"1" * (2 << 20),
        json.dumps({"version": 2, "widths": [{"width": 1}]}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_to_be(damage):
    calibration_path().parent.mkdir(parents=True, exist_ok=True)
    calibration_path().write_bytes(damage)
    with pytest.raises(ConfigError, match="damaged"):
        load_calibration()


@pytest.mark.parametrize(
    "change",
    [{"bandwidth": 0.0}, {"alpha": -1.0}, {"rates": []}, {"rates": [[1, float("nan")]]}, {"host_seconds": "x"}],
)
def test_figures_that_none_can_be_are_damage(change):
    path = save_calibration(MADE)
    facts = json.loads(path.read_text())
    facts["widths"][0] |= change
    path.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="damaged"):
        load_calibration()


def test_measuring(monkeypatch):
    """In small: that all of it is measured, and by what law, not how fast this machine is."""
    small = {"_PAIRS": 1, "_ROWS": (1, 8), "_SIZES": (4096, 262144), "_SECONDS": 0.01, "_STEPS": ((1, 0), (0, 16))}
    for name, value in (small | {"_REFERENCE": calibrate._TINY}).items():
        monkeypatch.setattr(calibrate, name, value)
    said: list[str] = []
    with quick_compiles():
        found = calibrate.calibrate([2], said.append)
    (measured,) = found.widths
    assert measured.width == 2 and found.platform == "cpu" and len(said) == 4
    assert measured.alpha + measured.beta > 0 and measured.host_seconds > 0
    assert [rows for rows, _ in measured.rates] == [1, 8]
    assert [tokens for tokens, _ in measured.overheads] == [1, 16]
    assert all(factor >= 1 for _, factor in measured.overheads)
    # One row: two operations for each of a weight's four bytes, which pass at least as fast in one of the products.
    assert measured.bandwidth >= 2 * measured.rates[0][1] * 0.999
    assert calibrate._all_reduces(make_mesh(1), np.dtype("float32")) == (0, 0)
    save_calibration(found)
    assert load_calibration() == found
