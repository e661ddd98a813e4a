"""Options of the benchmarks, and the two engines they drive."""

from __future__ import annotations

import faulthandler
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from bench.export import export_hf_folder
from bench.harness import MODULES, OURS, SMOKE, THEIRS, Bench, Side, Sizes
from bench.protocol import ROOT, Worker
from bench.scaling_calibration import Calibrated, calibrate
from ryzanstein_jax.planner.calibration import Calibration

_bench = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--model", default="smollm2", help="what LLM() takes")
    group.addoption(
        "--tp", type=_widths, default="1", help="tensor-parallel size of this package's side; of scaling all, as in 1,2"
    )
    group.addoption(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of this package's side"
    )
    group.addoption("--quantization", help="of this package's side, such as int8")
    group.addoption("--hf-dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of transformers")
    group.addoption("--runs", type=int, default=3, help="measured repetitions")
    group.addoption("--windows", type=int, default=24, help="quality: windows of 512 tokens")
    group.addoption("--hf-python", help="one with torch and transformers; default: this, if it has them; '': none")
    group.addoption("--json", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    group.addoption("--compare", type=Path, help="scaling: folder of the earlier results; default: that of --json")
    group.addoption("--smoke", action="store_true", help="tiny sizes, to see that the benchmarks run")


def _widths(text: str) -> list[int]:
    widths = [int(part) for part in text.split(",")]
    if min(widths) < 1:
        raise ValueError(text)
    return widths


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup() -> None:
    # The limit after which a hanging test ends the run is no limit for a benchmark on a slow machine.
    faulthandler.cancel_dump_traceback_later()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    console = Console(file=sys.stdout, width=100)
    for table in config.stash[_bench].tables if _bench in config.stash else ():
        console.print(table)


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    option = request.config.getoption
    hf_python = option("--hf-python")
    if hf_python is None and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        hf_python = sys.executable
    settings = {
        "model": option("--model"), "dtype": option("--dtype"), "quantization": option("--quantization"),
        "tensor_parallel_size": max(option("--tp")),
    }  # fmt: skip
    sizes = SMOKE if option("--smoke") else Sizes()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        vocab_size = export_hf_folder(option("--model"), Path(folder))
        bench = Bench(
            settings,
            sizes,
            option("--runs"),
            option("--json").absolute(),
            Path(folder),
            vocab_size,
            hf_python or None,
            option("--hf-dtype"),
        )
        request.config.stash[_bench] = bench
        yield bench


@pytest.fixture(scope="session")
def calibrated(request: pytest.FixtureRequest) -> Calibrated:
    """A core, calibrated while as many others are; once a run, and not at all for tiny sizes, which it outlasts."""
    option = request.config.getoption

    @cache
    def of(width: int) -> tuple[Calibration, float] | None:
        return None if option("--smoke") else calibrate(width, option("--dtype"))

    return of


@pytest.fixture(scope="session")
def sides(bench: Bench) -> Iterator[list[Side]]:
    """This package's side and, where there is an interpreter for it, transformers'; both loaded."""
    s = bench.sizes
    longest = max(s.single_in + s.single_out, s.batch_in[1] + s.batch_out, s.prefix + s.prefix_in + s.prefix_out)
    with ExitStack() as stack:
        sides = []
        for name, python in ((OURS, sys.executable), (THEIRS, bench.hf_python)):
            if python is not None:
                worker = stack.enter_context(closing(Worker(python, MODULES[name])))
                worker.call("start", **start_settings(bench, name, longest))
                sides.append(Side(name, worker, worker.call("describe")))
        yield sides


def start_settings(bench: Bench, side: str, longest: int) -> dict[str, object]:
    """What a side starts with to hold all requests at `longest` tokens each."""
    if side == THEIRS:
        return {"model": str(bench.exported), "dtype": bench.their_dtype}
    return {
        **bench.settings,
        "max_num_seqs": bench.sizes.max_num_seqs,
        "max_num_batched_tokens": bench.sizes.max_num_batched_tokens,
        "num_pages": 1 + bench.sizes.requests * -(-longest // 16),
        "page_size": 16,
        "max_model_len": longest,
    }
