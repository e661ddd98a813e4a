"""NCCL's settings: typed, checked before any process starts, and obsolete names answered with what replaced them."""

import pytest

from ryzanstein_jax import nccl
from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.nccl import OBSOLETE, VARIABLES, XLA_VARIABLE, NcclConfig
from ryzanstein_jax.start import parse_options


def test_nothing_is_set_unless_asked_for():
    assert NcclConfig().environment() == {}
    assert OrchestratorConfig().communication_environment() == {}


def test_settings_become_the_variables_of_a_rank():
    config = NcclConfig(debug="INFO", p2p_disable=True, shm_disable=False, min_ctas=4, socket_ifname="^docker,lo")
    assert config.environment() == {
        "NCCL_DEBUG": "INFO",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "0",
        "NCCL_MIN_CTAS": "4",
        "NCCL_SOCKET_IFNAME": "^docker,lo",
    }


@pytest.mark.parametrize(("version", "value"), [((0, 10), "60"), ((0, 11), "60s"), ((0, 12), "60s")])
def test_flags_of_xla_are_written_as_the_installed_version_reads_them(monkeypatch, version, value):
    monkeypatch.setattr(nccl, "jaxlib_version", lambda: version)
    environment = NcclConfig(execution_timeout_sec=60, terminate_on_error=False).environment()
    flags = f"--xla_gpu_nccl_terminate_on_error=false --xla_gpu_execution_terminate_timeout={value}"
    assert environment == {XLA_VARIABLE: flags}


@pytest.mark.parametrize("name", ["NCCL_MIN_NRINGS", "NCCL_LAUNCH_MODE", "NCCL_TIMEOUT"])
def test_an_obsolete_name_is_answered_with_what_replaced_it(name):
    for given in (name, name.removeprefix("NCCL_").lower()):
        with pytest.raises(ConfigError) as caught:
            NcclConfig.of({given: "4"})
        assert caught.value.remedy == OBSOLETE[name]


def test_no_setting_is_both_known_and_obsolete():
    assert not set(VARIABLES) & set(OBSOLETE)


@pytest.mark.parametrize(
    "settings",
    [
        {"debug": "LOUD"},
        {"debug": 3},
        {"p2p_disable": 1},
        {"p2p_disable": "perhaps"},
        {"p2p_level": "NEAR"},
        {"min_ctas": 0},
        {"min_ctas": "many"},
        {"min_ctas": True},
        {"min_ctas": 8, "max_ctas": 4},
        {"nthreads": 100},
        {"ib_hca": "mlx5_0; rm -r /"},
        {"ib_hca": "x" * 300},
        {"socket_ifname": "eth0\0"},
        {"colour": "red"},
    ],
)
def test_what_is_invalid_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match="nccl.") as caught:
        NcclConfig.of(settings)
    assert caught.value.remedy


def test_a_command_line_sets_them_beside_other_options():
    options = parse_options(["nccl.debug=INFO", "nccl.NCCL_IB_DISABLE=true", "nccl.min_ctas=2", "gloo_interface=lo"])
    assert options.nccl == NcclConfig(debug="INFO", ib_disable=True, min_ctas=2)
    assert options.communication_environment()["RYZANSTEIN_GLOO_INTERFACE"] == "lo"
    for wrong in ("nccl=x", "nccl.debug", "nccl.nope=1"):
        with pytest.raises(ConfigError):
            parse_options([wrong])


def test_python_sets_them_by_a_mapping():
    assert OrchestratorConfig(nccl={"min_ctas": 3}).nccl.min_ctas == 3
    for wrong in (3, "debug=INFO"):
        with pytest.raises(ConfigError, match="nccl"):
            OrchestratorConfig(nccl=wrong)
    for wrong in ("eth0 lo", "", 3, "x" * 16):
        with pytest.raises(ConfigError, match="gloo_interface"):
            OrchestratorConfig(gloo_interface=wrong)
