"""Where arrays live: mesh, logical-axis rules, padding so that any width works, collectives seen."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.errors import ConfigError

# The code of devices finds them here, beside the mesh that they are for.
from ryzanstein_jax.model.sizes import HeadLayout as HeadLayout
from ryzanstein_jax.model.sizes import PaddedSizes as PaddedSizes

Rules = dict[str, str | None]

#: Logical axis -> mesh axis. Megatron's pair: q/k/v/gate/up shard their output dimension (`kv_slots`,
#: `ffn`), o/down their input dimension (`row_kv_slots`, `row_ffn`), so each pair needs one all-reduce.
MEGATRON_RULES: Rules = {
    "vocab": "tp",
    "kv_slots": "tp",
    "ffn": "tp",
    "row_kv_slots": "tp",
    "row_ffn": "tp",
    "row_embed": None,
    "tokens": None,
    "experts": "tp",
    "expert_ffn": None,
    "gate_up": None,
    "embed": None,
    "heads_per_slot": None,
    "head_dim": None,
    "pages": None,
    "page": None,
}

#: The ways to shard, by name.
#:
#: "megatron": two all-reduces of the hidden states a layer.
#: "output": o and down shard their output dimension too. Their inputs are gathered before them and their results after
#: them: four all-gathers a layer, and no sum over devices. Experts stay as they are.
#: "sequence": as "megatron", but between the pairs each device keeps the hidden states of its share of the tokens, so
#: that norms and sums are not computed by all: each all-reduce becomes a reduce-scatter and an all-gather
#: (Korthikanti et al., 2022). A step whose tokens do not divide by the devices goes as with "megatron".
RULES: dict[str, Rules] = {
    "megatron": MEGATRON_RULES,
    "output": MEGATRON_RULES | {"row_kv_slots": None, "row_ffn": None, "row_embed": "tp"},
    "sequence": MEGATRON_RULES | {"tokens": "tp"},
}


def _is_of_use(record: logging.LogRecord) -> bool:
    """Not that JAX's plugin for NVIDIA GPUs, which the extra `plan` brings, finds no cuDNN where there is no GPU."""
    return "xla_cuda" not in record.getMessage() or os.path.exists("/dev/nvidiactl")


logging.getLogger("jax._src.xla_bridge").addFilter(_is_of_use)


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


def partition_spec(axes: tuple[str | None, ...], rules: Rules = MEGATRON_RULES) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Raises:
        KeyError: an axis has no rule. Groups of an axis lie as the axis does.
        ValueError: two axes of one array would take the same mesh axis.
    """
    mesh_axes = [None if axis is None else rules[axis.removesuffix("_groups")] for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"the logical axes {axes} map to one mesh axis twice: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...], rules: Rules = MEGATRON_RULES) -> NamedSharding:
    """The NamedSharding over `mesh` of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes, rules))


_COLLECTIVE = re.compile(
    r"= (?P<shape>\(*[a-z0-9]+\[.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
#: What an asynchronous start gives is operands and results: ((operands), results, ...) or (operand, result, ...).
_OPERANDS = re.compile(r"^\((?:\([^()]*\)|[a-z0-9]+\[[0-9,]*\](?:\{[^}]*\})?), (?P<results>.*)\)$")
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


def _results(match: re.Match[str]) -> str:
    """The shapes of what a collective gives, without what the asynchronous form says of its operands."""
    shape = match["shape"]
    operands = _OPERANDS.match(shape) if match["start"] else None
    if operands is None or (match["kind"] == "all-reduce" and not shape.startswith("((")):
        return shape  # an all-reduce that starts tells its results only, or has a tuple of operands
    results = operands["results"]
    # A permute's start ends with two numbers for its bookkeeping.
    return results.split(", u32[]")[0] if match["kind"] == "collective-permute" else results


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """What a compiled program communicates, read from its optimized HLO; equal ones are counted together.

    One counts as often as it stands there: the engine's programs have none in a loop.
    """
    found: Counter[tuple[str, int, int]] = Counter()
    for line in (compiled.as_text() or "").splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        size = 0
        for dtype, dims in _ARRAY.findall(_results(match)):
            bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
            size += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
        group = _group_size(line)
        if group != 1:  # with itself alone a device has nothing to exchange
            found[match["kind"], size, group] += 1
    return [Collective(kind, size, group, count) for (kind, size, group), count in sorted(found.items())]
