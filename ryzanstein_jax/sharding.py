"""Where arrays live: mesh, logical-axis rules, padding so that any width works, collectives seen."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.spec import ModelSpec

#: Logical axis -> mesh axis. Megatron's pair: q/k/v/gate/up shard their output dimension (`kv_slots`,
#: `ffn`), o/down their input dimension (the same axes), so each pair needs one all-reduce.
MEGATRON_RULES: dict[str, str | None] = {
    "vocab": "tp",
    "kv_slots": "tp",
    "ffn": "tp",
    "experts": "tp",
    "expert_ffn": None,
    "gate_up": None,
    "embed": None,
    "heads_per_slot": None,
    "head_dim": None,
    "pages": None,
    "page": None,
}


def make_mesh(tensor_parallel_size: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh named "tp" over the first devices.

    Raises:
        ConfigError: there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    if tensor_parallel_size > len(devices):
        remedy = f"there are {len(devices)} {devices[0].platform} devices; use at most that many"
        if devices[0].platform == "cpu":
            remedy += " (or set jax_num_cpu_devices before JAX starts)"
        raise ConfigError("tensor_parallel_size", tensor_parallel_size, remedy)
    return Mesh(np.array(devices[:tensor_parallel_size]), ("tp",), axis_types=(AxisType.Auto,))


def partition_spec(axes: tuple[str | None, ...], rules: dict[str, str | None] = MEGATRON_RULES) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Raises:
        KeyError: an axis has no rule.
        ValueError: two axes of one array would take the same mesh axis.
    """
    mesh_axes = [None if axis is None else rules[axis] for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"the logical axes {axes} map to one mesh axis twice: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def named_sharding(
    mesh: Mesh, axes: tuple[str | None, ...], rules: dict[str, str | None] = MEGATRON_RULES
) -> NamedSharding:
    """The NamedSharding over `mesh` of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes, rules))


@dataclass(frozen=True)
class HeadLayout:
    """How heads are laid out over a mesh so that any width works for any model.

    Attention is sharded by *KV slot*: a slot holds one KV head and `queries_per_slot` query heads.
    With fewer KV heads than devices a KV head is repeated in several slots and its query heads are
    dealt out among them; slots and query places left over are zero, and add nothing to the sum.
    """

    num_heads: int
    num_kv_heads: int
    num_slots: int
    queries_per_slot: int
    repeats: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, width: int) -> HeadLayout:
        """The layout over `width` devices with the smallest KV cache, then the fewest query heads."""
        group = num_heads // num_kv_heads
        candidates = []
        for repeats in range(1, group + 1):
            slots = -(-num_kv_heads * repeats // width) * width
            candidates.append((slots, slots * -(-group // repeats), repeats))
        # Ties in both go to the fewest copies, which costs the least to load.
        slots, queries, repeats = min(candidates)
        return cls(num_heads, num_kv_heads, slots, queries // slots, repeats)

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """KV head of each slot, [num_slots]; -1 where the slot is padding."""
        heads = [slot // self.repeats for slot in range(self.num_kv_heads * self.repeats)]
        return tuple(heads + [-1] * (self.num_slots - len(heads)))

    @cached_property
    def query_heads(self) -> tuple[tuple[int, ...], ...]:
        """Query heads of each slot, [num_slots][queries_per_slot]; -1 where the place is padding."""
        group = self.num_heads // self.num_kv_heads
        table = []
        for slot, kv_head in enumerate(self.kv_heads):
            first = (slot % self.repeats) * self.queries_per_slot
            places = range(first, first + self.queries_per_slot)
            real = kv_head >= 0
            table.append(tuple(kv_head * group + p if real and p < group else -1 for p in places))
        return tuple(table)

    @cached_property
    def primary_slots(self) -> tuple[bool, ...]:
        """Whether a slot is the first with its KV head, [num_slots]: each KV head counts once."""
        return tuple(h >= 0 and slot % self.repeats == 0 for slot, h in enumerate(self.kv_heads))


@dataclass(frozen=True)
class PaddedSizes:
    """Sizes of a model's arrays once padded for a mesh width."""

    width: int
    heads: HeadLayout
    vocab: int
    ffn: int
    experts: int

    @classmethod
    def of(cls, spec: ModelSpec, width: int) -> PaddedSizes:
        def pad(size: int) -> int:
            return -(-size // width) * width

        return cls(
            width=width,
            heads=HeadLayout.of(spec.num_heads, spec.num_kv_heads, width),
            vocab=pad(spec.vocab_size),
            ffn=pad(spec.intermediate_size),
            experts=pad(spec.moe.num_experts) if spec.moe else 0,
        )


@dataclass(frozen=True)
class Collective:
    """A kind of communication in a compiled program.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
        bytes: of one result on one device.
        group: devices that take part together.
        count: how many of these a run of the program performs.
    """

    kind: str
    bytes: int
    group: int
    count: int


_COLLECTIVE = re.compile(
    r"= (?P<shape>\(?[a-z0-9]+\[.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,]*)\]")
#: The ways in which XLA's versions write replica groups.
_GROUP_MESH = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[\d+,(?P<size>\d+)\]")
_GROUP_LIST = re.compile(r"replica_groups=\{\{(?P<first>[0-9,]+)\}")


def _group_size(line: str) -> int:
    """Devices in a group of the collective on this line of HLO; all take part where no group is named."""
    if match := _GROUP_MESH.search(line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", match["mesh"])}
        return math.prod(sizes[axis] for axis in re.findall(r"'([^']*)'", match["axes"]))
    if match := _GROUP_IOTA.search(line):
        return int(match["size"])
    if match := _GROUP_LIST.search(line):
        return match["first"].count(",") + 1
    return line.count("{", line.find("source_target_pairs=")) - 1 if "source_target_pairs=" in line else 0


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """What a compiled program communicates, read from its optimized HLO; equal ones are counted together."""
    found: Counter[tuple[str, int, int]] = Counter()
    for line in (compiled.as_text() or "").splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        size = 0
        for dtype, dims in _ARRAY.findall(match["shape"]):
            bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
            size += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
        group = _group_size(line)
        if group != 1:  # with itself alone a device has nothing to exchange
            found[match["kind"], size, group] += 1
    return [Collective(kind, size, group, count) for (kind, size, group), count in sorted(found.items())]
