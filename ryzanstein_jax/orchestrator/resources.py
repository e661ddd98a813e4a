"""`ResourceAllocator`: which devices form the mesh, how many pages fit, and what is left when some are gone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ryzanstein_jax.budget import MemoryPlan, plan_memory, resolve_dtype, resolve_fraction
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.errors import ConfigError, MemoryBudgetError
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.orchestrator.devices import DeviceReport


@dataclass(frozen=True)
class Placement:
    """A mesh and what each of its devices holds.

    Attributes:
        slots: places of the chosen devices in the list of all, ascending: the mesh in order of ranks.
        width: how many they are.
        memory_bytes: of the device that has the least, in bytes.
        memory: the sum for one device; its `num_pages` is the page budget.
        note: what was left out and why; "" if nothing was.
    """

    slots: tuple[int, ...]
    width: int
    memory_bytes: int
    memory: MemoryPlan
    note: str


@dataclass(frozen=True)
class _Learnt:
    """What a start measured, in bytes on one device."""

    temporaries: int
    logits: int


class ResourceAllocator:
    """Turns the visible devices and `memory_fraction` into a mesh and a page budget.

    Weights and pages are counted exactly as the ranks count them. Temporaries and logits are known once a start
    measured them (`learn`), and count as nothing before. Not thread-safe: it belongs to the orchestrator.

    Args:
        spec: what the model computes.
        config: the settings; `tensor_parallel_size` is the widest mesh.
    """

    def __init__(self, spec: ModelSpec, config: EngineConfig):
        self.spec, self.config = spec, config
        self._devices: tuple[DeviceReport, ...] = ()
        self._excluded: dict[int, str] = {}
        self._learnt: dict[int, _Learnt] = {}

    @property
    def excluded(self) -> dict[int, str]:
        """Slots that no mesh may use, and why."""
        return dict(self._excluded)

    @property
    def usable(self) -> tuple[int, ...]:
        """Slots of the devices last seen that are not excluded."""
        return tuple(slot for slot in range(len(self._devices)) if slot not in self._excluded)

    def exclude(self, slot: int, reason: str) -> None:
        """Leaves a slot out of every mesh until `restore`.

        Raises:
            ConfigError: the slot is not a whole number from 0.
        """
        if type(slot) is not int or slot < 0:
            raise ConfigError("slot", slot, "use the place of a device in the list of all, from 0")
        self._excluded[slot] = reason

    def restore(self, slot: int | None = None) -> None:
        """Lets a slot be used again, or all of them."""
        if slot is None:
            self._excluded.clear()
        else:
            self._excluded.pop(slot, None)

    def learn(self, width: int, temporaries: int, logits: int) -> None:
        """Remembers what a start at this width measured on one device, in bytes; the larger of several starts stays.

        Raises:
            ConfigError: a number is negative, or the width below 1.
        """
        if width < 1 or temporaries < 0 or logits < 0:
            remedy = "use a width from 1 and numbers of bytes from 0"
            raise ConfigError("learn", (width, temporaries, logits), remedy)
        known = self._learnt.get(width, _Learnt(0, 0))
        self._learnt[width] = _Learnt(max(known.temporaries, temporaries), max(known.logits, logits))

    def place(self, devices: Sequence[DeviceReport], width: int | None = None) -> Placement:
        """The mesh of `width` devices, of one platform and kind, with the most memory.

        Args:
            devices: all that are visible; a device's place in it is its slot. They are remembered.
            width: None takes `tensor_parallel_size`.

        Raises:
            ConfigError: there are fewer usable devices of one kind.
            MemoryBudgetError: the model does not fit; the message holds the sum and the nearest setting that fits.
        """
        self._devices = tuple(devices)
        return self._place(self.config.tensor_parallel_size if width is None else width)

    def degraded_width(self, num_devices: int | None = None, *, least: int = 1) -> Placement:
        """The widest mesh that the model fits, of the devices last seen, and never above the configured width.

        Args:
            num_devices: how many of them may be used, beside those excluded; None for all.
            least: narrowest mesh to accept.

        Raises:
            ConfigError: fewer than `least` usable devices are left, or none was seen.
            MemoryBudgetError: the model fits no width from `least` up; the message holds the sum of the widest.
        """
        survivors = len(self._candidates()[0])
        if num_devices is not None:
            survivors = min(survivors, num_devices)
        widest = min(survivors, self.config.tensor_parallel_size)
        if widest < max(1, least):
            raise self._too_few(max(1, least), survivors)
        refusal: ConfigError | MemoryBudgetError | None = None
        # Not simply the first that fits or fails: padding can make a narrower mesh need less.
        for width in range(widest, max(1, least) - 1, -1):
            try:
                return self._place(width)
            except (ConfigError, MemoryBudgetError) as error:  # the former where the sharding has no such width
                refusal = refusal or error
        tried = f"no width from {max(1, least)} to {widest} fits" if widest > least else f"width {widest} does not fit"
        raise MemoryBudgetError(f"{tried}; at {widest}: {refusal}")

    def fits(self, width: int) -> bool:
        """Whether a mesh of this width can be made of the devices last seen and the model fits it."""
        try:
            self._place(width)
        except (ConfigError, MemoryBudgetError):
            return False
        return True

    def page_budget(self, width: int, memory_bytes: int | None = None, platform: str | None = None) -> int:
        """Pages of KV cache on each device of a mesh.

        Args:
            width: of the mesh.
            memory_bytes: of each device; None takes the devices last seen.
            platform: of the devices, with `memory_bytes`; None is that of the devices last seen, or "gpu".

        Raises:
            ConfigError, MemoryBudgetError: as `place`.
        """
        if memory_bytes is None:
            return self._place(width).memory.num_pages
        platform = platform or (self._devices[0].platform if self._devices else "gpu")
        return self._plan(width, memory_bytes, platform).num_pages

    def weight_bytes(self, width: int, platform: str) -> int:
        """Bytes of the parameters on one device of a mesh."""
        dtype = resolve_dtype(self.config.dtype, self.spec.dtype, platform)
        return PaddedSizes.of(self.spec, width, self.config.sharding).weight_bytes_per_device(self.spec, dtype.itemsize)

    def _place(self, width: int) -> Placement:
        if type(width) is not int or not 1 <= width <= self.config.tensor_parallel_size:
            remedy = f"use a width from 1 to tensor_parallel_size={self.config.tensor_parallel_size}"
            raise ConfigError("width", width, remedy)
        candidates, left_out = self._candidates()
        if len(candidates) < width:
            raise self._too_few(width, len(candidates))
        # Those with the most memory: one small device sets the pages of all.
        best = sorted(candidates, key=lambda slot: (-self._devices[slot].memory_bytes, slot))[:width]
        slots = tuple(sorted(best))
        left_out |= {slot: "not needed" for slot in candidates if slot not in slots}
        memory_bytes = self._memory_of(slots)
        memory = self._plan(width, memory_bytes, self._devices[slots[0]].platform)
        notes = [f"slot {slot} ({self._devices[slot].kind}): {reason}" for slot, reason in sorted(left_out.items())]
        if self.config.num_pages is not None and memory.num_pages < self.config.num_pages:
            notes.append(f"{memory.num_pages} pages instead of num_pages={self.config.num_pages}: no more fit")
        return Placement(slots, width, memory_bytes, memory, "; ".join(notes))

    def _candidates(self) -> tuple[list[int], dict[int, str]]:
        """Usable slots of the commonest platform and kind, and why each other slot is left out."""
        if not self._devices:
            raise ConfigError("devices", (), "no device was seen yet: give them to `place` first")
        left_out = {slot: reason for slot, reason in self._excluded.items() if slot < len(self._devices)}
        kinds = {slot: (self._devices[slot].platform, self._devices[slot].kind) for slot in self.usable}
        # An accelerator goes before any number of CPUs; ties go to the first seen.
        counts = Counter(kinds.values())
        chosen = max(counts, key=lambda kind: (kind[0] != "cpu", counts[kind]), default=None)
        for slot, kind in kinds.items():
            if kind != chosen:
                left_out[slot] = f"of another kind than {chosen[1] if chosen else ''}"
        return [slot for slot, kind in kinds.items() if kind == chosen], left_out

    def _memory_of(self, slots: Sequence[int]) -> int:
        """Memory of the device that has the least, in bytes; CPU devices of one host share the host's."""
        devices = [self._devices[slot] for slot in slots]
        if devices[0].platform != "cpu":
            return min(device.memory_bytes for device in devices)
        per_host = Counter(device.host for device in devices)
        return min(device.memory_bytes // per_host[device.host] for device in devices)

    def _plan(self, width: int, memory_bytes: int, platform: str) -> MemoryPlan:
        temporaries, logits = self._measured(width)
        planned = partial(
            plan_memory,
            spec=self.spec,
            sizes=PaddedSizes.of(self.spec, width, self.config.sharding),
            dtype=resolve_dtype(self.config.dtype, self.spec.dtype, platform),
            total=memory_bytes,
            memory_fraction=resolve_fraction(self.config.memory_fraction, platform),
            weights=self.weight_bytes(width, platform),
            temporaries=temporaries,
            logits=logits,
            page_size=self.config.page_size,
            max_model_len=self.config.max_model_len or self.spec.max_position_embeddings,
            max_num_seqs=self.config.max_num_seqs,
            kv_cache_dtype=self.config.kv_cache_dtype,
        )
        most = self.config.num_pages
        if most is None or width == self.config.tensor_parallel_size:
            return planned(num_pages=most)
        # Narrower than configured, fewer pages are better than none.
        plan = planned()
        return dataclasses.replace(plan, num_pages=min(most, plan.num_pages))

    def _measured(self, width: int) -> tuple[int, int]:
        """Temporaries and logits at a width, in bytes: as measured there, or else from the nearest width.

        Temporaries are partly sharded: scaled up to a narrower mesh as if they were wholly so, and left alone for
        a wider one, they come out too large rather than too small. Logits hardly depend on the width.
        """
        if not self._learnt:
            return 0, 0
        known = min(self._learnt, key=lambda other: (abs(other - width), other))
        learnt = self._learnt[known]
        return -(-learnt.temporaries * max(known, width) // width), learnt.logits

    def _too_few(self, width: int, survivors: int) -> ConfigError:
        seen = ", ".join(f"{count} x {kind}" for kind, count in Counter(d.kind for d in self._devices).items())
        gone = "; ".join(f"slot {slot}: {reason}" for slot, reason in sorted(self._excluded.items()))
        remedy = f"{survivors} usable devices of one kind are left of {seen}" + (f" (without {gone})" if gone else "")
        if survivors:
            remedy += f"; use at most {survivors}"
        return ConfigError("tensor_parallel_size", width, remedy)
