"""Weights of a source -> sharded arrays: each device's slice is read, placed and cast by itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh

from ryzanstein_jax.checkpoint.packed import PackedSource
from ryzanstein_jax.checkpoint.quantize import QuantizingSource
from ryzanstein_jax.checkpoint.recipe import Part, Recipes, make_recipes
from ryzanstein_jax.checkpoint.source import Box, WeightSource, extents, slices, volume
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.quantization import array_bytes
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import RULES, PaddedSizes, named_sharding

#: JAX takes a host buffer with this alignment as a CPU array without another copy.
_ALIGNMENT = 64
_MAX_THREADS = 4
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class LoadReport:
    """What loading cost.

    Attributes:
        seconds: from the first check to the last array.
        bytes_read: of the tensors taken, as the source gives them (those of GGUF files count dequantized, those that
            are quantized here as they become).
        bytes_on_devices: of this process's shards, padding and copies included.
        peak_host_bytes: most that the process's resident memory grew by meanwhile; where the devices are
            CPUs their arrays are part of it. Sampled; 0 where the system does not tell.
    """

    seconds: float
    bytes_read: int
    bytes_on_devices: int
    peak_host_bytes: int


def load_params(
    source: WeightSource,
    spec: ModelSpec,
    sizes: PaddedSizes,
    params: Mapping[str, ParamSpec],
    mesh: Mesh,
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Loads every parameter, sharded over the mesh; a few at a time, so that little more is held.

    Args:
        source: the checkpoint.
        spec: the model.
        sizes: its sizes, padded for the mesh.
        params: path -> shape, dtype and axes, of the module built for `sizes`.
        mesh: with the axis names of the rules that `sizes` names.

    Returns:
        Path -> array, in the order of `params`, and what it cost.

    Raises:
        WeightsError: a tensor is missing, left over, of another shape, or cannot be read.
    """
    began = time.perf_counter()
    with _PeakMemory() as memory:
        source, recipes = with_recipes(source, spec, sizes, params)

        def load(path: str) -> tuple[jax.Array, int]:
            param, parts = params[path], recipes.parts[path]
            read = [0]

            def fill(index: tuple[slice, ...] | None) -> np.ndarray:
                box = _box(index, param.shape)
                array, count = assemble(source, parts, box, param.dtype)
                read[0] += count
                return array

            sharding = named_sharding(mesh, param.axes, RULES[sizes.sharding])
            # Waiting for the copy bounds what the host holds to one parameter for each thread.
            array = jax.block_until_ready(jax.make_array_from_callback(param.shape, sharding, fill))
            for tensor in {part.tensor for part in parts}:
                source.release(tensor)
            return array, read[0]

        pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "load")
        try:
            loaded = dict(zip(params, pool.map(load, params), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
    arrays = {path: array for path, (array, _) in loaded.items()}
    report = LoadReport(
        seconds=time.perf_counter() - began,
        bytes_read=sum(count for _, count in loaded.values()),
        bytes_on_devices=sum(
            array_bytes(shard.data.shape, shard.data.dtype)
            for array in arrays.values()
            for shard in array.addressable_shards
        ),
        peak_host_bytes=memory.peak,
    )
    return arrays, report


def with_recipes(
    source: WeightSource, spec: ModelSpec, sizes: PaddedSizes, params: Mapping[str, ParamSpec]
) -> tuple[WeightSource, Recipes]:
    """The source as the parameters need it, decoded and quantized, and their recipes.

    Raises:
        WeightsError: as `load_params`.
    """
    if spec.quantization is not None and spec.quantization.layout and source.dialect == "huggingface":
        source = PackedSource(source, spec.quantization)
    recipes = make_recipes(source, spec, sizes, params)
    return (QuantizingSource(source, recipes.to_quantize) if recipes.to_quantize else source), recipes


def assemble(source: WeightSource, parts: list[Part], box: Box, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """One box of a parameter from its parts, zero where there are none, and the bytes taken for it."""
    groups: dict[tuple[str, str], list[tuple[Box, Box]]] = {}
    covered = 0
    for part in parts:
        overlap = _overlap(part.target, box)
        if overlap is None:
            continue
        covered += volume(overlap)
        piece = list(part.box)
        for target, dim in part.dims:
            first = part.box[dim][0] + overlap[target][0] - part.target[target][0]
            piece[dim] = (first, first + overlap[target][1] - overlap[target][0])
        groups.setdefault((part.tensor, part.group), []).append((overlap, tuple(piece)))

    out = _aligned(extents(box), dtype)
    if covered < volume(box):
        out[...] = 0
    count = 0
    for (tensor, _), pieces in groups.items():
        around = tuple(
            (min(start for start, _ in ranges), max(stop for _, stop in ranges))
            for ranges in zip(*(piece for _, piece in pieces), strict=True)
        )
        block = source.read(tensor, around)
        for overlap, wanted in pieces:
            values = block[slices(_shift(wanted, around))]
            out[slices(_shift(overlap, box))] = values.reshape(extents(overlap))
            count += array_bytes(values.shape, values.dtype)
    return out, count


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    ranges = [part.indices(size) for part, size in zip(index or (), shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in ranges)


def _overlap(a: Box, b: Box) -> Box | None:
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _shift(box: Box, origin: Box) -> Box:
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, origin, strict=True))


class _PeakMemory:
    """Samples the growth of this process's resident memory, in bytes."""

    def __enter__(self) -> Self:
        self._start, self.peak = _resident(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, _resident() - self._start)


def _resident() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0
