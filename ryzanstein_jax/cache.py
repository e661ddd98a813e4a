"""Where this package keeps files between runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ryzanstein_jax.errors import ConfigError

_PARTIAL = ".partial-"


def cache_dir() -> Path:
    """The user's cache folder of this package; it may not exist yet.

    `RYZANSTEIN_CACHE` names it; else it is `ryzanstein_jax` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        ConfigError: the user has no home folder and neither variable is set.
    """
    own = os.environ.get("RYZANSTEIN_CACHE")
    try:
        if own:
            return Path(own).expanduser().absolute()
        shared = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification: a relative path is invalid and has to be ignored.
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError("RYZANSTEIN_CACHE", own, "set it to a folder: this user has no home folder") from error
    return base / "ryzanstein_jax"


def private_folder(folder: Path) -> Path:
    """Makes a folder for this user alone where it is missing.

    Raises:
        OSError: it cannot be made, or others own it or may write to it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(os.stat(folder), folder)
    return folder


def check_private(status: os.stat_result, path: Path) -> None:
    """Raises PermissionError unless this user owns a file or folder and nobody else may write to it."""
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {status.st_uid}: it is not trusted")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {path}: it is not trusted (chmod go-w once you know what is in it)")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, for this user alone, that appears under its name whole or not at all.

    Its writer holds a lock on it, which the kernel releases with the process: `clear_partial` tells what a dead one
    has left from what is being written.
    """
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_PARTIAL)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # taken for a dead one's before it was locked
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.replace(name, path)  # while it is locked
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def clear_partial(folder: Path) -> None:
    """Deletes what writers of `whole_file` that were killed have left in a folder."""
    with contextlib.suppress(FileNotFoundError):
        for left in folder.glob(f"{_PARTIAL}*"):
            try:
                descriptor = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue  # it was finished or cleared just now, or is none of ours
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)
            except OSError:
                pass  # its writer lives
            finally:
                os.close(descriptor)
