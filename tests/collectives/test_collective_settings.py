"""Each setting in force, and where it comes from."""

from ryzanstein_jax.collectives.settings import apply_nccl, nccl_files, settings_in_force
from ryzanstein_jax.nccl import XLA_VARIABLE, NcclConfig


def origins(environ, given, root, **more):
    found = settings_in_force(environ, given, backend="nccl", root=root, **more)
    return {setting.name: (setting.value, setting.origin) for setting in found}


def make_files(root):
    (root / "etc").mkdir()
    (root / "etc" / "nccl.conf").write_text("# of the site\nNCCL_DEBUG=INFO\nNCCL_ALGO=ring\n NCCL_BUFFSIZE = 4096 \n")
    (root / "own").mkdir()
    (root / "own" / ".nccl.conf").write_text("NCCL_ALGO=tree\nnonsense\n")
    return {"HOME": str(root / "own")}


def test_the_config_goes_before_the_environment_and_that_before_files(tmp_path):
    environ = make_files(tmp_path) | {"NCCL_PROTO": "LL", "NCCL_MIN_CTAS": "1", "NCCL_UNHEARD_OF": "x"}
    given = NcclConfig(min_ctas=8, termination_timeout_sec=60).environment()
    found = origins(environ | given, given, tmp_path)
    assert found["NCCL_MIN_CTAS"] == ("8", "config")
    assert found["NCCL_PROTO"] == ("LL", "environment")
    assert found["NCCL_UNHEARD_OF"] == ("x", "environment")
    assert found["NCCL_ALGO"] == ("tree", "file")
    assert found["NCCL_DEBUG"] == ("INFO", "file")
    assert found["NCCL_BUFFSIZE"] == ("4096", "file")
    assert found["NCCL_NVLS_ENABLE"] == (None, "absent")
    assert found["xla_gpu_nccl_termination_timeout_seconds"] == ("60", "config")


def test_defaults_fill_what_nobody_set(tmp_path):
    assert origins({}, {}, tmp_path)["NCCL_DEBUG"] == ("WARN", "default")
    assert origins({}, {}, tmp_path)["NCCL_LAUNCH_ORDER_IMPLICIT"] == (None, "absent")
    assert origins({}, {}, tmp_path, several=True)["NCCL_LAUNCH_ORDER_IMPLICIT"] == ("1", "default")


def test_a_rank_gets_what_is_told_to_be_in_force(tmp_path):
    for several in (False, True):
        for files in (False, True):
            root = tmp_path / f"{several}{files}"
            root.mkdir()
            environ = make_files(root) if files else {}
            environ |= {"NCCL_PROTO": "LL"}
            told = origins(environ, {}, root, several=several)
            apply_nccl(environ, several=several, root=root)
            in_force = nccl_files(environ, root) | {k: v for k, v in environ.items() if k.startswith("NCCL_")}
            assert in_force == {name: value for name, (value, _) in told.items() if value is not None}


def test_flags_of_the_config_join_those_of_the_machine(tmp_path):
    environ = {"XLA_FLAGS": "--xla_a=1 --xla_gpu_nccl_terminate_on_error=true", XLA_VARIABLE: ""}
    given = NcclConfig(terminate_on_error=False).environment()
    environ |= given
    found = origins(environ, given, tmp_path)
    apply_nccl(environ, several=False, root=tmp_path)
    assert environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_nccl_terminate_on_error=false"
    assert XLA_VARIABLE not in environ
    assert found["xla_a"] == ("1", "environment")
    assert found["xla_gpu_nccl_terminate_on_error"] == ("false", "config")


def test_a_key_is_told_as_set_and_not_shown(tmp_path):
    found = origins({"NCCL_PSK": "a key of thirty-two characters...."}, {}, tmp_path)
    assert found["NCCL_PSK"] == ("***", "environment")


def test_a_file_that_is_a_folder_or_huge_hurts_nobody(tmp_path):
    (tmp_path / "etc" / "nccl.conf").mkdir(parents=True)
    huge = tmp_path / "huge"
    huge.write_bytes(b"NCCL_DEBUG=INFO\n" + b"x" * (1 << 20))
    assert nccl_files({"NCCL_CONF_FILE": str(huge)}, tmp_path) == {"NCCL_DEBUG": "INFO"}


def test_gloo_tells_its_own():
    found = settings_in_force({"RYZANSTEIN_GLOO_INTERFACE": "eth0", "NCCL_DEBUG": "INFO"}, {}, backend="gloo")
    assert {s.name: s.origin for s in found}["RYZANSTEIN_GLOO_INTERFACE"] == "environment"
    assert all("NCCL" not in setting.name for setting in found)
    assert settings_in_force({}, {}, backend="xla") == []
