"""What it takes to start: seconds from nothing to the first token, and memory."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path

from bench.conftest import start_settings
from bench.harness import MODULES, OURS, THEIRS, Bench, Figures, Side, draw
from bench.protocol import Worker


def _start(bench: Bench, name: str, python: str, cache: Path) -> tuple[float, float, Side]:
    """Seconds from the start of the process to the first token, and peak bytes once a full batch has run."""
    sizes = bench.sizes
    settings = start_settings(bench, name, sizes.batch_in[1] + sizes.batch_out)
    if name == OURS:
        settings["compilation_cache_dir"] = str(cache)
    began = time.perf_counter()
    with closing(Worker(python, MODULES[name])) as worker:
        worker.call("start", **settings)
        worker.call("generate", prompts=draw([sizes.single_in], bench.vocab_size, 400), max_tokens=1)
        seconds = time.perf_counter() - began
        side = Side(name, worker, worker.call("describe"))
        side.generate(draw([sizes.batch_in[1]] * sizes.requests, bench.vocab_size, 401), sizes.batch_out)
        return seconds, worker.call("peak_memory")["bytes"], side


def test_start(bench: Bench, tmp_path: Path) -> None:
    """Cold: nothing compiled yet. Warm: the process before left its compiled programs.

    Transformers compiles nothing, so its two are alike. The model's files are in the system's cache in all of them.
    """
    sides: dict[str, Side] = {}
    results: dict[str, list[Figures]] = {}
    for run in range(bench.runs):
        for name, python in ((OURS, sys.executable), (THEIRS, bench.hf_python)):
            if python is not None:
                cold, _, _ = _start(bench, name, python, tmp_path / str(run))
                warm, peak, sides[name] = _start(bench, name, python, tmp_path / str(run))
                figures = {"cold_seconds": cold, "warm_seconds": warm, "peak_memory_gb": peak / 1e9}
                results.setdefault(name, []).append(figures)
    bench.record("start", list(sides.values()), results)
