"""Versions that do not belong together, and variables in the way."""

from pathlib import Path

import pytest

from ryzanstein_jax.doctor import software
from ryzanstein_jax.doctor.finding import OK, PROBLEM, WARNING, Place, Section

GOOD = {"jax": "0.12.0", "jaxlib": "0.12.0", "jax-cuda13-plugin": "0.12.0", "jax-cuda13-pjrt": "0.12.0"}


def look(check, *arguments, versions=GOOD, environ=None, root="/nowhere", **more):
    section = Section("software")
    place = Place(environ or {}, Path(root), versions)
    check(section, *[place if argument is Place else argument for argument in arguments], **more)
    return section


def worst(section):
    found = [finding.status for finding in section.findings]
    return PROBLEM if PROBLEM in found else WARNING if WARNING in found else OK


def test_versions_that_belong_together_are_well():
    section = look(software.check_jax, Place, versions=GOOD | {"nvidia-nccl-cu13": "2.28", "nvidia-cudnn-cu13": "9.15"})
    assert worst(section) == OK
    assert section.facts["cuda"] == 13
    assert section.facts["libraries"] == {"nccl": "2.28", "cudnn": "9.15"}


@pytest.mark.parametrize(
    ("change", "status", "remedy"),
    [
        ({"jaxlib": "0.11.2"}, PROBLEM, "jaxlib==0.12.0"),
        ({"jax": "0.9.1", "jaxlib": "0.9.1"}, PROBLEM, "jax>=0.10,<0.13"),
        ({"jax": None}, PROBLEM, "pip install"),
        ({"jax-cuda13-plugin": "0.11.2"}, PROBLEM, "jax-cuda13-plugin==0.12.0"),
        ({"jax-cuda13-pjrt": None}, PROBLEM, "jax[cuda13]==0.12.0"),
        ({"jax-cuda12-plugin": "0.12.0", "jax-cuda12-pjrt": "0.12.0"}, PROBLEM, "pip uninstall jax-cuda12"),
    ],
)
def test_versions_that_do_not_belong_together(change, status, remedy):
    versions = {name: version for name, version in (GOOD | change).items() if version is not None}
    section = look(software.check_jax, Place, versions=versions)
    assert worst(section) == status
    assert any(remedy in finding.remedy for finding in section.findings if finding.status == status)


def test_a_newer_jax_than_tested_is_a_warning():
    newer = dict.fromkeys(GOOD, "0.14.0")
    assert worst(look(software.check_jax, Place, versions=newer)) == WARNING


def test_kernels_for_cpus():
    cpu = {"jax": "0.12.0", "jaxlib": "0.12.0"}
    slower = look(software.check_jax, Place, versions=cpu)
    assert worst(slower) == WARNING and slower.findings[-1].remedy == "pip install 'ryzanstein-jax[cpu]'"
    assert worst(look(software.check_jax, Place, versions=cpu | {"llvmlite": "0.50.0"})) == OK
    off = {"RYZANSTEIN_KERNELS": "portable"}
    assert worst(look(software.check_jax, Place, versions=cpu | {"llvmlite": "0.50.0"}, environ=off)) == WARNING
    assert worst(look(software.check_jax, Place, versions=GOOD, environ=off)) == OK


@pytest.mark.parametrize(("version", "status"), [((3, 10, 1), PROBLEM), ((3, 12, 0), OK), ((3, 15, 0), WARNING)])
def test_the_interpreter(version, status):
    assert worst(look(software.check_python, version)) == status


def driver(gpus, version, cuda, plugins=True, **more):
    section = Section("environment", {"plugins": {"jax-cuda13-plugin": "1"} if plugins else {}})
    place = Place(more.get("environ", {}), Path("/nowhere"), more.get("versions", {"nvidia-ml-py": "13"}))
    software.check_driver(section, gpus, version, cuda, place)
    return section


def test_gpus_that_jax_will_not_use():
    assert worst(driver(2, "580.10", None, plugins=False)) == PROBLEM
    assert worst(driver(0, None, 13)) == WARNING
    assert worst(driver(0, None, None, plugins=False)) == OK
    assert worst(driver(2, "580.10", 13, environ={"JAX_PLATFORMS": "cpu"})) == WARNING
    assert worst(driver(2, "580.10", 13, environ={"CUDA_VISIBLE_DEVICES": ""})) == WARNING
    assert worst(driver(2, "580.10", 13, versions={})) == WARNING
    assert worst(driver(2, "580.10", 13)) == OK


def test_a_driver_that_is_too_old_for_cuda():
    section = driver(1, "570.86.10", 13)
    assert worst(section) == PROBLEM
    assert "ryzanstein-jax[cuda12]" in section.findings[-1].remedy
    assert worst(driver(1, "570.86.10", 12)) == OK
    assert "or" in driver(1, "400.1", 12).findings[-1].remedy
    assert worst(driver(1, "400.1", 12)) == PROBLEM


def test_variables_that_hide_libraries_or_do_nothing(tmp_path):
    folder = tmp_path / "opt" / "cuda"
    folder.mkdir(parents=True)
    (folder / "libcudnn.so.8").touch()
    (folder / "libother.so").touch()
    environ = {"LD_LIBRARY_PATH": "/opt/cuda:/opt/none:relative:", "NCCL_TIMEOUT": "5", "XLA_FLAGS": "--xla_a=1 b"}
    section = look(software.check_variables, Place, environ=environ, root=tmp_path)
    texts = [(finding.status, finding.text) for finding in section.findings]
    assert [status for status, _ in texts] == [WARNING, WARNING, PROBLEM]
    assert "/opt/cuda with libcudnn.so" in texts[0][1] and "libother" not in texts[0][1]
    assert "NCCL_TIMEOUT" in texts[1][1] and "'b'" in texts[2][1]
    assert worst(look(software.check_variables, Place)) == OK


def test_what_is_installed_here_is_read():
    section = look(software.check_jax, Place, versions=None)
    assert section.facts["jax"] and section.facts["jaxlib"]
