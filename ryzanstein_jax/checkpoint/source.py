"""`WeightSource`: where named tensors come from, read slice by slice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

#: One dimension's range, start inclusive and stop exclusive; a box has one for each dimension.
Box = tuple[tuple[int, int], ...]

#: JSON from outside is refused above this: the largest honest files are indices and tokenizers.
MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a source: its shape, the dtype that reads give, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path


class WeightSource(Protocol):
    """Named tensors of one checkpoint, read by slices, so that no tensor need be held whole.

    Attributes:
        dialect: "huggingface" where names and shapes are those of a Hugging Face checkpoint,
            "canonical" where they are this package's own, unpadded (see `layout.py`).
        path: what to name in an error.
    """

    dialect: str
    path: Path

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of one tensor; KeyError where there is none of that name."""
        ...

    def read(self, name: str, box: Box) -> np.ndarray:
        """One box of a tensor, shaped like the box; it may be a view of a mapped file.

        Raises:
            WeightsError: the data cannot be read or decoded.
        """
        ...

    def release(self, name: str) -> None:
        """Says that a tensor was read: what the host holds of its file may go."""
        ...


def whole(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def volume(box: Box) -> int:
    """Elements in a box."""
    return math.prod(extents(box))


#: Little-endian dtypes by their names in safetensors files.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
#: Those that unquantized weights have.
FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
