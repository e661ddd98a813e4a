"""What the host gives: memory, limits, caches, ports, clock."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

import psutil

from ryzanstein_jax.budget import host_bytes, size_text
from ryzanstein_jax.cache import cache_dir, check_private
from ryzanstein_jax.config import parse_address
from ryzanstein_jax.doctor.finding import Place, Section
from ryzanstein_jax.errors import ConfigError

_GIB = 1 << 30
_LEAST_MEMORY, _LEAST_DISK, _LEAST_SHM = 2 * _GIB, 2 * _GIB, _GIB
_LEAST_FILES = 4096
#: A folder's size is added up for so long and of so many files, so that a large or slow disk holds nothing up.
_MOST_FILES, _MOST_SECONDS = 100_000, 2.0
#: Clocks that a call reads without leaving the process.
_FAST_CLOCKS = {"tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"}


def check_memory(section: Section) -> None:
    """The host's, and the control group's limit of it."""
    memory, limit = psutil.virtual_memory(), host_bytes()
    section.facts |= {"total": memory.total, "available": memory.available, "limit": limit}
    text = f"{size_text(memory.available)} of {size_text(memory.total)} are free"
    if limit < memory.total:
        text += f"; this control group may take {size_text(limit)}"
    if min(memory.available, limit) < _LEAST_MEMORY:
        section.warn(
            text, "stop what takes it, or give this container more: loading a model takes memory of the host too"
        )
    else:
        section.ok(text)


def check_limits(section: Section, place: Place, gpus: int = 0) -> None:
    """Shared memory, open files, locked memory, processors."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    section.facts["cores"] = cores
    quota = (place.read("sys/fs/cgroup/cpu.max") or "max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        share = int(quota[0]) / int(quota[1])
        section.facts["cpu_quota"] = share
        if share < cores:
            section.warn(f"{cores} processors are visible and this control group may use {share:g}",
                         "raise the limit, or pin the process to as many processors (taskset)")  # fmt: skip
    section.ok(f"{cores} processors")
    with contextlib.suppress(OSError):
        size = shutil.disk_usage(place.root / "dev" / "shm").total
        section.facts["dev_shm"] = size
        if gpus > 1 and size < _LEAST_SHM:
            section.warn(f"/dev/shm has {size_text(size)}: NCCL's shared memory may not fit",
                         "start the container with --shm-size=1g or --ipc=host")  # fmt: skip
        else:
            section.ok(f"/dev/shm has {size_text(size)}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    section.facts["open_files"] = soft
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        allowed = "" if hard == resource.RLIM_INFINITY or hard >= _LEAST_FILES else f" (the hard limit is {hard})"
        section.warn(f"a process may open {soft} files: a busy server and NCCL's sockets take more",
                     f"ulimit -n 65536{allowed}")  # fmt: skip
    else:
        section.ok(f"{'any number of' if soft == resource.RLIM_INFINITY else soft} open files")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    section.facts["locked_memory"] = None if locked == resource.RLIM_INFINITY else locked
    adapters = place.names("sys/class/infiniband")
    section.facts["infiniband"] = adapters
    if adapters and locked != resource.RLIM_INFINITY:
        section.warn(f"{', '.join(adapters[:4])} need locked memory, and a process may lock {size_text(locked)}",
                     "ulimit -l unlimited; in a container --ulimit memlock=-1")  # fmt: skip


def check_caches(section: Section) -> None:
    """The user's cache folder: whose it is, who may write to it, what is in it, and what room is left."""
    folder = cache_dir()
    section.facts["folder"] = str(folder)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:  # tried, since rights alone do not tell: it may be read-only
            file.write(b"x")
    except OSError as error:
        remedy = "set RYZANSTEIN_CACHE to a folder of yours"
        section.problem(f"{folder} cannot be written to: {error.strerror or error}", remedy)
        return
    if not folder.exists():
        section.ok(f"{folder} does not exist yet")
    else:
        _check_folder(section, folder)
    free = shutil.disk_usage(existing).free
    section.facts["free"] = free
    if free < _LEAST_DISK:
        section.warn(f"{size_text(free)} are left on the disk of {folder}", "make room, or set RYZANSTEIN_CACHE")


def _check_folder(section: Section, folder: Path) -> None:
    sizes = {}
    deadline = time.monotonic() + _MOST_SECONDS
    for part in sorted(folder.iterdir()):
        if part.is_dir() and not part.is_symlink():
            sizes[part.name] = size = folder_bytes(part, deadline)
            try:
                check_private(part.stat(), part)
            except PermissionError as error:
                # What is compiled is native code: it is read from nowhere else than a folder of this user's alone.
                section.warn(str(error), "chown or chmod it, or set RYZANSTEIN_CACHE: its entries are not used")
            if size is None:
                section.ok(f"{part.name}: more than could be counted in {_MOST_SECONDS:g} s")
    section.facts["sizes"] = sizes
    known = ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items() if size is not None)
    mode = stat.S_IMODE(folder.stat().st_mode)
    section.ok(f"{folder} (mode {mode:o}): {known or 'empty'}")


def folder_bytes(folder: Path, deadline: float) -> int | None:
    """Bytes of all files below a folder; None where there are too many to count until the deadline."""
    total = count = 0
    for where, _, files in os.walk(folder):
        for name in files:
            count += 1
            if count > _MOST_FILES or time.monotonic() > deadline:
                return None
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def check_ports(section: Section, addresses: list[str]) -> None:
    """Whether loopback ports can be had, and those of the server and the leader.

    Args:
        addresses: "host:port" of each that shall be free.
    """
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen(1)
            with socket.create_connection(probe.getsockname(), timeout=2.0):
                section.ok("a loopback port listens and answers")
    except OSError as error:
        section.problem(f"no loopback port can be had: {error}", "bring the loopback interface up (ip link set lo up)")
        return
    for address in addresses:
        host, port = parse_address("port", address)
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                section.ok(f"{address} is free")
        except OSError as error:
            section.warn(f"{address} can't be listened at: {error.strerror or error}", "use another --port")


def check_name(section: Section) -> None:
    """Whether this machine's name leads to it: Gloo, between processes, listens at that address."""
    name = socket.gethostname()
    section.facts["name"] = name
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        section.warn(f"the host name {name} has no address ({error}): CPU ranks can't find each other",
                     "add it to /etc/hosts, or set gloo_interface (-O gloo_interface=eth0)")  # fmt: skip
        return
    section.facts["addresses"] = found
    section.ok(f"{name} is {', '.join(found)}")


def check_clock(section: Section, place: Place, now: float | None = None) -> None:
    """Whether it is set, and quick to read."""
    now = time.time() if now is None else now
    newest = max(os.stat(__file__).st_mtime, os.stat(os.__file__).st_mtime)
    if now < newest - 86400:
        section.problem(f"it is {time.strftime('%Y-%m-%d', time.gmtime(now))}, before this software was installed",
                        "set the clock: downloads over TLS fail, and logs and caches are misled")  # fmt: skip
    source = place.read("sys/devices/system/clocksource/clocksource0/current_clocksource")
    section.facts["source"] = source
    if source and source not in _FAST_CLOCKS:
        section.warn(f"the clock source is {source}, which is slow to read",
                     "boot with clocksource=tsc where the processor has a stable one")  # fmt: skip
    else:
        section.ok(
            f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC" + (f", source {source}" if source else "")
        )


def gpus_of_driver(place: Place) -> int:
    """NVIDIA GPUs that the kernel's driver knows of."""
    return len(place.names("proc/driver/nvidia/gpus"))


def parse_ports(ports: list[int]) -> list[str]:
    """Loopback addresses of ports.

    Raises:
        ConfigError: one is no port.
    """
    for port in ports:
        if not 1 <= port <= 65535:
            raise ConfigError("port", port, "use a port from 1 to 65535")
    return [f"127.0.0.1:{port}" for port in ports]
