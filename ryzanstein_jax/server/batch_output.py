"""The output of a batch: whole lines only, whatever ends the process, and one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from ryzanstein_jax.errors import ConfigError, OutputError
from ryzanstein_jax.server.batch_index import BatchIndex, read_lines

#: Written to see whether there is room, and taken back. It ends with no newline: if it stays, it is a torn line.
_PROBE = b" " * (64 << 10)
#: An answer may be far longer than what was asked.
_MOST_LINE = 1 << 30
_SYNC_SECONDS = 1.0


class BatchOutput:
    """An output file, open and locked until it is closed.

    A line goes to the kernel in one piece as soon as it is there, so a killed process loses none that was counted; to
    the disk it goes at least once a second while lines come, and at the end, so a machine that loses power loses no
    more than that. What is lost is answered again.

    Args:
        path: the file; made where it is missing.
        index: learns which lines are answered there. A torn last line is cut off.

    Raises:
        ConfigError: the file can't be written, is being written by another run, is the input, or is of another input.
    """

    def __init__(self, path: Path, index: BatchIndex, source: Path):
        self._path, self.num_errors = path, 0
        self._synced = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise ConfigError("output", str(path), f"it can't be written: {error.strerror}") from error
        try:
            self._open(index, source)
        except BaseException:
            os.close(self._file)
            raise

    def _open(self, index: BatchIndex, source: Path) -> None:
        path = self._path
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ConfigError("output", str(path), "it is no file: a batch goes on from what its output holds")
        if path.samefile(source):
            raise ConfigError("output", str(path), "it is the input: name another file")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError("output", str(path), f"it can't be locked: {error.strerror}") from error
            raise ConfigError("output", str(path), "another run is writing it: wait until that has ended") from None
        self._end = self._whole_end()
        os.ftruncate(self._file, self._end)
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for line in read_lines(file, _MOST_LINE):
                self.num_errors += not index.note_answer(line.raw, line.number, path)
        try:
            self._put(_PROBE)
            os.fsync(self._file)
            os.ftruncate(self._file, self._end)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise ConfigError("output", str(path), f"it can't be written: {error.strerror}") from error

    def _whole_end(self) -> int:
        """Where the last whole line ends."""
        end = os.fstat(self._file).st_size
        while end > 0:
            begin = max(0, end - len(_PROBE))
            found = os.pread(self._file, end - begin, begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
        return 0

    def _put(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], self._end + done)

    def write(self, answer: dict[str, Any]) -> None:
        """Appends one answer.

        Raises:
            OutputError: the disk is full, or fails.
        """
        data = json.dumps(answer, separators=(",", ":")).encode() + b"\n"
        try:
            self._put(data)
            self._end += len(data)
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: {error.strerror}; it holds whole answers: once there is room, start again")

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Raises OutputError where the disk fails."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(self._file)
