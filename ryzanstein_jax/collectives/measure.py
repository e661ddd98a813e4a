"""Times collectives over all devices of the runtime, in this process or in several, and checks what they compute.

Two times are taken of each size. A *call* is one program with one collective, from its dispatch until its result is
there: what a user of a single collective sees. In the *loop* one program repeats the collective on its own result, so
that the dispatch is shared by all: what a collective inside a model costs. A sample counts with its slowest process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ryzanstein_jax.collectives.bandwidth import REDUCING, bus_factor, first_values, repeated
from ryzanstein_jax.errors import RyzansteinError

_AXIS = "devices"
_WARM_UP = 3
_LEAST_SAMPLES, _MOST_SAMPLES = 5, 1000
_LOOP_SECONDS = 0.02  # that one run of a loop shall take
_MOST_REPEATS = 100
_CHUNK = 1 << 20  # values that are compared at a time


class WrongSumError(RyzansteinError):
    """A collective returned other numbers than it had to."""


@dataclass(frozen=True)
class Point:
    """One collective at one size.

    Attributes:
        operation: of `OPERATIONS`.
        bytes: of the larger of a device's two buffers, as nccl-tests counts.
        seconds: of one collective in the loop, median.
        call_seconds, call_p99_seconds: of a call, median and 99th percentile (of few calls: the slowest).
        calls, loops, repeats: how many calls and loops were timed, and collectives in a loop.
        algorithm_bandwidth, bus_bandwidth: bytes a second, from `seconds`; see `bus_factor`.
        values_checked: values of all results, over all processes, that were compared with what they have to be.
    """

    operation: str
    bytes: int
    seconds: float
    call_seconds: float
    call_p99_seconds: float
    calls: int
    loops: int
    repeats: int
    algorithm_bandwidth: float
    bus_bandwidth: float
    values_checked: int


def has_broadcast(platform: str) -> bool:
    """Whether XLA has a broadcast of its own there. Elsewhere it is an all-reduce in which all but one add zeros."""
    return platform != "cpu" and hasattr(jax.lax, "pbroadcast")


def measure(points: Sequence[tuple[str, int]], dtype: str, budget: float) -> Iterator[Point]:
    """Measures each point over all devices; every process of the runtime has to do the same.

    Args:
        points: collective, of `OPERATIONS`, and bytes, which are rounded to what the devices can share.
        dtype: of the values, a floating type.
        budget: seconds for the calls of a point, and as many for its loops.

    Raises:
        WrongSumError: a result is wrong.
    """
    mesh = Mesh(np.array(jax.devices()), (_AXIS,))
    for operation, size in points:
        yield _Measurement(mesh, operation, size, jnp.dtype(dtype)).run(budget)


class _Measurement:
    """One collective at one size. A device's buffer has `[count, width]` values: a part for each device."""

    def __init__(self, mesh: Mesh, operation: str, size: int, dtype: Any):
        self._operation, self._dtype, self._count = operation, dtype, mesh.size
        self._width = max(1, size // (dtype.itemsize * self._count))
        self.bytes = self._width * self._count * dtype.itemsize
        self._sharding = NamedSharding(mesh, P(_AXIS))
        self._mesh = mesh

    def run(self, budget: float) -> Point:
        call = self._program(1, whole=False)
        checked = self._check(call, 1, whole=False)
        first = self._timed(call, _WARM_UP, whole=False)
        calls = self._timed(call, _samples(budget, float(np.median(first))), whole=False)
        repeats = self._repeats(float(np.median(calls)))
        loop = self._program(repeats, whole=True)
        checked += self._check(loop, repeats, whole=True)
        first = self._timed(loop, _WARM_UP, whole=True)
        loops = self._timed(loop, _samples(budget, float(np.median(first))), whole=True)
        seconds = float(np.median(loops)) / repeats
        bandwidth = self.bytes / seconds
        return Point(
            self._operation, self.bytes, seconds, float(np.median(calls)), float(np.quantile(calls, 0.99)),
            len(calls), len(loops), repeats, bandwidth, bandwidth * bus_factor(self._operation, self._count), checked,
        )  # fmt: skip

    def _repeats(self, call_seconds: float) -> int:
        """Collectives in a loop: as many as make it long, and no more than leave sums in the range of the type."""
        most = _MOST_REPEATS
        if self._operation in REDUCING and self._count > 1:
            most = int((jnp.finfo(self._dtype).maxexp - 8) / math.log2(self._count)) - 1
        return max(1, min(most, _MOST_REPEATS, math.ceil(_LOOP_SECONDS / call_seconds)))

    # --- the programs

    def _program(self, repeats: int, *, whole: bool) -> Callable[[jax.Array], jax.Array]:
        """Repeats the collective; `whole` takes and returns the full buffer, which the next repetition reads."""

        def run(buffer: jax.Array) -> jax.Array:
            part = buffer[0]  # the device's own: [count, width]; of a call of an all-gather [1, width]
            if not whole:
                return self._collective(part[0] if self._operation == "all-gather" else part)[None]

            def body(i: Any, state: jax.Array) -> jax.Array:
                slot = jnp.asarray(i % self._count, jnp.int32)
                if self._operation == "all-gather":
                    return self._collective(jax.lax.dynamic_index_in_dim(state, slot, keepdims=False))
                if self._operation == "reduce-scatter":
                    return jax.lax.dynamic_update_slice_in_dim(state, self._collective(state), slot, 0)
                return self._collective(state)

            return jax.lax.fori_loop(0, repeats, body, part)[None]

        mapped = jax.shard_map(run, mesh=self._mesh, in_specs=P(_AXIS), out_specs=P(_AXIS), check_vma=False)
        return jax.jit(mapped, donate_argnums=(0,) if whole else ())

    def _collective(self, part: jax.Array) -> jax.Array:
        """Of `[count, width]` on each device; an all-gather's is `[width]`, a reduce-scatter's result `[1, width]`."""
        lax = jax.lax
        if self._operation == "all-reduce":
            return lax.psum(part, _AXIS)
        if self._operation == "all-gather":
            return lax.all_gather(part, _AXIS)
        if self._operation == "reduce-scatter":
            return lax.psum_scatter(part, _AXIS, tiled=True)
        if self._operation == "all-to-all":
            return lax.all_to_all(part, _AXIS, 0, 0, tiled=True)
        if self._operation == "broadcast":
            if has_broadcast(self._mesh.devices.flat[0].platform):
                return lax.pbroadcast(part, _AXIS, 0)
            return lax.psum(jnp.where(lax.axis_index(_AXIS) == 0, part, jnp.zeros_like(part)), _AXIS)
        return lax.ppermute(part, _AXIS, [(i, (i + 1) % self._count) for i in range(self._count)])

    # --- checking and timing

    def _place(self, *, whole: bool, zeros: bool = False) -> jax.Array:
        """The devices' buffers, with `first_values` or zeros: `[devices, parts, width]`."""
        parts = 1 if self._operation == "all-gather" and not whole else self._count

        def local(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            if zeros:
                return np.zeros((1, parts, self._width), self._dtype)
            values = first_values([index[0].start or 0], parts, np.arange(self._width), self._width)
            return values.astype(self._dtype)

        return jax.make_array_from_callback((self._count, parts, self._width), self._sharding, local)

    def _check(self, program: Callable[[jax.Array], jax.Array], repeats: int, *, whole: bool) -> int:
        """Compares every value of the result; returns how many there are.

        Raises:
            WrongSumError: one differs by more than rounding.
        """
        buffer = self._place(whole=whole)
        result = program(buffer)
        tolerance = 2 * repeats * self._count * float(jnp.finfo(self._dtype).eps)
        checked = 0
        for shard in result.addressable_shards:
            device = shard.index[0].start or 0
            found = np.asarray(shard.data)[0]
            step = max(1, _CHUNK // self._count**2)
            for start in range(0, self._width, step):
                columns = np.arange(start, min(start + step, self._width))
                state = repeated(self._operation, self._first(columns), repeats)[device]
                if self._operation == "reduce-scatter" and not whole:
                    state = state[:1]
                part = found[:, columns].astype(np.float64)
                if not np.allclose(part, state, rtol=tolerance, atol=0):
                    raise WrongSumError(
                        f"{self._operation} of {self.bytes} bytes on {self._count} devices is wrong: result {repeats} "
                        f"of device {device} begins {part.ravel()[:4]} where {state.ravel()[:4]} is right"
                    )
                checked += part.size
        return checked * jax.process_count()  # they have as many devices each, and one that fails ends all

    def _first(self, columns: np.ndarray) -> np.ndarray:
        """`[devices, devices, columns]` of all buffers before a check, in float64."""
        return first_values(range(self._count), self._count, columns, self._width).astype(np.float64)

    def _timed(self, program: Callable[[jax.Array], jax.Array], samples: int, *, whole: bool) -> np.ndarray:
        """Seconds of each run, `[samples]`, on the slowest process; zeros stay zeros however often they are added."""
        buffer = self._place(whole=whole, zeros=True)
        times = np.zeros(samples, np.float32)
        for i in range(samples):
            began = time.perf_counter()
            result = jax.block_until_ready(program(buffer))
            times[i] = time.perf_counter() - began
            buffer = result if whole else buffer
        return _slowest(times)


def _samples(budget: float, seconds: float) -> int:
    return max(_LEAST_SAMPLES, min(_MOST_SAMPLES, int(budget / max(seconds, 1e-7))))


def _slowest(times: np.ndarray) -> np.ndarray:
    """The largest of all processes' values, element by element; the same on all, so that they go on alike."""
    if jax.process_count() == 1:
        return times
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(times)).max(0)
