"""What a host gives, on hosts that give too little; and checks that hang or raise."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from ryzanstein_jax.doctor import host
from ryzanstein_jax.doctor.finding import OK, PROBLEM, WARNING, Place, Section, examined
from ryzanstein_jax.errors import ConfigError


def found(check, *arguments, **more):
    section = Section("host")
    check(section, *arguments, **more)
    return section


def texts(section, status):
    return [finding.text for finding in section.findings if finding.status == status]


def test_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(host, "host_bytes", lambda: 1 << 30)
    section = found(host.check_memory)
    assert "1.00 GiB" in texts(section, WARNING)[0]
    assert section.facts["limit"] == 1 << 30


def test_limits_that_are_too_tight(tmp_path, monkeypatch):
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup" / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "sys" / "class" / "infiniband" / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (1024, 2048))
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20))
    section = found(host.check_limits, Place({}, tmp_path), 2)
    warnings = texts(section, WARNING)
    for part in ("may use 0.5", "/dev/shm has 64.0 MiB", "1024 files", "mlx5_0"):
        assert any(part in text for text in warnings), (part, warnings)
    assert all(finding.remedy for finding in section.findings if finding.status != OK)
    relaxed = found(host.check_limits, Place({}, tmp_path / "none"), 0)
    assert not any("infiniband" in text or "/dev/shm" in text for text in texts(relaxed, WARNING))


def test_a_cache_of_ones_own_is_well(tmp_path, monkeypatch):
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "_LEAST_DISK", 0)
    assert "does not exist yet" in texts(found(host.check_caches), OK)[0]
    (tmp_path / "cache" / "executables").mkdir(parents=True)
    (tmp_path / "cache" / "executables" / "entry").write_bytes(b"x" * 5000)
    section = found(host.check_caches)
    assert section.facts["sizes"] == {"executables": 5000}
    assert not texts(section, WARNING) and not texts(section, PROBLEM)


def test_a_cache_that_others_may_write_to_or_nobody_can(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    (folder / "executables").mkdir(parents=True)
    (folder / "executables").chmod(0o777)
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(folder))
    assert "others may write" in texts(found(host.check_caches), WARNING)[0]
    monkeypatch.setenv("RYZANSTEIN_CACHE", "/proc/none/cache")
    assert "cannot be written to" in texts(found(host.check_caches), PROBLEM)[0]
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(folder))
    monkeypatch.setattr(host, "_LEAST_DISK", 1 << 60)
    assert any("are left" in text for text in texts(found(host.check_caches), WARNING))


def test_counting_a_large_folder_is_given_up(tmp_path):
    (tmp_path / "file").write_bytes(b"xy")
    assert host.folder_bytes(tmp_path, time.monotonic() + 60) == 2
    assert host.folder_bytes(tmp_path, time.monotonic() - 1) is None


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        section = found(host.check_ports, host.parse_ports([port]))
        assert f"127.0.0.1:{port} can't be listened at" in texts(section, WARNING)[0]
    section = found(host.check_ports, host.parse_ports([port]))
    assert not texts(section, WARNING)
    with pytest.raises(ConfigError, match="port"):
        host.parse_ports([70000])


def test_no_loopback_is_a_problem(monkeypatch):
    def refuse(*arguments, **more):
        raise OSError("Cannot assign requested address")

    monkeypatch.setattr(host.socket, "create_connection", refuse)
    assert "no loopback port" in texts(found(host.check_ports, []), PROBLEM)[0]


def test_a_host_name_without_an_address(monkeypatch):
    def refuse(*arguments, **more):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(host.socket, "getaddrinfo", refuse)
    section = found(host.check_name)
    assert "has no address" in texts(section, WARNING)[0] and "gloo_interface" in section.findings[0].remedy


def test_a_clock_that_is_behind_or_slow(tmp_path):
    assert "1970-01-02" in texts(found(host.check_clock, Place({}, tmp_path), now=86400.0), PROBLEM)[0]
    source = tmp_path / "sys/devices/system/clocksource/clocksource0"
    source.mkdir(parents=True)
    (source / "current_clocksource").write_text("hpet\n")
    assert "hpet" in texts(found(host.check_clock, Place({}, tmp_path)), WARNING)[0]


def test_a_check_that_raises_is_a_finding():
    def broken(section):
        section.ok("this much was seen")
        raise RuntimeError("no such file")

    section, ended = examined("thing", broken, 10.0)
    assert ended
    assert [finding.status for finding in section.findings] == [OK, WARNING]
    assert "no such file" in section.findings[1].text


def test_a_check_that_hangs_is_a_finding_and_ends():
    release = threading.Event()

    def stuck(section):
        section.ok("this much was seen")
        release.wait(60)
        section.ok("too late")

    section, ended = examined("thing", stuck, 0.2)
    release.set()
    assert not ended
    assert [finding.status for finding in section.findings] == [OK, PROBLEM]
    assert "no answer within" in section.findings[1].text
