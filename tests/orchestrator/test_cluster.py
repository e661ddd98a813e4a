"""Where the leader is, as clusters tell it; with the environments that they set."""

import pytest

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.cluster import DEFAULT_PORT, LWS_VARIABLE, leader_address

NAMES = (
    LWS_VARIABLE, "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_VERSION", "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_LOCALID",
)  # fmt: skip


def slurm(nodes: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "71",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }


OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_VERSION": "4.1.6",
}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "cluster", "host"),
    [
        (slurm("node001"), "auto", "node001"),
        (slurm("node[001-015],other"), "slurm", "node001"),
        (slurm("gpu-[7,9-12]"), "auto", "gpu-7"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}, "auto", "10.96.0.1"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,fd00::3]:43370"}, "ompi", "[fe80::b9b]"),
        ({LWS_VARIABLE: "group-0.group.default"} | slurm("node001"), "auto", "group-0.group.default"),
        ({LWS_VARIABLE: "group-0.group.default"}, "lws", "group-0.group.default"),
    ],
    ids=str,
)
def test_the_leader_is_at_the_first_machine(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], cluster: str, host: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert leader_address(cluster) == f"{host}:{DEFAULT_PORT}"
    assert leader_address(cluster, 5) == f"{host}:5"


@pytest.mark.parametrize(
    ("environment", "cluster", "reason"),
    [
        ({}, "auto", "--leader HOST:PORT"),
        ({}, "slurm", "no cluster was found"),
        ({}, "lws", LWS_VARIABLE),
        ({}, "nomad", "use one of auto, lws, slurm"),
        ({"OMPI_MCA_orte_hnp_uri": "nonsense"}, "auto", "give --leader"),
    ],
)
def test_without_a_cluster_there_is_a_remedy(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], cluster: str, reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=reason):
        leader_address(cluster)
