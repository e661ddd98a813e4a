"""Compiled programs by size, some of which wait on disk until they are wanted.

Loading all programs of a large ladder takes seconds, and the first request needs two of them. So those that are known
to lie ready are postponed: a thread loads them one by one, and one that is asked for sooner is loaded there and then.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

_CALM_SECONDS = 0.25


class ProgramTable(dict[Any, Any]):
    """Programs of one kind by their size; `table[size]` loads a postponed one. Safe for several threads.

    Two threads that want the same one at once both load it, and one is dropped: neither waits for the other,
    which may be the one that runs when nothing else does.

    Args:
        make: gives the program of a size; its second argument says whether it had been postponed.
    """

    def __init__(self, make: Callable[[Any, bool], Any]):
        super().__init__()
        self._make = make
        self.postponed: set[Any] = set()

    def add(self, size: Any) -> None:
        """Makes the program of a size."""
        self[size] = self._make(size, False)

    def __missing__(self, size: Any) -> Any:
        if size not in self.postponed:
            raise KeyError(size)
        program = self.setdefault(size, self._make(size, True))
        self.postponed.discard(size)
        return program


class BackgroundLoader:
    """Loads postponed programs in a thread of its own, one at a time, while nothing else is going on.

    JAX holds Python's lock for most of a load: a step that comes meanwhile waits for it, up to half a second.

    Attributes:
        has_loaded: whether none of them is postponed any more.

    Args:
        waiting: table and size of each, in the order in which they are likely to be wanted.
        afterwards: what else to do when nothing else is to be done; None for nothing.
        idle_seconds: for how long nothing has been going on.
    """

    def __init__(
        self,
        waiting: Iterable[tuple[ProgramTable, Any]],
        afterwards: Callable[[], object] | None = None,
        idle_seconds: Callable[[], float] = lambda: math.inf,
    ):
        self._waiting, self._afterwards, self._idle_seconds = list(waiting), afterwards, idle_seconds
        self._stopped = threading.Event()
        self.has_loaded = False
        self._thread = threading.Thread(target=self._run, name="load-programs")
        self._thread.start()

    def stop(self) -> None:
        """Starts no further load; the one under way goes on."""
        self._stopped.set()

    def wait(self) -> None:
        """Returns once everything is done, or it was stopped."""
        self._thread.join()

    def load_all(self) -> None:
        """Loads what is still postponed, now and in this thread."""
        for table, size in self._waiting:
            table[size]

    def _run(self) -> None:
        for table, size in self._waiting:
            if not self._await_calm():
                return
            if size not in table:
                table[size]
        self.has_loaded = True
        if self._afterwards is not None and self._await_calm():
            self._afterwards()
        self._afterwards = None  # it may hold files open

    def _await_calm(self) -> bool:
        """Waits until little disturbs; False where it is too late for anything."""
        while not self._stopped.is_set() and threading.main_thread().is_alive():  # else the exit would wait for this
            if self._idle_seconds() >= _CALM_SECONDS:
                return True
            self._stopped.wait(_CALM_SECONDS / 4)
        return False
