"""Progress bars on the terminal or in a notebook, and the lines printed at start-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressBars:
    """One bar per activity; nothing at all when switched off."""

    def __init__(self, enabled: bool):
        columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        # Without ipywidgets a notebook would get a warning for each bar, and no bar.
        possible = not console.is_jupyter or find_spec("ipywidgets") is not None
        self._progress = Progress(*columns, console=console, disable=not (enabled and possible), transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()


@contextmanager
def progress_bars(enabled: bool) -> Iterator[ProgressBars]:
    """Bars that vanish when the block ends."""
    bars = ProgressBars(enabled)
    bars.start()
    try:
        yield bars
    finally:
        bars.stop()


def say(text: str) -> None:
    """A line for a person, on standard error so that results can be piped."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
