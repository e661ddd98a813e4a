"""`Capacity`: devices, pages and size of steps that the next generation gets, after what faults took away."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.errors import ConfigError, MemoryBudgetError, RecoveryExhaustedError, RyzansteinError
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.orchestrator.devices import DeviceReport
from ryzanstein_jax.orchestrator.launch import Ready, rank_config
from ryzanstein_jax.orchestrator.resources import ResourceAllocator


class Capacity:
    """What there is to serve with, over all generations. It belongs to the supervisor's thread.

    Args:
        spec, config: the model and the user's settings, which are the most that there is ever to be.
        options: how narrow a group may become.
    """

    def __init__(self, spec: ModelSpec, config: EngineConfig, options: OrchestratorConfig):
        self._config, self._least = config, options.min_tensor_parallel_size
        self._allocator = ResourceAllocator(spec, config)
        self._here: tuple[int, ...] = ()
        self._devices: dict[int, DeviceReport] = {}  # by slot, of all generations
        self._num_pages: dict[int, int] = {}  # by width: all generations of one width have the same programs
        self._batch_divisor = 1
        self._page_share = 1.0  # of the pages that the memory budget has room for

    # --- what there is

    @property
    def excluded(self) -> dict[int, str]:
        """Slots that no group may use, and why."""
        return self._allocator.excluded

    def usable(self, here: Sequence[int]) -> list[int]:
        """Those of some slots that a group may use."""
        return [slot for slot in here if slot not in self._allocator.excluded]

    def choose(self, here: tuple[int, ...]) -> tuple[int, ...]:
        """Devices for the next generation: as many as configured, or as there are left and the model fits.

        Args:
            here: slots of all machines that are here.

        Raises:
            RecoveryExhaustedError: too few are left.
            ConfigError, MemoryBudgetError: the model fits no width that is left; the message holds the sum.
        """
        self._here, usable = here, self.usable(here)
        width = min(self._config.tensor_parallel_size, len(usable))
        if width < self._least:
            raise RecoveryExhaustedError(
                f"{len(usable)} of {len(here)} devices are left, fewer than "
                f"min_tensor_parallel_size={self._least}: {self._allocator.excluded}"
            )
        if self._devices and width < self._config.tensor_parallel_size:
            width = self._allocator.degraded_width(width, least=self._least).width
        return tuple(usable[:width])

    def widest(self, here: tuple[int, ...]) -> int:
        """How many devices `choose` would give; 0 where it refuses."""
        try:
            return len(self.choose(here))
        except RyzansteinError:
            return 0

    def narrower(self, width: int) -> int:
        """The width that a group of this one would have without one of its devices; 0 where it could not go on."""
        try:
            return self._allocator.degraded_width(width - 1, least=self._least).width
        except (ConfigError, MemoryBudgetError):
            return 0

    def check_fit(self, slots: Sequence[int], devices: Sequence[DeviceReport]) -> None:
        """Refuses a model that can't fit before anything is loaded. A device not seen yet counts as those seen.

        Raises:
            ConfigError, MemoryBudgetError: as `ResourceAllocator.place`.
        """
        self._devices |= dict(zip(slots, devices, strict=True))
        everything = [self._devices.get(slot, devices[0]) for slot in range(1 + max(self._here))]
        self._allocator.place(everything, len(devices))

    def rank_config(self, devices: Sequence[DeviceReport]) -> EngineConfig:
        """The settings that ranks load with."""
        return rank_config(self._config, devices, self._num_pages.get(len(devices)), self._page_share)

    def learn(self, width: int, ready: Ready) -> None:
        """Remembers what a group of this width found out about memory."""
        self._num_pages.setdefault(width, ready.limits.num_pages)
        memory = ready.report.memory
        self._allocator.learn(width, memory.temporaries, memory.logits)

    def is_reduced(self, width: int) -> bool:
        """Whether a group of this width serves with less than was configured."""
        return width < self._config.tensor_parallel_size or self._batch_divisor > 1 or self._page_share < 1

    def limits(self, limits: ExecutorLimits) -> ExecutorLimits:
        """What a group offers, less what was taken back after the device ran out of memory."""
        divisor = self._batch_divisor
        if divisor == 1:
            return limits
        seqs = max(1, limits.max_num_seqs // divisor)
        tokens = max(1, limits.max_prefill_tokens // divisor)
        prefills = max(1, limits.max_prefills // divisor)
        return dataclasses.replace(
            limits, max_num_seqs=seqs, max_prefill_tokens=tokens, max_prefills=prefills, max_rows=seqs + prefills
        )

    # --- what is taken away

    def exclude(self, slot: int, reason: str) -> None:
        """Leaves a device out from the next generation on."""
        self._allocator.exclude(slot, reason)

    def restore(self, slot: int) -> None:
        """Takes a device in again from the next generation on."""
        self._allocator.restore(slot)

    def slot_of(self, pci_bus_id: str | None, index: int, num_local: int) -> int | None:
        """The slot of one of this machine's GPUs, which are the first slots; None where it takes no part.

        Args:
            pci_bus_id: of the GPU, as "0000:3b:00.0".
            index: its number, which counts where ranks told no bus ids: CUDA may number GPUs otherwise than NVML.
            num_local: how many slots this machine has.
        """
        known = {report.pci_bus_id: slot for slot, report in self._devices.items() if slot < num_local}
        known.pop("", None)
        if known and pci_bus_id is not None:
            return known.get(pci_bus_id)
        return index if index < num_local else None

    def can_exclude(self, slots: Sequence[int], width: int) -> bool:
        """Whether enough devices would be left without some, and the model would fit them; `width` fits already."""
        left = [slot for slot in self.usable(self._here) if slot not in slots]
        if min(self._config.tensor_parallel_size, len(left)) == width:
            return True
        try:
            self._allocator.degraded_width(len(left), least=self._least)
        except (ConfigError, MemoryBudgetError):
            return False
        return True

    def shrink_batch(self) -> None:
        """Half the tokens and sequences a step."""
        self._batch_divisor *= 2

    def shrink_pages(self) -> None:
        """Half the pages."""
        self._page_share /= 2
        self._num_pages = {width: max(2, pages // 2) for width, pages in self._num_pages.items()}
