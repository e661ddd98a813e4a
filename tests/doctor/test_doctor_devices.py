"""The use of the devices, which may fail, hang or abort; and the whole of `ryzanstein doctor`."""

import json
import re
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from ryzanstein_jax.cli import app
from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.doctor import devices
from ryzanstein_jax.doctor.examine import examine
from ryzanstein_jax.doctor.finding import OK, PROBLEM, Section
from ryzanstein_jax.errors import ConfigError

IMPORTED = {"stage": "imported"}
BACKEND = {"stage": "backend", "platform": "gpu", "devices": [{"kind": "H100", "memory": 80 << 30}] * 2, "cuda": {}}
COMPUTED = {"stage": "computed"}
ALL = [IMPORTED, BACKEND, COMPUTED, {"stage": "communicated", "devices": 2}]


def judged(said, code=0, errors=""):
    section = Section("devices")
    devices.judge(section, said, code, errors, 90.0)
    return [(finding.status, finding.text, finding.remedy) for finding in section.findings]


def test_all_stages_are_well():
    found = judged(ALL)
    assert {status for status, _, _ in found} == {OK}
    assert "2 devices of platform gpu (H100), 80.00 GiB each" in found[0][1]


@pytest.mark.parametrize(
    ("said", "code", "errors", "text", "remedy"),
    [
        (
            [],
            1,
            "ModuleNotFoundError: jax",
            "importing JAX ended the process with status 1: ModuleNotFound",
            "jax.devices",
        ),
        (
            [IMPORTED],
            -6,
            "F parse_flags Unknown flag in XLA_FLAGS: --xla_foo=1\n",
            "signal 6: Unknown flag",
            "XLA_FLAGS",
        ),
        ([IMPORTED], -6, "Check failed: Flag parsing failed.", "Flag parsing failed", "60, not 60s"),
        ([IMPORTED], None, "", "starting the backend did not end within 90 s", "NCCL_P2P_DISABLE"),
        (
            [IMPORTED, {"stage": "failed", "message": "x: CUDA_ERROR_NO_DEVICE"}],
            0,
            "",
            "backend fails: x",
            "nvidia-smi",
        ),
        (ALL[:2], -11, "", "multiplying matrices on each device ended the process with signal 11: it said nothing", ""),
        (ALL[:2], 0, "RESOURCE_EXHAUSTED: x", "RESOURCE_EXHAUSTED", "takes the memory"),
        (ALL[:3], None, "", "adding up over all devices did not end", "NCCL_SHM_DISABLE"),
        (ALL[:3], 1, "ncclSystemError: socket", "ncclSystemError: socket", "NCCL_DEBUG=INFO"),
        (ALL[:3], 1, "a.so: undefined symbol: b", "undefined symbol: b", "LD_LIBRARY_PATH"),
    ],
)
def test_the_stage_that_fails_is_named_with_a_remedy(said, code, errors, text, remedy):
    status, found, what_to_do = judged(said, code, errors)[-1]
    assert status == PROBLEM
    assert text in found
    assert remedy in what_to_do and what_to_do


def test_the_devices_of_this_machine_are_used():
    section = Section("devices")
    devices.check_devices(section, 120.0)
    assert [finding.status for finding in section.findings] == [OK] * 3, section.findings
    assert section.facts["platform"] == "cpu"


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """Has `devices` start a script in place of the probe; it is under way when that has started it."""

    def use(code: str) -> None:
        script, begun = tmp_path / "probe.py", tmp_path / "begun"
        report = f"print({json.dumps(IMPORTED)!r}, flush=True)"
        script.write_text(f"import os, time\n{report}\nopen({str(begun)!r}, 'x').close()\n{code}")
        popen = subprocess.Popen

        def start(command, **more):
            process = popen([sys.executable, str(script)], **more)
            deadline = time.monotonic() + 60
            while not begun.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            return process

        monkeypatch.setattr(devices.subprocess, "Popen", start)

    return use


def test_a_runtime_that_hangs_is_ended_with_what_it_started(probe):
    probe("if os.fork() == 0:\n    time.sleep(600)\ntime.sleep(600)")
    section = Section("devices")
    devices.check_devices(section, 1.0)
    assert "starting the backend did not end within 1 s" in section.findings[-1].text
    assert not psutil.Process().children(recursive=True)


def test_a_runtime_that_aborts_is_a_finding(probe):
    probe("os.write(2, b'what a pity'); os.abort()")
    section = Section("devices")
    devices.check_devices(section, 60.0)
    assert "signal 6: what a pity" in section.findings[-1].text


def test_a_runtime_that_writes_nonsense_is_a_finding(probe):
    probe("os.write(1, b'\\xff\\x00{[' * 100000)")
    section = Section("devices")
    devices.check_devices(section, 60.0)
    assert section.findings[-1].status == PROBLEM


def test_the_command_ends_with_the_status_of_what_it_found(probe, monkeypatch):
    monkeypatch.setenv("NCCL_LAUNCH_MODE", "GROUP")
    probe("os.abort()")
    done = CliRunner().invoke(app, ["doctor", "--json", "--port", "0"])
    assert done.exit_code == 1 and isinstance(done.exception, ConfigError)
    done = CliRunner().invoke(app, ["doctor", "--json", "-O", "nccl.debug=INFO"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["status"] == PROBLEM
    assert {"software", "memory", "caches", "ports", "clock", "devices"} <= found["facts"].keys()
    assert any("NCCL_LAUNCH_MODE" in finding["text"] for finding in found["findings"])
    assert all(finding["remedy"] for finding in found["findings"] if finding["status"] != OK)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "do: " in done.stdout and re.search(r"^\d+ problems?, \d+ warnings?$", done.stdout, re.M)


def test_a_process_that_looks_does_not_import_jax():
    code = (
        "import sys\nfrom ryzanstein_jax.doctor.examine import examine\nfound = examine(timeout=120)\n"
        "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules), 'JAX was imported'\n"
        "print(found.status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("ok", "warning")


def test_settings_are_those_of_the_backend_that_was_found(probe, monkeypatch):
    probe('print(\'{"stage": "backend", "platform": "gpu", "devices": []}\', flush=True)')
    found = examine(OrchestratorConfig(nccl={"min_ctas": 4}, process_per_device=False), ports=())
    settings = {setting.name: (setting.value, setting.origin) for setting in found.settings}
    assert settings["NCCL_MIN_CTAS"] == ("4", "config")
    assert settings["NCCL_LAUNCH_ORDER_IMPLICIT"] == ("1", "default")
    with pytest.raises(ConfigError, match="timeout"):
        examine(timeout=0)
