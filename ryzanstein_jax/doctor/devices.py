"""What JAX makes of this machine, tried in a process of its own: that one may hang or abort."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ryzanstein_jax.budget import size_text
from ryzanstein_jax.doctor.finding import Section
from ryzanstein_jax.errors import counted

#: What the process does until each of its lines comes.
_STAGES = {
    "imported": "importing JAX",
    "backend": "starting the backend",
    "computed": "multiplying matrices on each device",
    "communicated": "adding up over all devices",
}
_MOST_OUTPUT = 1 << 20
#: What the runtime writes when it gives up -> what to do. The first that is found counts.
_REMEDIES = (
    (r"Unknown flags? in XLA_FLAGS: *([^\n]*)", "take the flag out of XLA_FLAGS: this version does not know it"),
    (r"(Flag parsing failed)", "give the flags in XLA_FLAGS values that this version reads (jax 0.10: 60, not 60s)"),
    (r"(CUDA_ERROR_\w+)", "see that nvidia-smi works; a reset (nvidia-smi -r) or a restart may be needed"),
    (r"(RESOURCE_EXHAUSTED|out of memory)", "stop what takes the memory: see the GPUs' findings, and `nvidia-smi`"),
    (r"((?:ncclSystemError|ncclUnhandledCudaError|NCCL)[^\n]{0,200})",
     "run again with NCCL_DEBUG=INFO and NCCL_DEBUG_FILE=/dev/stderr to see what NCCL met; try NCCL_P2P_DISABLE=1"),
    (r"(no version information available|undefined symbol[^\n]*|cannot open shared object[^\n]*)",
     "unset LD_LIBRARY_PATH, and install the plugin again"),
)  # fmt: skip


def check_devices(section: Section, seconds: float, given: Mapping[str, str] | None = None) -> None:
    """Runs the probe for `seconds` at most; `given` are variables that the config sets."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", "ryzanstein_jax.doctor.probe", str(os.getpid())]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment | dict(given or {}),
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver holds may outlive its end
                process.wait(5.0)
        judge(section, _lines(_text_of(output)), code, _text_of(errors), seconds)


def judge(section: Section, said: Sequence[Mapping[str, Any]], code: int | None, errors: str, seconds: float) -> None:
    """What the probe's lines, its exit status (None: it had to be ended) and its errors mean."""
    stages = {str(line.get("stage")): line for line in said}
    missing = next((stage for stage in _STAGES if stage not in stages), None)
    if (backend := stages.get("backend")) is not None:
        _tell_devices(section, backend)
    if "computed" in stages:
        section.ok("each device multiplies matrices rightly")
    if missing is None:
        count = int(stages["communicated"].get("devices", 0))
        section.ok(f"an all-reduce over {counted(count, 'device')} adds up rightly")
        return
    doing = _STAGES[missing]
    if (failed := stages.get("failed")) is not None:
        text = str(failed.get("message"))
        section.problem(f"{doing} fails: {text[:600]}", _remedy(text + errors)[1])
    elif code is None:
        section.problem(
            f"{doing} did not end within {seconds:g} s",
            _remedy(errors)[1]
            if _remedy(errors)[0]
            else "run again with --timeout 300, and with NCCL_DEBUG=INFO for "
            "GPUs; if it hangs alike, try NCCL_P2P_DISABLE=1 and NCCL_SHM_DISABLE=1 in turn",
        )
    else:
        how = f"signal {-code}" if code < 0 else f"status {code}"
        cause, remedy = _remedy(errors)
        section.problem(
            f"{doing} ended the process with {how}: {cause or errors.strip()[-600:] or 'it said nothing'}", remedy
        )


def _tell_devices(section: Section, backend: Mapping[str, Any]) -> None:
    devices = list(backend.get("devices", ()))
    section.facts |= {name: backend.get(name) for name in ("platform", "devices", "cuda")}
    kinds = sorted({str(device.get("kind")) for device in devices})
    memory = [int(device["memory"]) for device in devices if device.get("memory")]
    room = f", {size_text(min(memory))} each for JAX" if memory else ""
    section.ok(
        f"JAX has {counted(len(devices), 'device')} of platform {backend.get('platform')} ({', '.join(kinds)}){room}"
    )
    # The libraries may be there, as for `ryzanstein plan --compile`, and nothing to run them on.
    if backend.get("cuda") and backend.get("platform") != "cpu":
        section.ok(", ".join(f"{name} {number}" for name, number in backend["cuda"].items()))


def _remedy(text: str) -> tuple[str, str]:
    """The cause that an output names, and what to do about it."""
    for pattern, remedy in _REMEDIES:
        if match := re.search(pattern, text):
            return match[0].strip(), remedy
    return "", "run `python -c 'import jax; print(jax.devices())'` to see all of what it says"


def _text_of(file: Any) -> str:
    """The end of what was written to a temporary file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _MOST_OUTPUT))
    return str(file.read().decode(errors="replace"))


def _lines(text: str) -> list[dict[str, Any]]:
    """JSON objects among the lines; a library may print others."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
