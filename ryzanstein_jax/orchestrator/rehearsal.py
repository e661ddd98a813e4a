"""`Rehearsal`: has the programs of a narrower group compiled while there is nothing else to do.

Where a device is left out, the group that remains has another width, and with it other programs. Compiled only then,
they would keep every stream waiting for as long as a first start takes. So a group of that width is started once,
compiles what is not on disk yet, and ends. It holds no weights and no KV cache.

A request ends it at once, since compiling would slow its steps down; what was compiled until then stays on disk.
"""

from __future__ import annotations

from collections.abc import Callable

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.orchestrator.capacity import Capacity
from ryzanstein_jax.orchestrator.events import EventLog
from ryzanstein_jax.orchestrator.process_group import ProcessGroup
from ryzanstein_jax.orchestrator.standby import Standby, has_room

#: It begins once no step has run for so long, in seconds: compiling takes a while, and people pause between messages.
_QUIET_SECONDS = 5.0
#: Whoever has run a step within so many seconds is not to be disturbed; a supervisor's turn takes less.
_BUSY_SECONDS = 0.2


class Rehearsal:
    """It belongs to the supervisor's thread.

    Args:
        options: as of the orchestrator.
        events: told of what becomes of it.
        launch: starts the ranks of a group on some slots.
        capacity: knows the width that comes next.
    """

    def __init__(
        self,
        options: OrchestratorConfig,
        events: EventLog,
        launch: Callable[[tuple[int, ...]], ProcessGroup],
        capacity: Capacity,
    ):
        self._group = Standby(options, events, launch, capacity.rank_config, name="a narrower group")
        self._capacity = capacity
        self._done: set[int] = set()  # widths

    def tend(self, slots: tuple[int, ...], idle_seconds: float) -> None:
        """Does what is to be done next, and waits for nothing.

        Args:
            slots: of the group that serves.
            idle_seconds: for how long it has had no step to run.
        """
        if self._group.is_started:
            if idle_seconds < _BUSY_SECONDS:
                self.drop()
                return
        elif idle_seconds < _QUIET_SECONDS:
            return
        width = self._capacity.narrower(len(slots))
        if not width or width in self._done or not (self._group.is_started or has_room(width)):
            return
        self._group.tend(slots[:width], idle_seconds)
        if self._group.is_prepared:
            self._done.add(width)
            self.drop()

    def drop(self) -> None:
        """Ends it; it begins again in the next quiet moment, with what is on disk by then."""
        self._group.drop()
