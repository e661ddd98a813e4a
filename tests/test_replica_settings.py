"""What replicas can't be is refused by name; what they get of a machine is theirs alone."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ryzanstein_jax import AsyncLLM
from ryzanstein_jax.cli import app
from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.devices import DeviceReport
from ryzanstein_jax.orchestrator.hosts import Hosts
from ryzanstein_jax.orchestrator.launch import rank_config


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        (dict(data_parallel_size=0), "data_parallel_size", "from 1 to 256"),
        (dict(executor="local"), "data_parallel_size", 'set executor="processes" too'),
        (dict(orchestrator=dict(listen="127.0.0.1:0", secret_file="s")), "listen", "leave it out"),
        (dict(orchestrator=dict(cluster="ray")), "cluster", "leave it out"),
        (dict(orchestrator=dict(local_devices=1)), "local_devices", "leave it out"),
        (dict(orchestrator=dict(process_per_device=False)), "process_per_device", "single devices: use True"),
        (dict(tensor_parallel_size=2), "data_parallel_size", "takes 4 GPUs, and 3 are here; use at most 1"),
        (dict(data_parallel_size=4), "data_parallel_size", "takes 4 GPUs, and 3 are here; use at most 3"),
    ],
)
def test_what_can_not_be_is_refused_before_a_model_is_looked_for(
    settings: dict[str, Any], field: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=message) as caught:
        AsyncLLM("nowhere", **{"data_parallel_size": 2, "executor": "processes", **settings})
    assert caught.value.field == field


def test_commands_refuse_it_too(tmp_path: Path):
    (tmp_path / "in.jsonl").write_text("{}")
    for command in (
        ["serve", "nowhere"],
        ["batch", "nowhere", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")],
    ):
        result = CliRunner().invoke(app, [*command, "--data-parallel-size", "2"])
        assert isinstance(result.exception, ConfigError) and result.exception.field == "data_parallel_size"
    assert not (tmp_path / "out").exists()


class Agent:
    """One that starts no process."""

    name = "here"

    def __init__(self, num_slots: int):
        self.num_slots = num_slots

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("replica", "slots"), [(0, (0, 1)), (2, (4, 5))])
def test_each_replica_has_devices_of_its_own(replica: int, slots: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ryzanstein_jax.orchestrator.hosts.LocalAgent", Agent)
    hosts = Hosts(OrchestratorConfig(), 2, replica=replica, num_replicas=3)
    try:
        assert hosts.here() == slots
        assert [hosts.locate(slot)[1] for slot in slots] == list(slots)
        assert list(hosts.names().values()) == [2]
    finally:
        hosts.close()


def test_memory_of_a_host_is_divided_among_all_replicas():
    config = EngineConfig("none", memory_fraction=0.6, tensor_parallel_size=2, data_parallel_size=3)
    device = DeviceReport(0, "cpu", "cpu", 1 << 30, "here", 0)
    assert rank_config(config, [device] * 2, None).memory_fraction == pytest.approx(0.1)
    gpu = DeviceReport(0, "gpu", "H100", 1 << 30, "here", 0)
    assert rank_config(config, [gpu] * 2, None).memory_fraction == pytest.approx(0.6)
