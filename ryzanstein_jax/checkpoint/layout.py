"""How a parameter on a mesh of some width relates to its canonical form, that without padding.

The canonical form is what width 1 has: heads in order, one slot per KV head, nothing padded or repeated.
Snapshots store it and dummy weights are drawn in it, so neither depends on the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes


@dataclass(frozen=True, eq=False)
class Layout:
    """One parameter's shape and its canonical one.

    Attributes:
        shape: on the mesh, with padding.
        canonical: without.
        axis: first dimension of heads (`kv_slots`), or None for a parameter that has no heads.
        cells: int32, shaped like the one or two dimensions of heads in `shape`: for each place the flat
            index of its head among those of `canonical`, or -1 where the place is padding.
        repeats: how often each canonical value stands along the last dimension: a group's scale, where a device's part
            of the inputs does not hold whole groups.
        kept: of the places that are made so, those that are of inputs; the rest is padding.
    """

    shape: tuple[int, ...]
    canonical: tuple[int, ...]
    axis: int | None = None
    cells: np.ndarray | None = None
    repeats: int = 1
    kept: int | None = None

    @cached_property
    def trivial(self) -> bool:
        """Whether the two are the same."""
        if self.shape != self.canonical:
            return False
        return self.cells is None or np.array_equal(self.cells.ravel(), np.arange(self.cells.size))

    def expand(self, canonical: jax.Array) -> jax.Array:
        """Canonical values -> padded ones; traceable."""
        if self.trivial:
            return canonical
        if self.axis is None or self.cells is None:
            if self.repeats > 1:
                canonical = jnp.repeat(canonical, self.repeats, axis=-1)[..., : self.kept]
            return jnp.pad(
                canonical, [(0, size - real) for size, real in zip(self.shape, canonical.shape, strict=True)]
            )
        flat = _merge(canonical, self.axis, self.cells.ndim)
        places = jnp.asarray(self.cells.ravel())
        taken = jnp.take(flat, jnp.maximum(places, 0), axis=self.axis)
        real = (places >= 0).reshape(-1, *([1] * (taken.ndim - self.axis - 1)))
        return jnp.where(real, taken, 0).astype(canonical.dtype).reshape(self.shape)

    def contract(self, padded: jax.Array) -> jax.Array:
        """Padded values -> canonical ones; traceable."""
        if self.trivial:
            return padded
        if self.axis is None or self.cells is None:
            return padded[..., :: self.repeats][tuple(slice(0, size) for size in self.canonical)]
        flat = _merge(padded, self.axis, self.cells.ndim)
        return jnp.take(flat, jnp.asarray(self.sources), axis=self.axis).reshape(self.canonical)

    @cached_property
    def sources(self) -> np.ndarray:
        """int64 [canonical heads]: the first place that holds each head."""
        assert self.axis is not None and self.cells is not None
        places = self.cells.ravel()
        count = math.prod(self.canonical[self.axis : self.axis + self.cells.ndim])
        return np.array([np.flatnonzero(places == head)[0] for head in range(count)])


def _merge(x: jax.Array, axis: int, dims: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + dims :])


def layout_of(path: str, param: ParamSpec, spec: ModelSpec, sizes: PaddedSizes) -> Layout:
    """The layout of one parameter, from its logical axes.

    Raises:
        WeightsError: its shape fits neither the model nor its padding: a mistake of the module.
    """
    # A row-parallel kernel names its input as a column-parallel one does its output: they are one pair.
    axes = tuple(axis and axis.removeprefix("row_") for axis in param.axes)
    heads = sizes.heads
    group = spec.queries_per_kv_head
    real = {
        "vocab": spec.vocab_size,
        "ffn": spec.intermediate_size,
        "experts": spec.moe.num_experts if spec.moe else 0,
        "kv_slots": spec.num_kv_heads,
    }
    if axes[-1] == "ffn_groups" and spec.quantization is not None:
        inputs, group, held = spec.intermediate_size, spec.quantization.group, sizes.ffn // param.shape[-1]
        canonical = (*param.shape[:-1], -(-inputs // group))
        return Layout(param.shape, canonical, repeats=group // held, kept=-(-inputs // held))
    if "kv_slots" not in axes:
        canonical = tuple(real.get(axis or "", size) for axis, size in zip(axes, param.shape, strict=True))
        if any(have < need for have, need in zip(param.shape, canonical, strict=True)):
            raise WeightsError("the parameter is too small", tensor=path, expected=canonical, found=param.shape)
        return Layout(param.shape, canonical)

    axis = axes.index("kv_slots")
    dims: tuple[int, ...]
    kv_heads = np.array(heads.kv_heads, np.int32)
    if "heads_per_slot" not in axes:
        cells, dims = kv_heads, (spec.num_kv_heads,)
    else:
        queries = np.array(heads.query_heads, np.int32).reshape(heads.num_slots, heads.queries_per_slot)
        extra = param.shape[axis + 1] - heads.queries_per_slot  # 2 where k and v follow the queries
        dims = (spec.num_kv_heads, group + extra)
        rows = queries // group * (group + extra) + queries % group
        cells = np.where(queries >= 0, rows, -1)
        if extra:
            first = (kv_heads * (group + extra) + group)[:, None] + np.arange(extra, dtype=np.int32)
            cells = np.concatenate([cells, np.where(kv_heads[:, None] >= 0, first, -1)], axis=1)
    if cells.shape != param.shape[axis : axis + len(dims)]:
        raise WeightsError("the parameter has other heads", tensor=path, expected=cells.shape, found=param.shape)
    canonical = (*param.shape[:axis], *dims, *param.shape[axis + len(dims) :])
    return Layout(param.shape, canonical, axis, cells.astype(np.int32))
