"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.protocol import ROOT

_REPEATS = 5


def describe_machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory, Python."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def other_cpu_seconds() -> float:
    """CPU seconds that everything but this process and its living children has used since the machine started."""
    busy = psutil.cpu_times()
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ours = sum(sum(process.cpu_times()[:2]) for process in own)
    return busy.user + busy.nice + busy.system + getattr(busy, "steal", 0.0) - ours


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; "" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_bandwidth(megabytes: int) -> float:
    """Bytes per second that the cores read together: the best of several sweeps over `megabytes` of float32.

    Both one thread and one per core are tried: where a single core saturates the memory, more of them slow it down.
    """
    buffer = np.ones(megabytes << 18, np.float32)
    best = 0.0
    for threads in {1, num_cores()}:
        parts = np.array_split(buffer, threads)
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(_REPEATS):
                began = time.perf_counter()
                list(pool.map(np.max, parts))
                best = max(best, buffer.nbytes / (time.perf_counter() - began))
    return best
