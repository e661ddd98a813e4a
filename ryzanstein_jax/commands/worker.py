"""`ryzanstein worker`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ryzanstein_jax.config import parse_address
from ryzanstein_jax.errors import ConfigError


def worker(
    leader: Annotated[
        str | None, typer.Option(help="HOST:PORT that the leader listens at; asked of the cluster if not given.")
    ] = None,
    secret_file: Annotated[
        str | None, typer.Option(help="File of the leader's secret; or else it is in RYZANSTEIN_SECRET.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices to offer: all GPUs, or one CPU, if not given.")] = None,
    name: Annotated[str | None, typer.Option(help="Of this machine, its host name if not given.")] = None,
    cluster: Annotated[str, typer.Option(help="auto, lws, slurm, ompi, mpi4py or k8s; without --leader.")] = "auto",
    port: Annotated[int, typer.Option(help="That the leader listens at; without --leader.")] = 18476,
    wait: Annotated[float, typer.Option(help="Seconds to wait until the leader answers.")] = 600.0,
    reconnect: Annotated[bool, typer.Option(help="Wait for the leader again when it is gone.")] = False,
) -> None:
    """Offers this machine's devices to the leader of an engine on another one."""
    from ryzanstein_jax.orchestrator.cluster import leader_address
    from ryzanstein_jax.orchestrator.worker_command import WorkerCommand, find_secret

    if devices is not None and not 1 <= devices <= 1024:
        raise ConfigError("devices", devices, "use a whole number from 1 to 1024")
    secret = find_secret(secret_file)
    address = leader or leader_address(cluster, port)
    parse_address("leader", address)
    name = name or os.uname().nodename
    WorkerCommand(address, secret, name, devices, wait, reconnect).become()
