"""What a result was measured on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil

from ryzanstein_jax.machine import commit as commit
from ryzanstein_jax.machine import describe_machine as describe_machine
from ryzanstein_jax.machine import num_cores as num_cores

_REPEATS = 5


def other_cpu_seconds() -> float:
    """CPU seconds that everything but this process and its descendants has used since the machine started.

    Descendants that have ended are among them only if a parent that is one too has waited for them.
    """
    busy = psutil.cpu_times()
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ours = sum(sum(process.cpu_times()[:4]) for process in own)
    return busy.user + busy.nice + busy.system + getattr(busy, "steal", 0.0) - ours


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
