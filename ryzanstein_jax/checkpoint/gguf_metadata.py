"""The key-value part of a GGUF file.

The `gguf` library makes several numpy arrays per string, which takes seconds for a vocabulary; here it takes
a tenth of one. Every length is checked against the file before anything is allocated.
"""

from __future__ import annotations

import mmap
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ryzanstein_jax.errors import WeightsError

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_STRING_BYTES = 16 << 20


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """All metadata of a little-endian GGUF file, versions 2 and 3.

    Values are int, float, bool, str, or a list of one of those. Several readers of one file share them: leave them as
    they are.

    Raises:
        WeightsError: the file is missing, no GGUF, truncated or corrupt.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise WeightsError(f"cannot read GGUF metadata: {error}", file=path) from error
    return dict(_metadata_of(str(path), status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1)  # configuration, weights and tokenizer each read them at start, a tenth of a second each time
def _metadata_of(path: str, *identity: int) -> dict[str, Any]:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).metadata()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise WeightsError(f"cannot read GGUF metadata: {error}", file=path) from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: str | Path):
        self.data, self.path, self.at = data, path, 0

    def metadata(self) -> dict[str, Any]:
        if self.bytes(4) != b"GGUF":
            raise WeightsError("not a GGUF file", file=self.path, expected="it to begin with GGUF")
        version = self.number("<u4")
        if version not in _VERSIONS:
            raise WeightsError("GGUF version not supported", file=self.path, expected=_VERSIONS, found=version)
        self.number("<u8")  # number of tensors
        count = self.number("<u8")
        if count > MAX_KEYS:
            raise WeightsError("too many metadata keys", file=self.path, expected=f"at most {MAX_KEYS}", found=count)
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a key")
            values[key] = self.value(self.number("<u4"), key)
        return values

    def bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise WeightsError(
                "GGUF file is truncated or corrupt",
                file=self.path,
                expected=f"{size} bytes at offset {self.at}",
                found=f"a file of {len(self.data)} bytes",
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.bytes(kind.itemsize), kind)[0].item()

    def string(self, key: str) -> str:
        (size,) = struct.unpack("<Q", self.bytes(8))
        if size > MAX_STRING_BYTES:
            raise WeightsError(f"string too long in {key}", file=self.path, expected=MAX_STRING_BYTES, found=size)
        raw = self.bytes(size)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise WeightsError(f"text of {key} is not UTF-8: {raw[:40]!r}", file=self.path) from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
            # Each entry takes at least one byte, a string eight: no honest count is larger than the file.
            if count > len(self.data) - self.at:
                raise WeightsError(f"array {key} is longer than the file", file=self.path, found=count)
            if kind == _STRING:
                return [self.string(key) for _ in range(count)]
            if kind in _SCALARS:
                dtype = np.dtype(_SCALARS[kind])
                return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
        elif kind in _SCALARS:
            return self.number(_SCALARS[kind])
        raise WeightsError(f"unknown type of metadata in {key}", file=self.path, found=kind)
