"""Compiled programs on disk: a second start loads them, and traces, lowers and compiles nothing.

JAX's own compilation cache spares the compile only, and in a job of several CPU processes it serves the
first of them alone. Here every process keeps entries of its own, found by a key over all that determines a program.
The two don't mix: what XLA's CPU backend loads from there, and writes again, lacks its machine code.

**Trust.** An entry is native code inside a pickle: whoever can write one runs code as the user who loads it, exactly
as with JAX's compilation cache. So the folder belongs to one user. An entry is read only if the folder and the file
are that user's and nobody else may write to them, and that is looked at before a byte is unpickled. The checksum
finds damage, not malice. Never copy entries from somebody you don't trust.

An entry that cannot be used, for whatever reason, is the same as none: the program is compiled again and replaces it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import platform
import stat
import struct
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from ryzanstein_jax import native
from ryzanstein_jax.cache import check_private, clear_partial, private_folder, whole_file

_LOG = logging.getLogger(__name__)

_SUFFIX = ".executable"
_MAGIC = b"RYZEXEC1"
#: Magic, SHA-256 of all that follows it, temporary bytes of the program (-1: unknown); then the payload.
_HEADER = struct.Struct("<8s32sq")
_TEMPORARIES = struct.Struct("<q")
_MAX_ENTRY_BYTES = 1 << 30
_MAX_BYTES = 4 << 30

#: Settings of JAX that no program depends on; any other that differs makes another program.
_IRRELEVANT = (
    "jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache", "jax_num_cpu_devices",
    "jax_platform", "jax_log", "jax_debug_log", "jax_dump", "jax_traceback", "jax_mtls", "jax_cross_host",
    "jax_cpu_get", "jax_explain", "jax_raise_persistent",
)  # fmt: skip
#: Of this package, what no program can depend on; every other file counts as one that programs are made of.
_NOT_IN_PROGRAMS = {
    "__init__.py", "__main__.py", "async_llm.py", "cache.py", "checkpoint", "cli.py", "collectives", "commands",
    "communication.py", "config.py", "demo.py", "doctor", "engine", "errors.py", "fleet.py", "llm.py", "machine.py",
    "metrics.py", "nccl.py", "orchestrator", "planner", "progress.py", "replicas.py", "request.py", "server",
    "start.py", "streams.py", "structured_outputs.py",
}  # fmt: skip


class ExecutableStore:
    """A folder of compiled programs, each under its key. Safe for several threads and processes at once.

    Args:
        folder: made, for this user alone, where it is missing; what killed processes left in it is deleted.
        max_bytes: of all entries together; those used longest ago are deleted to stay below.

    Raises:
        OSError: the folder cannot be made, or others own it or may write to it.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = _MAX_BYTES):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._trimming = threading.Lock()
        _watch_hits()
        clear_partial(private_folder(self.folder))

    def load(self, key: str, mesh: Mesh) -> jax.stages.Compiled | None:
        """The program of a key, ready to run on the devices of `mesh`; None where there is none that can be used."""
        entry = self._read(key)
        if entry is None:
            return None
        try:
            serialized, in_tree, out_tree, kernels = pickle.loads(entry[1])
            native.register_all(kernels)
            devices = list(mesh.devices.flat)
            return serialize_executable.deserialize_and_load(
                serialized, in_tree, out_tree, backend=_client(mesh), execution_devices=devices
            )
        except Exception as error:  # noqa: BLE001 - whatever is wrong with an entry, compiling again mends it
            _LOG.warning("cannot use %s, compiling again: %r", self._path(key), error)
            return None

    def holds(self, key: str) -> bool:
        """Whether there is an entry; only loading it shows whether it can be used."""
        return self._path(key).is_file()

    def temporaries(self, key: str) -> int | None:
        """Bytes that the program of a key takes on a device besides arguments and results; None where unknown."""
        entry = self._read(key)
        return entry[0] if entry is not None and entry[0] >= 0 else None

    def compile(self, key: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a program and keeps it, unless it came out of JAX's own cache."""
        before = _hits_of_thread()
        compiled = lowered.compile()
        if _hits_of_thread() == before:
            self.save(key, compiled)
        return compiled

    def save(self, key: str, compiled: jax.stages.Compiled) -> bool:
        """Keeps a program; returns whether that was possible. Never raises for a full disk or a backend without it."""
        try:
            analysis = compiled.memory_analysis()
            temporaries = _TEMPORARIES.pack(-1 if analysis is None else int(analysis.temp_size_in_bytes))
            payload = pickle.dumps((*serialize_executable.serialize(compiled), native.called_by(compiled)))
        except Exception as error:  # noqa: BLE001 - backends refuse in many ways; the program itself is fine
            _LOG.warning("this program cannot be kept for the next start: %r", error)
            return False
        if len(payload) > min(_MAX_ENTRY_BYTES, self.max_bytes):
            return False
        digest = hashlib.sha256(temporaries)
        digest.update(payload)
        try:
            with whole_file(self._path(key)) as file:
                file.write(_MAGIC + digest.digest() + temporaries)
                file.write(payload)
            self._trim()
        except OSError as error:
            _LOG.warning("cannot keep a compiled program in %s: %s", self.folder, error)
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _read(self, key: str) -> tuple[int, memoryview] | None:
        """Temporary bytes and payload of an intact entry that only this user can have written."""
        path = self._path(key)
        try:
            check_private(os.stat(self.folder), self.folder)
            # A link could lead to anything; the descriptor is checked, so that it cannot be exchanged in between.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                content = _read_checked(file, path)
                os.utime(file.fileno())  # the time of last use, which `_trim` goes by
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("ignoring %s: %s", path, error)
            return None
        if len(content) >= _HEADER.size:
            magic, digest, temporaries = _HEADER.unpack_from(content)
            rest = memoryview(content)[_HEADER.size - _TEMPORARIES.size :]
            if magic == _MAGIC and hashlib.sha256(rest).digest() == digest:
                return temporaries, rest[_TEMPORARIES.size :]
        _LOG.warning("%s is damaged, compiling again", path)
        return None

    def _trim(self) -> None:
        """Deletes what was used longest ago until all fits."""
        with self._trimming:
            entries = []
            with os.scandir(self.folder) as listing:
                for item in listing:
                    with suppress(FileNotFoundError):  # another process trims too
                        status = item.stat(follow_symlinks=False)
                        if item.name.endswith(_SUFFIX):
                            entries.append((status.st_mtime, status.st_size, item.path))
            excess = sum(size for _, size, _ in entries) - self.max_bytes
            for _, size, path in sorted(entries):
                if excess <= 0:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                excess -= size


def open_store(folder: str | Path) -> ExecutableStore | None:
    """The store in a folder; None, with a warning in the log, where it may not or cannot be used."""
    try:
        return ExecutableStore(folder)
    except OSError as error:
        _LOG.warning("compiled programs are not kept: %s", error)
        return None


def program_key(program: Mapping[str, object], environment: Mapping[str, object]) -> str:
    """The name of a program's entry: equal for equal programs in equal environments only.

    Args:
        program: what it computes; values whose `repr` tells them apart.
        environment: from `environment_of`.
    """
    described = {"program": _described(program), "environment": _described(environment)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def environment_of(mesh: Mesh) -> dict[str, object]:
    """All that a compiled program depends on besides what it computes: devices, this process, versions, settings."""
    client = _client(mesh)
    found: dict[str, object] = {
        "versions": (jax.__version__, jaxlib.__version__, flax.__version__, sys.version_info[:2]),
        "platform": (client.platform, client.platform_version),
        "processes": (jax.process_index(), jax.process_count()),
        "devices": [(device.id, device.process_index, device.device_kind) for device in mesh.devices.flat],
        "local_devices": [device.id for device in jax.local_devices()],
        "mesh": (mesh.axis_names, mesh.devices.shape, mesh.axis_types),
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", native.KERNELS_VARIABLE)],
        "config": {name: value for name, value in jax.config.values.items() if not name.startswith(_IRRELEVANT)},
        "sources": sources_digest(),
    }
    if client.platform == "cpu":
        found["host"], found["native"] = _host_processor(), native.versions()
    return found


@cache
def sources_digest() -> str:
    """SHA-256 over this package's files that programs are made of: a change of code never meets an old program."""
    digest = hashlib.sha256()
    for path in program_sources():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def program_sources() -> list[Path]:
    """This package's files that `sources_digest` covers."""
    package = Path(__file__).parent
    return sorted(path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in _NOT_IN_PROGRAMS)


@cache
def _host_processor() -> tuple[object, ...]:
    """What XLA compiles for on a CPU: its model and features, and how many cores it may use."""
    wanted: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags", "Features", "CPU part"):
                wanted.setdefault(name.strip(), value.strip())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return platform.machine(), platform.processor(), sorted(wanted.items()), cores


_THREAD = threading.local()


@cache
def _watch_hits() -> None:
    def note(event: str, **more: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _THREAD.hits = _hits_of_thread() + 1

    jax.monitoring.register_event_listener(note)


def _hits_of_thread() -> int:
    """How many compiles of this thread JAX's own cache has answered so far."""
    return int(getattr(_THREAD, "hits", 0))


def _client(mesh: Mesh) -> Any:
    return mesh.devices.flat[0].client


def _described(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    return repr(value)


def _read_checked(file: BinaryIO, path: Path) -> bytes:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_ENTRY_BYTES + _HEADER.size:
        raise OSError(f"{path} is no file of a size that was written here")
    check_private(status, path)
    return file.read()
