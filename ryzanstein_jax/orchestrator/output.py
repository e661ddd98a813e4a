"""Where a rank's own output goes: onto the leader's pipe, which may break, or nobody may read, without harm."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any


class _UnbreakablePipe(io.FileIO):
    """Once the leader is dead nobody reads: what is written is lost, and the writer goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def take_output(descriptor: int | None = None) -> None:
    """Sends stdout and stderr, Python's and C++'s, to this descriptor; call it first thing in a rank.

    Lines are written at once. SIGPIPE is ignored, so that the leader's death kills no rank in the middle of a print;
    ending then is the business of whoever watches the leader.

    Args:
        descriptor: writing end of the pipe; None if it is 1 and 2 already.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if descriptor is not None:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if descriptor > 2:
            os.close(descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(_UnbreakablePipe(number, "w", closefd=False)),
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        for number in (1, 2)
    )
