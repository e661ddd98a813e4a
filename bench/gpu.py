"""All that there is to measure on one GPU, by one command, in less than eight minutes.

    python -m bench.gpu                                     # all stages; JSON in bench/results
    python -m bench.gpu --only card,attention --seconds 120
    python -m bench.gpu --device cpu --only shards          # on one core of a processor

Each stage is a process of its own with a budget of time. What it has found is written at once, so that a run
that is cut off keeps it; a stage that fails is recorded, and the next one begins.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.machine import commit, describe_machine
from bench.protocol import ROOT
from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.checkpoint.default_model import MEMBER

#: What a run may take in all: less than eight minutes.
SECONDS = 470
#: Stage -> most seconds of it; in the order in which they are worth having. The last, which compiles for long, takes
#: what the others left.
STAGES = {
    "card": 30, "correct": 60, "attention": 70, "speed": 100, "profile": 30, "shards": 90, "profile_kernels": 20,
    "transformers": SECONDS,
}  # fmt: skip
#: Of a stage's process besides those of this one.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
#: Kernels in a CUDA graph may show as one in a trace: this stage runs without graphs, and shows them all.
_NO_GRAPHS = "--xla_gpu_enable_command_buffer="


class Recorder:
    """The result so far, on disk after each change."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.content = {
            "benchmark": "gpu", **settings, "stages": {}, "machine": describe_machine(), "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip

    def stage(self, name: str) -> dict[str, Any]:
        return self.content["stages"].setdefault(name, {"state": "running", "results": {}})

    def write(self) -> None:
        """Whole or not at all, whenever the process is killed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)

    def known(self) -> dict[str, Any]:
        return {name: stage["results"] for name, stage in self.content["stages"].items()}


def run_stage(
    name: str, request: dict[str, Any], environment: dict[str, str], recorder: Recorder, seconds: float,
    command: Sequence[str] = (sys.executable, "-m", "bench.gpu_stages"),
) -> None:  # fmt: skip
    """Runs a stage for at most so many seconds; its results, and how it ended, go to the recorder."""
    stage, began = recorder.stage(name), time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: Any = process.stdout) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            process.stdin.write(json.dumps({"stage": name, "known": recorder.known(), **request}))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died before it had read: its exit code tells
        try:
            while True:
                line = lines.get(timeout=max(0.0, began + seconds - time.monotonic()))
                if line is None:
                    code = process.wait()
                    # What a runtime prints before it dies is all that tells why.
                    if code:
                        said.seek(0)
                        stage.setdefault("error", said.read()[-3000:])
                    stage["state"] = "done" if code == 0 else f"failed with exit code {code}"
                    break
                message = json.loads(line)
                if "error" in message:
                    stage["error"] = message["error"]
                else:
                    stage["results"][message["key"]] = message["value"]
                recorder.write()
        except queue.Empty:
            stage["state"] = f"out of time after {seconds:.0f} s"
        finally:
            # It and what it started: the other engine's process is one of them.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    stage["seconds"] = round(time.monotonic() - began, 1)
    recorder.write()


def table(content: dict[str, Any]) -> Table:
    """The figures of a result, one a line."""
    shown = Table("stage", "figure", "value", title=f"gpu: {content['name']}")
    for name, stage in content["stages"].items():
        shown.add_row(name, stage["state"], f"{stage.get('seconds', 0):.0f} s")
        for key, value in stage["results"].items():
            if isinstance(value, dict) and "rows" in value:
                for row in value["rows"]:
                    what = f"{key}, batch {row['batch']}, {row['width']} devices"
                    shown.add_row("", what, f"{row['speedup']:.2f}x (target {row['target']})")
            else:
                shown.add_row("", key, _brief(value))
    return shown


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items() if not isinstance(v, list | dict))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 where one of them did not end well."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, of {','.join(STAGES)}")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that all runs")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most that all stages take together")
    parser.add_argument("--hf-python", help="one with torch and transformers; default: this, if it has them; '': none")
    parser.add_argument("--model", type=Path, default=cache_dir() / "models" / Path(MEMBER).name,
                        help="file of the default model, whose tokens are compared if it is there")  # fmt: skip
    parser.add_argument("--name", help="of the result; default: gpu, or cpu")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results", help="folder of the result")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(STAGES):
        parser.error(f"--only: there is no stage {', '.join(sorted(unknown))}")
    hf_python = options.hf_python
    if hf_python is None and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        hf_python = sys.executable
    sizes = "smoke" if options.smoke else "cpu" if options.device == "cpu" else "full"
    model = str(options.model) if options.model.is_file() and not options.smoke else None
    name = options.name or options.device
    recorder = Recorder(options.json.absolute() / f"gpu_{name}.json", {"name": name, "sizes": sizes})
    request = {"device": options.device, "sizes": sizes, "hf_python": hf_python or None, "model": model}
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        began = time.monotonic()
        for stage in (stage for stage in STAGES if stage in chosen):
            # Programs that two stages need are compiled once.
            environment = {"JAX_COMPILATION_CACHE_DIR": folder, **os.environ, **_ENVIRONMENT}
            environment.pop("JAX_NUM_CPU_DEVICES", None)
            # Without a GPU a stage shall fail, and not take its time on the processor, which `correct` needs too.
            environment["JAX_PLATFORMS"] = "cpu" if options.device == "cpu" else "cuda,cpu"
            if stage == "profile_kernels" and options.device == "gpu":
                environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_NO_GRAPHS}".strip()
            left = options.seconds - (time.monotonic() - began)
            if left < 5:
                recorder.stage(stage)["state"] = "left out: no time was left"
                recorder.write()
                continue
            # A processor takes its time; the budgets are for GPUs.
            budget = left if options.device == "cpu" else min(left, STAGES[stage])
            run_stage(stage, request, environment, recorder, budget)
            print(f"{stage}: {recorder.stage(stage)['state']}, {recorder.stage(stage)['seconds']} s", flush=True)
    Console(width=140).print(table(recorder.content))
    return int(any(stage["state"] != "done" for stage in recorder.content["stages"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
