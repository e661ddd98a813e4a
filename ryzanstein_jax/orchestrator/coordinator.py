"""The coordination service of a group's `jax.distributed` runtime, in the leader.

With the public `jax.distributed.initialize` process 0 hosts the service, and its death aborts all others within
milliseconds. In the leader the service outlives every rank. That takes calls that JAX does not document; they
stand here and in `runtime`, and where a version lacks them the public way is taken. Only jaxlib is imported, not JAX.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

#: The runtime shall never act on silence by itself: the leader's health monitor does, and is faster.
NEVER = 1_000_000


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Coordinator:
    """The coordination service of one generation of a group, on a fresh port.

    Args:
        num_processes: ranks of the group.
        host: address of this machine that all of them reach; nothing else listens there.
        public: leaves the service to rank 0, as where a version of JAX lacks what this needs.

    Attributes:
        address: "host:port" that the ranks connect to.
        hosted: whether the service runs in this process; False leaves it to rank 0, as the public API does.
    """

    def __init__(self, num_processes: int, host: str = "127.0.0.1", *, public: bool = False):
        self.address = f"[{host}]:{free_port(host)}" if ":" in host else f"{host}:{free_port(host)}"
        self._service: Any = None
        if public:
            self.hosted = False
            return
        try:
            quiet = "TF_CPP_MIN_LOG_LEVEL" not in os.environ
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, when the library is loaded
            from jaxlib import _jax

            if quiet:
                del os.environ["TF_CPP_MIN_LOG_LEVEL"]  # the ranks' warnings are of interest: they go to their logs

            self._service = _jax.get_distributed_runtime_service(
                self.address,
                num_processes,
                heartbeat_timeout=NEVER,
                cluster_register_timeout=60,
                shutdown_timeout=1,
                recoverable=True,
            )
        except (ImportError, AttributeError, TypeError):
            self._service = None
        self.hosted = self._service is not None

    def move_to(self, host: str) -> None:
        """Where rank 0 hosts the service, it is on that one's machine."""
        port = self.address.rpartition(":")[2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Ends the service; the ranks are gone by then."""
        service, self._service = self._service, None
        if service is not None:
            with contextlib.suppress(Exception):
                service.shutdown()
