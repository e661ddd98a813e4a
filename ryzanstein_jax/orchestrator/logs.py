"""What ranks write to stdout and stderr: read through pipes by one thread, kept in files of bounded size.

A rank's descriptors 1 and 2 are a pipe, so what the C++ of XLA and NCCL prints arrives too, and a library that never
stops printing fills neither the disk nor the leader's memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import re
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.run_folder import RunFolder

#: What a rank may write while the leader is busy elsewhere, before it has to wait.
PIPE_BYTES = 1 << 20
MAX_LINE = 4096  # bytes; a longer line is broken
TAIL_LINES = 200  # that are kept in memory, per rank
READ_BYTES = 1 << 16
#: Of one rank in a second. Beyond it, bytes are read and dropped: each line costs the leader time that it needs for
#: the scheduler.
BURST_BYTES = 4 << 20
WAIT_SECONDS = 2.0  # for the reading thread: a full disk must not stop the leader

_CONTROL = bytes(set(range(32)) - {9, 10}) + b"\x7f"  # so that a log shown on a terminal can't command it
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY", re.IGNORECASE)
_HUB_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{16,}")


class RunLogs:
    """The logs of one run of the leader: a folder of bounded files and the thread that writes them.

    Args:
        base: folder in which the run's own is made; None takes `logs` in the user's cache folder.
        max_file_bytes: of one file. There are at most two for each rank, whatever its generations.
        secrets: texts that are blotted out, beside the values of environment variables that sound like secrets.

    Raises:
        ConfigError: the folder can't be made, or `max_file_bytes` is below 8 KiB.
    """

    def __init__(self, base: str | Path | None = None, *, max_file_bytes: int = 4 << 20, secrets: Iterable[str] = ()):
        if max_file_bytes < 2 * MAX_LINE:
            raise ConfigError("max_file_bytes", max_file_bytes, f"use at least {2 * MAX_LINE}")
        self._folder = RunFolder(Path(base) if base is not None else cache_dir() / "logs")
        self._max_file_bytes = max_file_bytes
        found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)} | set(secrets)
        # Short ones would blot out ordinary words. Long ones first: one may hold another.
        self._secrets = sorted((text.encode() for text in found if len(text) >= 8), key=len, reverse=True)
        self._files: dict[str, _BoundedFile] = {}
        self._streams: set[RankLogs] = set()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._commands: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="rank-logs", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        """Where this run's files are: `rank-<n>.log`, and `rank-<n>.log.1` before it."""
        return self._folder.path

    def open(self, rank: int | None, generation: int) -> RankLogs:
        """The pipe for a rank that is about to be started; rank None is a standby, which gets its rank later."""
        return RankLogs(self, rank, generation)

    def close(self, *, failed: bool = False) -> None:
        """Reads what is left, ends the thread and removes the folder, unless the run failed. May be called again."""
        if self._closed:
            return
        for stream in list(self._streams):
            stream.close()
        self._call(self._finish)
        self._thread.join(WAIT_SECONDS)
        self._folder.close(keep=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _call(self, work: Callable[[], None]) -> None:
        """Has the reading thread do this now, and waits a bounded time. All of a file's writes are its own."""
        if self._closed:
            return
        done = threading.Event()
        self._commands.put((work, done))
        os.eventfd_write(self._wake, 1)
        done.wait(WAIT_SECONDS)

    def _read(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.data is not None:
                    key.data._pump(READ_BYTES)
                    continue
                os.eventfd_read(self._wake)
                while not self._commands.empty():
                    work, done = self._commands.get_nowait()
                    work()
                    done.set()
                    if self._closed:
                        return

    def _finish(self) -> None:
        self._closed = True
        self._selector.close()
        os.close(self._wake)
        for file in self._files.values():
            file.close()

    def _file(self, name: str) -> _BoundedFile:
        if name not in self._files:
            self._files[name] = _BoundedFile(self.folder / f"{name}.log", self._max_file_bytes)
        return self._files[name]

    def _clean(self, line: bytes) -> bytes:
        for secret in self._secrets:
            line = line.replace(secret, b"***")
        return _HUB_TOKEN.sub(b"***", line).translate(None, _CONTROL)


class RankLogs:
    """The output of one rank's process. Start it with `stdout=logs.writer_fd, stderr=logs.writer_fd`.

    Args:
        run: the logs of the run.
        rank: of the process; None for a standby.
        generation: of its group.
    """

    def __init__(self, run: RunLogs, rank: int | None, generation: int):
        if run._closed:
            raise ConfigError("logs", str(run.folder), "the logs of this run are closed")
        self._run = run
        self._lock = threading.Lock()  # guards the lines only
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._partial = b""
        self._window, self._window_bytes, self._dropped = 0.0, 0, 0
        self._ended = threading.Event()
        self.assign(rank, generation)
        self._reader_fd, self._writer_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader_fd, False)
        with contextlib.suppress(OSError):  # more than this user may have: the usual 64 KiB remain
            fcntl.fcntl(self._writer_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        run._streams.add(self)
        run._call(self._begin)

    @property
    def writer_fd(self) -> int:
        """The descriptor to give to the process; not inherited on its own. Close it here with `started`."""
        return self._writer_fd

    @property
    def ended(self) -> bool:
        """Whether the process, and all that inherited the descriptor, closed it: nothing more will come."""
        return self._ended.is_set()

    def assign(self, rank: int | None, generation: int) -> None:
        """Names the rank of what is written from now on, for a standby that takes one."""
        self._name = "standby" if rank is None else f"rank-{rank}"
        self._label = f"{'standby' if rank is None else f'rank {rank}'} generation {generation} | ".encode()

    def started(self) -> None:
        """Closes this process's copy of the writing end. Call it once the rank runs: else its end is not seen."""
        if self._writer_fd >= 0:
            os.close(self._writer_fd)
            self._writer_fd = -1

    def attach(self, sock: socket.socket) -> None:
        """Reads from a socket instead of the pipe from now on: the process is on another machine. Owns the socket."""
        sock.setblocking(False)
        descriptor = sock.detach()
        if self._run._closed:
            os.close(descriptor)
        else:
            self._run._call(lambda: self._switch(descriptor))
        self.started()

    def tail(self, count: int = 20) -> list[str]:
        """The last lines, at most `TAIL_LINES`, without their prefix. All that was written before the call is seen."""
        if not self.ended:
            self._run._call(lambda: self._pump(PIPE_BYTES))
        with self._lock:
            return list(self._lines)[-count:] if count > 0 else []

    def close(self) -> None:
        """Reads what the pipe holds and closes it. A process that still writes gets EPIPE. May be called again."""
        self.started()
        self._run._call(self._finish)
        self._run._streams.discard(self)

    # What follows runs in the reading thread only.

    def _begin(self) -> None:
        self._run._selector.register(self._reader_fd, selectors.EVENT_READ, self)

    def _finish(self) -> None:
        if not self.ended:
            self._pump(PIPE_BYTES)
        if not self.ended:
            self._end()

    def _switch(self, reader_fd: int) -> None:
        if self.ended:
            os.close(reader_fd)
            return
        self._run._selector.unregister(self._reader_fd)
        os.close(self._reader_fd)
        self._reader_fd = reader_fd
        self._begin()

    def _end(self) -> None:
        self._report_dropped()
        if self._partial:
            self._write(self._partial + b"\n")
            self._partial = b""
        self._run._selector.unregister(self._reader_fd)
        os.close(self._reader_fd)
        self._ended.set()

    def _pump(self, limit: int) -> None:
        """Reads what is there, up to `limit` bytes: no rank may keep the thread from the others."""
        while limit > 0 and not self.ended:
            try:
                data = os.read(self._reader_fd, READ_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the other machine is gone
                data = b""
            if not data:
                self._end()
                return
            limit -= len(data)
            now = time.monotonic()
            if now - self._window > 1.0:
                self._window, self._window_bytes = now, 0
                self._report_dropped()
            self._window_bytes += len(data)
            if self._window_bytes > BURST_BYTES:
                self._dropped += len(data)
            else:
                self._take(data)

    def _take(self, data: bytes) -> None:
        whole, newline, self._partial = (self._partial + data).rpartition(b"\n")
        self._write(whole + newline)
        if len(self._partial) > MAX_LINE:
            self._write(self._partial + b"\n")
            self._partial = b""

    def _report_dropped(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            # What stood before the gap and what comes after it are not one line.
            begun, self._partial = self._partial, b""
            self._write((begun + b"\n" if begun else b"") + b"(%d bytes left out: too many in a second)\n" % dropped)

    def _write(self, text: bytes) -> None:
        """Files whole lines and remembers the last ones."""
        if not text:
            return
        prefix = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ ").encode() + self._label
        file, block, shown = self._run._file(self._name), bytearray(), []
        block_bytes = min(READ_BYTES, self._run._max_file_bytes)
        for long_line in text[:-1].split(b"\n"):
            clean = self._run._clean(long_line)
            for begin in range(0, max(1, len(clean)), MAX_LINE):
                line = clean[begin : begin + MAX_LINE]
                shown.append(line)
                if len(block) + len(prefix) + len(line) >= block_bytes:
                    file.write(block)
                    block = bytearray()
                block += prefix + line + b"\n"
        file.write(block)
        with self._lock:
            self._lines.extend(line.decode(errors="backslashreplace") for line in shown[-TAIL_LINES:])


class _BoundedFile:
    """A file that begins anew when it is full; the full one is kept as `<name>.1`. Readable by its owner only."""

    def __init__(self, path: Path, limit: int):
        self._path, self._limit = path, limit
        self._fd, self._size = -1, 0

    def write(self, block: bytes | bytearray) -> None:
        """Adds whole lines, no more than the file may hold. On a full disk they are lost, and nothing else is."""
        with contextlib.suppress(OSError):
            if self._fd >= 0 and self._size + len(block) > self._limit:
                self.close()
                os.replace(self._path, f"{self._path}.1")
            if self._fd < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd, self._size = os.open(self._path, flags, 0o600), 0
            self._size += os.write(self._fd, block)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
