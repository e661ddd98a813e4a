"""Float kernels read as int8 with a scale for each output channel: `recipe` asks for it, `assemble` does not notice.

A channel's scale is its largest value over *all* inputs / 127, also where a device takes a part of the inputs only
(row-parallel kernels): so the same int8 weights come out at every width, at the price that whoever loads such a kernel
reads all of it once for the scales.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ryzanstein_jax.checkpoint.source import Box, TensorInfo, WeightSource, extents, slices, volume, whole

#: Appended to a tensor's name, or a parameter's path: its scales. compressed-tensors has the same.
SCALE = "_scale"
LARGEST = 127
_VALUES_AT_ONCE = 4 << 20


class QuantizingSource:
    """Another source with some of its tensors in int8 and their scales, float32, beside them.

    Args:
        source: where the float values are.
        tensors: name of each tensor to quantize -> how many of its last dimensions are inputs.
    """

    def __init__(self, source: WeightSource, tensors: Mapping[str, int]):
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
            return TensorInfo(info.shape, np.dtype(np.int8), info.file)
        if base != name and base in self.tensors:
            info = self.source.info(base)
            return TensorInfo(info.shape[: -self.tensors[base]], np.dtype(np.float32), info.file)
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
        inputs = self.tensors[name]
        outputs = box[:-inputs]
        result = np.empty(extents(box), np.int8)
        with self._locks[name]:
            if box[-inputs:] == whole(self.source.info(name).shape[-inputs:]):
                # All inputs are here: one pass gives scales and values.
                scales = np.empty(extents(outputs), np.float32)
                for piece in _pieces(box):
                    values = self._floats(name, piece)
                    place = _within(piece, box)
                    found = scales[place[:-inputs]] = _scales(values, inputs)
                    result[place] = _rounded(values, found)
                self._scales[name][outputs] = scales
                return result
            scales = self._scales_of(name, outputs)
        for piece in _pieces(box):
            place = _within(piece, box)
            result[place] = _rounded(self._floats(name, piece), scales[place[:-inputs]])
        return result

    def _scales_of(self, name: str, outputs: Box) -> np.ndarray:
        """The scales of a box of outputs; the tensor's lock is held."""
        known = self._scales[name]
        if outputs not in known:
            inputs = self.tensors[name]
            box = outputs + whole(self.source.info(name).shape[-inputs:])
            found = np.empty(extents(outputs), np.float32)
            for piece in _pieces(box):
                found[_within(piece, box)[:-inputs]] = _scales(self._floats(name, piece), inputs)
            known[outputs] = found
        return known[outputs]

    def _floats(self, name: str, box: Box) -> np.ndarray:
        return self.source.read(name, box).astype(np.float32)


def _scales(values: np.ndarray, inputs: int) -> np.ndarray:
    axes = tuple(range(values.ndim - inputs, values.ndim))
    return np.max(np.abs(values), axis=axes) / np.float32(LARGEST)


def _rounded(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8; a channel of zeros has the scale 0 and stays zero."""
    divisors = np.where(scales > 0, scales, np.float32(1))
    return np.rint(values / divisors.reshape(*scales.shape, *[1] * (values.ndim - scales.ndim))).astype(np.int8)


def _pieces(box: Box) -> Iterator[Box]:
    """The box cut along its first dimension, so that no more than a few megabytes are float at a time."""
    (start, stop), *rest = box
    step = max(1, _VALUES_AT_ONCE // max(1, volume(tuple(rest))))
    for first in range(start, stop, step):
        yield ((first, min(first + step, stop)), *rest)


def _within(piece: Box, box: Box) -> tuple[slice, ...]:
    """Where a piece lies in an array of the box."""
    return slices(tuple((a - first, b - first) for (a, b), (first, _) in zip(piece, box, strict=True)))
