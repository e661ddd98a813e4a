"""`Standby`: a second group that waits to take the place of the one that serves.

Most of a restart is loading programs. So in the first calm moment after a group began to serve, another one is
started: its ranks join a runtime of their own and load the programs. After a fault it takes over and has the weights
and the KV cache still to fetch, which it does not hold before: memory is taken once, not twice.

It is no part of what serves. Should it die, hang or fail to load, another one is tried later, and no request notices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.errors import ConfigError, RyzansteinError
from ryzanstein_jax.orchestrator.devices import DeviceReport
from ryzanstein_jax.orchestrator.events import EventKind, EventLog
from ryzanstein_jax.orchestrator.fault import GroupFault
from ryzanstein_jax.orchestrator.frames import FrameError, Kind
from ryzanstein_jax.orchestrator.health import HealthMonitor
from ryzanstein_jax.orchestrator.launch import Launch
from ryzanstein_jax.orchestrator.process_group import ProcessGroup

#: A standby is started once a group has served for so long: first it has replays to do;
_SETTLE_SECONDS = 1.0
#: and then once no step has run for so long, since loading slows them down whatever its priority is: ranks that compute
#: wait for each other, and with them Gloo's threads, which are as humble;
_CALM_SECONDS = 0.25
#: but at the latest after so long.
_AT_LATEST_SECONDS = 30.0
#: The wait after a failure; it doubles with each in a row.
_BACKOFF_SECONDS, _MOST_BACKOFF = 2.0, 300.0
#: Loading beside ranks that compute takes its time, and Python does not get its turn meanwhile.
_PATIENCE_SECONDS = 300.0
#: Memory of the leader's machine, in bytes, that each rank of it has to find free, by default: a rank with the
#: programs of a model of 30 layers measured 0.37 GB.
_ROOM = 1 << 30


class Standby:
    """Starts, watches and hands over standby groups. It belongs to the supervisor's thread, but for `summary`.

    Args:
        options: whether to have one, and timeouts.
        events: told of what becomes of it.
        launch: starts the ranks of a group on some slots.
        config_of: the settings that ranks with these devices load with.
        name: what events call it.
    """

    def __init__(
        self,
        options: OrchestratorConfig,
        events: EventLog,
        launch: Callable[[tuple[int, ...]], ProcessGroup],
        config_of: Callable[[Sequence[DeviceReport]], EngineConfig],
        *,
        name: str = "a standby",
    ):
        self._options, self._events, self._name = options, events, name
        self._launch_group, self._config_of = launch, config_of
        patient = max(options.heartbeat_timeout_sec, _PATIENCE_SECONDS)
        self._monitor = HealthMonitor(dataclasses.replace(options, heartbeat_timeout_sec=patient))
        self._launch: Launch | None = None
        self._slots: tuple[int, ...] = ()
        self._failures = 0
        self._not_before = 0.0
        self._is_prepared = False

    @property
    def is_started(self) -> bool:
        """Whether there are processes, prepared or not."""
        return self._launch is not None

    @property
    def is_prepared(self) -> bool:
        """Whether it could take over now."""
        return self._launch is not None and self._is_prepared

    def check(self, devices: Sequence[DeviceReport]) -> None:
        """Refuses what can't be, before anything is loaded.

        Raises:
            ConfigError: one is asked for, and the devices have memory of their own.
        """
        if self._options.standby is True and not _on_cpu(devices):
            remedy = "a second process on a GPU would reserve memory that the first one needs: use False"
            raise ConfigError("standby", True, remedy)

    def wanted(self, devices: Sequence[DeviceReport], config: EngineConfig) -> bool:
        """Whether there shall be one for these devices."""
        options = self._options
        if not (options.enable_auto_restart and options.max_restart_attempts):
            return False
        if isinstance(options.standby, bool):
            return options.standby
        # Programs that are not kept would have to be compiled again.
        if not _on_cpu(devices) or config.compilation_cache_dir == "":
            return False
        return has_room(len(devices))

    def begin(self) -> None:
        """A group has begun to serve: it is left alone for a moment."""
        self._not_before = max(self._not_before, time.monotonic() + _SETTLE_SECONDS)

    def tend(self, slots: tuple[int, ...], idle_seconds: float) -> None:
        """Does what is to be done next for a standby on these slots, and waits for nothing.

        Args:
            slots: of the group that serves.
            idle_seconds: for how long it has had no step to run.
        """
        if self._launch is None:
            late = time.monotonic() - self._not_before
            if late >= _AT_LATEST_SECONDS or (late >= 0.0 and idle_seconds >= _CALM_SECONDS):
                self._start(slots)
            return
        launch = self._launch
        try:
            launch.listen(0.0)
            if launch.prepared_for is None:
                launch.check_time(Kind.HELLO)
                if launch.has(Kind.HELLO):
                    launch.prepare(self._config_of(launch.join()))
            elif not self._is_prepared:
                launch.check_time(Kind.PREPARED)
                if launch.has(Kind.PREPARED):
                    self._is_prepared, self._failures = True, 0
                    self._events.record(
                        EventKind.STANDBY, f"{self._name} is prepared", generation=launch.group.generation
                    )
        except (GroupFault, RyzansteinError, OSError) as error:
            self._lose(error)

    def _start(self, slots: tuple[int, ...]) -> None:
        try:
            group = self._launch_group(slots)
        except (GroupFault, RyzansteinError, OSError) as error:
            self._put_off(f"{self._name} could not be started: {error}")
            return
        self._monitor.watch(group)
        self._launch = Launch(group, self._monitor, self._options, lambda: False)
        self._slots, self._is_prepared = slots, False

    def take(self, slots: tuple[int, ...]) -> Launch | None:
        """The standby, for a group on these slots that is needed now; None where none of use is there.

        One that is still loading is not: at its priority that may take longer than a start.
        """
        launch = self._launch
        if launch is None:
            return None
        try:
            launch.listen(0.0)
            fits = self.is_prepared and self._slots == slots
            if not fits or launch.prepared_for != self._config_of(launch.join()):
                self.drop()
        except (GroupFault, RyzansteinError, OSError) as error:
            self._lose(error)
        launch, self._launch = self._launch, None
        self._monitor.watch(None)
        return launch

    def drop(self) -> None:
        """Ends it; nobody needs it any more."""
        launch, self._launch = self._launch, None
        self._monitor.watch(None)
        if launch is None:
            return
        try:
            launch.group.kill()
        except (GroupFault, FrameError, OSError) as error:
            self._events.record(EventKind.KILLED, f"killing {self._name}: {error!r}", severity="error")

    def _lose(self, error: Exception) -> None:
        assert self._launch is not None
        generation = self._launch.group.generation
        self.drop()
        self._put_off(f"{self._name} is lost: {error}", generation)

    def _put_off(self, message: str, generation: int = 0) -> None:
        wait = min(_MOST_BACKOFF, _BACKOFF_SECONDS * 2.0**self._failures)
        self._failures = min(self._failures + 1, 64)
        self._not_before = time.monotonic() + wait
        self._events.record(EventKind.STANDBY, message, severity="warning", generation=generation)

    # --- for people

    def pids(self) -> list[int]:
        """Its processes, as far as they are of this machine."""
        launch = self._launch
        return [rank.pid for rank in launch.group.ranks if rank.pid > 0] if launch is not None else []

    def summary(self) -> dict[str, Any] | None:
        """Where it stands, as plain values; None without one."""
        launch = self._launch
        if launch is None:
            return None
        return {"generation": launch.group.generation, "prepared": self.is_prepared, "pids": self.pids()}


def has_room(num_ranks: int) -> bool:
    """Whether this machine has memory for the programs of so many ranks, as far as is known."""
    room = _available_bytes()
    return room is None or room >= _ROOM * num_ranks


def _on_cpu(devices: Sequence[DeviceReport]) -> bool:
    return all(device.platform == "cpu" for device in devices)


def _available_bytes() -> int | None:
    """Memory of this machine that could be had without swapping; None where that is not told."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next((line for line in file if line.startswith("MemAvailable:")), None)
        return None if line is None else int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
