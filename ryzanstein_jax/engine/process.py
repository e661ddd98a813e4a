"""What a process that computes has to set before its first computation, and where it keeps compiled programs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterable
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


def return_host_memory() -> None:
    """Gives the system back what the C library keeps of memory that was freed: loading programs leaves plenty."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def settle_host_memory() -> None:
    """Returns what compiling and loading left, and from now on has glibc reuse large blocks.

    XLA allocates a program's temporaries anew for each run. Returned each time, every page of them
    costs a page fault: reading the KV cache measured two to six times slower.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    return_host_memory()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_top_pad, 64 << 20)


def use_huge_pages(arrays: Iterable[jax.Array]) -> int:
    """Asks Linux to move arrays in host memory to pages of 2 MiB, where they lie: reading weights gets faster.

    Without it the processor spends part of each sweep on finding where 4 KiB pages are. Moving takes about a second
    for 4 GB, and changes neither contents nor addresses.

    Returns:
        How many bytes lie in such pages now, at most; 0 where the system has none to give.
    """
    page, advise, collapse = 2 << 20, 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE (Linux 6.1)
    if not sys.platform.startswith("linux"):
        return 0
    madvise, moved = ctypes.CDLL(None).madvise, 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    buffers = [shard.data for array in arrays for shard in array.addressable_shards]
    ranges: list[list[int]] = []
    for begin, size in sorted((buffer.unsafe_buffer_pointer(), buffer.nbytes) for buffer in buffers):
        if ranges and begin - ranges[-1][1] < page:  # small ones lie side by side: a page may hold parts of two
            ranges[-1][1] = begin + size
        else:
            ranges.append([begin, begin + size])
    for begin, end in ranges:
        first, last = -(-begin // page) * page, end // page * page
        if last > first and not madvise(first, last - first, advise) and not madvise(first, last - first, collapse):
            moved += last - first
    return moved
