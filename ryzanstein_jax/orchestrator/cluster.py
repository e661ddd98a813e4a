"""Where the leader is, as the cluster tells it: Slurm, Open MPI, mpi4py and Kubernetes through JAX's own detection.

All of these start the same command on every machine, and the leader runs beside the first of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from ryzanstein_jax.errors import ConfigError

DEFAULT_PORT = 18476
#: LeaderWorkerSet gives every pod the name of its group's leader.
LWS_VARIABLE = "LWS_LEADER_ADDRESS"
CLUSTERS = ("auto", "lws", "slurm", "ompi", "mpi4py", "k8s")
_TIMEOUT_SECONDS = 60


def leader_address(cluster: str = "auto", port: int = DEFAULT_PORT) -> str:
    """ "host:port" of the leader.

    Args:
        cluster: which kind of cluster this is; "auto" asks the environment. mpi4py has to be named, since it is asked
            of all processes at once.
        port: that the leader listens at.

    Raises:
        ConfigError: the environment tells no such cluster, or not where its first machine is.
    """
    if cluster not in CLUSTERS:
        raise ConfigError("cluster", cluster, f"use one of {', '.join(CLUSTERS)}")
    if cluster in ("auto", "lws") and os.environ.get(LWS_VARIABLE):
        return f"{os.environ[LWS_VARIABLE]}:{port}"
    if cluster == "lws":
        raise ConfigError("cluster", cluster, f"{LWS_VARIABLE} is not set")
    from jax._src import clusters

    known = {found.name: found for found in clusters.ClusterEnv._cluster_types}
    for name in CLUSTERS[2:] if cluster == "auto" else (cluster,):
        kind = known.get(name)
        if kind is None or (cluster == "auto" and kind.opt_in_only_method):
            continue
        if _asked(name, kind.is_env_present):
            return f"{_bracketed(_asked(name, partial(_coordinator, kind, port)).rpartition(':')[0])}:{port}"
    raise ConfigError("leader", None, f"give --leader HOST:PORT: no cluster was found (--cluster {cluster})")


def _coordinator(kind: Any, port: int) -> str:
    return str(kind.get_coordinator_address(timeout_secs=_TIMEOUT_SECONDS, override_coordinator_port=str(port)))


def _asked(name: str, question: Callable[[], object]) -> str:
    """An answer of JAX's detection, which fails in as many ways as there are clusters."""
    try:
        return str(question() or "")
    except Exception as error:
        raise ConfigError("cluster", name, f"it does not tell the leader's address, give --leader ({error})") from error


def _bracketed(host: str) -> str:
    host = host.strip("[]")
    return f"[{host}]" if ":" in host else host
