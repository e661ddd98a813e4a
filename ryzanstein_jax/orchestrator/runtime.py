"""How a rank joins the `jax.distributed` runtime of its group, and shares a machine's processors with the others."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import Any

from ryzanstein_jax.collectives.settings import Setting, apply_nccl, settings_in_force
from ryzanstein_jax.nccl import GLOO_INTERFACE_VARIABLE
from ryzanstein_jax.orchestrator.coordinator import NEVER


def prepare(slot: int, devices: int, local_index: int, local_count: int, given: Mapping[str, str]) -> list[Setting]:
    """Makes the settings of a rank that has to stand before it has devices; says by what it will communicate.

    Args:
        slot: the device of this machine that it takes; -1 takes all.
        devices: that it makes where they are CPU devices.
        local_index, local_count: which of how many ranks of this machine it is.
        given: variables of its environment that the config has set.
    """
    import jax

    before = dict(os.environ)
    if platform_is_cpu():
        os.sched_setaffinity(0, share_of_processors(local_index, local_count))
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_num_cpu_devices", devices)
        apply_nccl(os.environ, several=False)
        _arrange_gloo(os.environ.get(GLOO_INTERFACE_VARIABLE))
        return settings_in_force(before, given, backend="gloo" if slot >= 0 else "xla")
    if slot >= 0:
        jax.config.update("jax_cuda_visible_devices", str(slot))
    apply_nccl(os.environ, several=slot < 0)
    return settings_in_force(before, given, backend="nccl", several=slot < 0)


def _arrange_gloo(interface: str | None) -> None:
    """Has Gloo's thread run at the lowest priority, and listen on a network interface where one is given.

    That thread polls without a pause, and would take the processor from those that compute: with it, decoding on two
    ranks measured three times slower. XLA's own threads have to keep their priority: at the lowest, any other program
    on their processors would bring steps to a standstill. So it is found as the one that making Gloo starts.

    Which interface it listens on JAX leaves to the address of the host's name, and takes no other.
    """
    from jaxlib import _jax

    if not hasattr(_jax, "make_gloo_tcp_collectives"):
        return
    make = functools.partial(_jax.make_gloo_tcp_collectives, **({"interface": interface} if interface else {}))

    def make_quietly(**settings: Any) -> Any:
        before = _threads()
        made = make(**settings)
        for thread in _threads() - before:
            with contextlib.suppress(OSError, AttributeError):
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        return made

    _jax.make_gloo_tcp_collectives = make_quietly


def _threads() -> set[int]:
    """This process's."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def platform_is_cpu() -> bool:
    """Whether the devices will be CPU devices; asked before JAX makes them."""
    import importlib.util

    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted:
        return wanted.split(",")[0] == "cpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    has_plugin = any(importlib.util.find_spec(name) is not None for name in plugins)
    return not (has_plugin and os.path.exists("/dev/nvidiactl"))


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


def share_of_processors(index: int, count: int) -> set[int]:
    """The processors for one of `count` ranks of a machine; all of them where there are too few to share out."""
    processors = sorted(os.sched_getaffinity(0))
    if count > len(processors):
        return set(processors)
    return set(processors[index * len(processors) // count : (index + 1) * len(processors) // count])
