"""What a process that computes has to set before its first computation, and where it keeps compiled programs."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import jax

from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.executables import ExecutableStore, open_store


def prepare_process(config: EngineConfig) -> ExecutableStore | None:
    """Makes JAX's settings; has no effect on devices that exist already (`make_mesh` checks their number).

    A process that is one rank of several brings the devices that whoever started it has set; one alone makes as many
    CPU devices as the mesh is wide.

    Returns:
        Where compiled programs are kept. None where none are, or where the folder is not this user's own: then JAX's
        compilation cache is the next best.
    """
    if not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # the devices are already made
            if jax.config.jax_num_cpu_devices < config.tensor_parallel_size:
                jax.config.update("jax_num_cpu_devices", config.tensor_parallel_size)
    if config.compilation_cache_dir == "":
        return None
    # A folder of its own in the one that was given: that one may well be open to a group.
    store = open_store(Path(config.compilation_cache_dir or cache_dir()) / "executables")
    if store is None:
        folder = config.compilation_cache_dir or str(cache_dir() / "compiled")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return store


def step_back() -> None:
    """Gives this thread a tenth of a processor where others want it; with the lowest priority it might get none."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
