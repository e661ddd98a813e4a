"""Float kernels read in fewer bits, with scales: `recipe` asks for it, `assemble` does not notice.

A channel's scale is its largest value over *all* inputs, also where a device takes a part of the inputs only
(row-parallel kernels): so the same weights come out at every width, at the price that whoever loads such a kernel
reads all of it once for the scales. Groups of inputs are counted from the first one of the whole kernel: that too is
the same at every width, and only the groups that a device's part begins and ends in are read beyond it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ryzanstein_jax.checkpoint.source import Box, TensorInfo, WeightSource, extents, slices, volume

#: Appended to a tensor's name, or a parameter's path: its scales. compressed-tensors has the same.
SCALE = "_scale"
#: The same for zero points.
ZERO = "_zero"
#: What a kernel's values reach by kind.
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)}
DTYPES = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
_VALUES_AT_ONCE = 4 << 20


@dataclass(frozen=True)
class Rounding:
    """What a float tensor is to become.

    Attributes:
        kind: "int8", "int4" or "fp8".
        inputs: how many of its last dimensions are; they share a scale, unless there are groups.
        group: values along the last dimension that share a scale; 0: see `inputs`.
    """

    kind: str
    inputs: int = 1
    group: int = 0

    def scale_box(self, box: Box) -> Box:
        """The scales of a box of values."""
        if not self.group:
            return box[: -self.inputs]
        start, stop = box[-1]
        return (*box[:-1], (start // self.group, -(-stop // self.group)))

    def value_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        """All values that a box of scales is of."""
        if not self.group:
            return (*box, *((0, size) for size in shape[-self.inputs :]))
        start, stop = box[-1]
        return (*box[:-1], (start * self.group, min(stop * self.group, shape[-1])))

    def scales(self, values: np.ndarray) -> np.ndarray:
        """float32 scales of a whole number of groups, of which the last may be short."""
        if not self.group:
            axes = tuple(range(values.ndim - self.inputs, values.ndim))
            return np.max(np.abs(values), axis=axes) / np.float32(LARGEST[self.kind])
        grouped = _grouped(values, self.group)
        if self.kind != "int4":
            return np.max(np.abs(grouped), axis=-1) / np.float32(LARGEST[self.kind])
        # int4 reaches one step further down than up: the value that is largest, of either sign, takes that step.
        low, high = grouped.min(axis=-1), grouped.max(axis=-1)
        return np.where(high > -low, -high, -low) * np.float32(1 / 8)

    def rounded(self, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The values in steps of the scales; what has the scale 0 is zero and stays so."""
        divisors = np.where(scales != 0, scales, np.float32(1))
        if not self.group:
            steps = values / divisors.reshape(*scales.shape, *[1] * (values.ndim - scales.ndim))
        else:
            steps = (_grouped(values, self.group) / divisors[..., None]).reshape(*values.shape[:-1], -1)
            steps = steps[..., : values.shape[-1]]
        if self.kind == "fp8":
            return np.clip(steps, -LARGEST["fp8"], LARGEST["fp8"]).astype(DTYPES["fp8"])
        if self.kind == "int4":
            return np.clip(np.rint(steps), -8, 7).astype(np.int8).astype(DTYPES["int4"])
        return np.rint(steps).astype(np.int8)


def _grouped(values: np.ndarray, group: int) -> np.ndarray:
    """[..., groups, group], the last one filled up with zeros."""
    short = -values.shape[-1] % group
    if short:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], short), values.dtype)], axis=-1)
    return values.reshape(*values.shape[:-1], -1, group)


class QuantizingSource:
    """Another source with some of its tensors in fewer bits and their scales, float32, beside them.

    Args:
        source: where the float values are.
        tensors: name of each tensor to quantize -> what it becomes.
    """

    def __init__(self, source: WeightSource, tensors: Mapping[str, Rounding]):
        self.source, self.tensors = source, dict(tensors)
        self.dialect, self.path = source.dialect, Path(source.path)
        self._scales: dict[str, dict[Box, np.ndarray]] = defaultdict(dict)
        self._locks = {name: threading.Lock() for name in tensors}

    def names(self) -> Iterable[str]:
        yield from self.source.names()
        yield from (name + SCALE for name in self.tensors)

    def info(self, name: str) -> TensorInfo:
        base = name.removesuffix(SCALE)
        if name in self.tensors:
            info = self.source.info(name)
            return TensorInfo(info.shape, DTYPES[self.tensors[name].kind], info.file)
        if base != name and base in self.tensors:
            info = self.source.info(base)
            box = self.tensors[base].scale_box(tuple((0, size) for size in info.shape))
            return TensorInfo(extents(box), np.dtype(np.float32), info.file)
        return self.source.info(name)

    def read(self, name: str, box: Box) -> np.ndarray:
        base = name.removesuffix(SCALE)
        if name in self.tensors:
            return self._quantized(name, box)
        if base != name and base in self.tensors:
            with self._locks[base]:
                return self._scales_of(base, box)
        return self.source.read(name, box)

    def release(self, name: str) -> None:
        if name.removesuffix(SCALE) not in self.tensors or name in self.tensors:
            self.source.release(name)

    def _quantized(self, name: str, box: Box) -> np.ndarray:
        rounding, shape = self.tensors[name], self.source.info(name).shape
        result = np.empty(extents(box), DTYPES[rounding.kind])
        scale_box = rounding.scale_box(box)
        around = rounding.value_box(scale_box, shape)
        with self._locks[name]:
            if rounding.group or around == box:
                # All that the scales take is here: one pass gives scales and values.
                scales = np.empty(extents(scale_box), np.float32)
                for piece in _pieces(around):
                    values = self._floats(name, piece)
                    found = scales[_within(rounding.scale_box(piece), scale_box)] = rounding.scales(values)
                    rounded = rounding.rounded(values, found)
                    wanted = (*piece[:-1], box[-1]) if rounding.group else piece
                    result[_within(wanted, box)] = rounded[_within(wanted, piece)]
                self._scales[name][scale_box] = scales
                return result
            scales = self._scales_of(name, scale_box)
        for piece in _pieces(box):
            found = scales[_within(rounding.scale_box(piece), scale_box)]
            result[_within(piece, box)] = rounding.rounded(self._floats(name, piece), found)
        return result

    def _scales_of(self, name: str, box: Box) -> np.ndarray:
        """A box of scales; the tensor's lock is held."""
        known, rounding = self._scales[name], self.tensors[name]
        if box not in known:
            found = np.empty(extents(box), np.float32)
            for piece in _pieces(rounding.value_box(box, self.source.info(name).shape)):
                found[_within(rounding.scale_box(piece), box)] = rounding.scales(self._floats(name, piece))
            known[box] = found
        return known[box]

    def _floats(self, name: str, box: Box) -> np.ndarray:
        return self.source.read(name, box).astype(np.float32)


def _pieces(box: Box) -> Iterator[Box]:
    """The box cut along its first dimension, so that no more than a few megabytes are float at a time."""
    (start, stop), *rest = box
    step = max(1, _VALUES_AT_ONCE // max(1, volume(tuple(rest))))
    for first in range(start, stop, step):
        yield ((first, min(first + step, stop)), *rest)


def _within(piece: Box, box: Box) -> tuple[slice, ...]:
    """Where a piece lies in an array of the box."""
    return slices(tuple((a - first, b - first) for (a, b), (first, _) in zip(piece, box, strict=True)))
