"""Two Ray nodes on this machine, one of which dies in the middle of streams."""

from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.hosts import Hosts
from tests.orchestrator.remote import until
from tests.orchestrator.test_hosts import kinds, run, start

ray: Any = pytest.importorskip("ray", reason="Ray is an extra")
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
OPTIONS: dict[str, Any] = dict(cluster="ray", listen="127.0.0.1:0", num_hosts=2, local_devices=0)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of two nodes, on the loopback interface alone: Ray would take another one where it can."""
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    made.second = made.add_node(**NODE)
    ray.init(address=made.address, log_to_driver=False)
    made.wait_for_nodes()
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def agents(hosts: Hosts) -> list[psutil.Process]:
    """The agents that Ray has started for this leader, and their ranks, which are forks of them."""
    address = f"--leader={hosts.listener.address}"
    return [process for process in psutil.process_iter(["cmdline"]) if address in (process.info["cmdline"] or [])]


def test_streams_outlive_a_node(cluster: Any) -> None:
    llm = start(**OPTIONS, timeout_sec=180.0, heartbeat_timeout_sec=30.0, restore_after_sec=0.1)
    hosts = llm.orchestrator._supervisor._manager.hosts
    try:
        expected = run(llm)
        status = llm.orchestrator.status()
        assert (status["state"], status["width"]) == ("ready", 2)
        assert len(agents(hosts)) == 4
        # SIGKILL to all processes of the node that Ray started; what these started ends with them.
        assert run(llm, lambda: cluster.remove_node(cluster.second, allow_graceful=False), 30) == 30 * expected
        assert llm.orchestrator.status()["width"] == 1
        assert {"host_lost", "replayed", "recovered"} <= set(kinds(llm))
        assert run(llm) == expected
        cluster.add_node(**NODE)  # takes its place
        until(lambda: llm.orchestrator.status()["width"] == 2 and llm.orchestrator.status()["state"] == "ready", 120.0)
        assert run(llm) == expected
    finally:
        llm.close()
    until(lambda: agents(hosts) == [])  # the kernel ends what outlived its parent, in a moment


def test_an_agent_that_ends_is_started_again(cluster: Any) -> None:
    hosts = Hosts(OrchestratorConfig(**OPTIONS), 2)
    try:
        until(lambda: len(hosts.names()) == 2)
        first, _ = agents(hosts)
        first.kill()
        until(lambda: len(hosts.wait(2, 0.0, lambda: False)) < 2)
        until(lambda: len(hosts.wait(2, 0.0, lambda: False)) == 2)
    finally:
        hosts.close()
    until(lambda: agents(hosts) == [])  # the kernel ends what outlived its parent, in a moment


def test_without_a_cluster_there_is_a_reason() -> None:
    with pytest.raises(ConfigError, match="start a Ray cluster"):
        Hosts(OrchestratorConfig(**OPTIONS), 2)
