"""How a rank joins the `jax.distributed` runtime of its group, and shares a machine's processors with the others."""

from __future__ import annotations

import contextlib
import os

from ryzanstein_jax.orchestrator.coordinator import NEVER


def join(address: str, rank: int, num_processes: int, *, hosted: bool) -> None:
    """Makes this process a rank of the runtime; before the first use of `jax.devices`."""
    import jax
    from jax._src import distributed

    if not hosted:
        # It installs a handler that swallows SIGTERM.
        os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "0")
        jax.distributed.initialize(address, num_processes, rank, heartbeat_timeout_seconds=NEVER)
        return
    from jaxlib import _jax

    state = distributed.global_state
    state.client = _jax.get_distributed_runtime_client(
        address,
        rank,
        init_timeout=60,
        heartbeat_timeout=NEVER,
        shutdown_on_destruction=False,
        use_compression=False,
    )
    state.client.connect()
    state.process_id, state.num_processes = rank, num_processes


def quiet_new_threads(before: set[str]) -> None:
    """Gives threads that came after `before` the lowest priority.

    Gloo's thread polls without a pause, and would take the processor from the one that computes: with it, decoding
    on two ranks measured three times slower.
    """
    for thread in set(os.listdir("/proc/self/task")) - before:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


def threads() -> set[str]:
    """This process's threads, as `quiet_new_threads` takes them."""
    return set(os.listdir("/proc/self/task"))


def share_of_processors(index: int, count: int) -> set[int]:
    """The processors for one of `count` ranks of a machine; all of them where there are too few to share out."""
    processors = sorted(os.sched_getaffinity(0))
    if count > len(processors):
        return set(processors)
    return set(processors[index * len(processors) // count : (index + 1) * len(processors) // count])
