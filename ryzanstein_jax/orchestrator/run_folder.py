"""A folder of one run of the leader: locked while it lives, so that the next run can tell it from a dead one's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ryzanstein_jax.errors import ConfigError

KEPT_FAILURES = 3  # folders of failed runs that are kept, the newest
_NAME = re.compile(r"run-\d+-\d+-\d+")
_LOCK, _FAILED = "lock", "failed"


class RunFolder:
    """`run-<pid>-<start time>-<number>` in `base`, readable by its owner only. Making it clears away those of the dead.

    Whether a leader lives is told by a lock that it holds on a file of its folder: the kernel releases it with the
    process, whereas a process id means nothing to another container that shares the folder.

    Args:
        base: folder for those of all runs; it is made if need be.

    Raises:
        ConfigError: the folder can't be made or locked.
    """

    def __init__(self, base: Path):
        self.base = base
        try:
            base.mkdir(parents=True, exist_ok=True)
            with _locked(base / ".lock"):  # else a folder could be cleared away before its lock is held
                _clear(base)
                start = int(psutil.Process().create_time())
                number = 0
                while (path := base / f"run-{os.getpid()}-{start}-{number}").exists():
                    number += 1
                path.mkdir(mode=0o700)
                self._lock = _lock(path / _LOCK)
        except OSError as error:
            raise ConfigError("log folder", str(base), f"give a folder that can be written to ({error})") from error
        self.path = path

    def close(self, *, keep: bool) -> None:
        """Lets go of the folder and removes it, or marks it as a failed run's to be kept a while."""
        if self._lock < 0:
            return
        with contextlib.suppress(OSError), _locked(self.base / ".lock"):
            if keep:
                (self.path / _FAILED).touch()
            else:
                shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


def _clear(base: Path) -> None:
    """Removes the folders of dead leaders, but for the last failed runs, which somebody may want to read."""
    failed: list[tuple[float, Path]] = []
    for path in base.iterdir():
        if not _NAME.fullmatch(path.name) or path.is_symlink() or not (path / _LOCK).is_file():
            continue  # not one of ours
        try:
            os.close(_lock(path / _LOCK, wait=False))
        except OSError:
            continue  # its leader lives
        marker = path / _FAILED
        if marker.is_file():
            failed.append((marker.stat().st_mtime, path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    for _, path in sorted(failed)[: max(0, len(failed) - KEPT_FAILURES)]:
        shutil.rmtree(path, ignore_errors=True)


def _lock(path: Path, *, wait: bool = True, seconds: float = 10.0) -> int:
    """A descriptor that holds the lock of this file until it is closed.

    Raises:
        OSError: another holds it, at once or still after `seconds`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if not wait or time.monotonic() > deadline:
                os.close(descriptor)
                raise
        except OSError:
            os.close(descriptor)
            raise
        time.sleep(0.01)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = _lock(path)
    try:
        yield
    finally:
        os.close(descriptor)
