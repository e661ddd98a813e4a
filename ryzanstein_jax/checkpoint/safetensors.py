"""Safetensors checkpoints: one file or many, memory-mapped, read slice by slice.

The `safetensors` library checks each header (its size, the byte range of every tensor, holes, overlaps and
the length of the file); the reads are numpy views of the map, which cost nothing until they are copied.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ryzanstein_jax.checkpoint.source import DTYPES, MAX_JSON_BYTES, Box, TensorInfo, slices
from ryzanstein_jax.errors import WeightsError

INDEX_NAME = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ALIGN = mmap.ALLOCATIONGRANULARITY


class SafetensorsSource:
    """Tensors of a `.safetensors` file, or of a folder of them with or without an index.

    Raises:
        WeightsError: there are no safetensors files (only pickles, say), or one is truncated, corrupt, of
            an unsupported dtype, or disagrees with the index.
    """

    dialect = "huggingface"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[_File, int]] = {}
        for file in _weight_files(self.path):
            opened = _File(file)
            for name, (info, offset) in opened.tensors.items():
                if name in self._infos:
                    raise WeightsError(
                        "the same tensor stands in two files", file=file, tensor=name, found=self._infos[name].file
                    )
                self._infos[name] = info
                self._places[name] = (opened, offset)
        self._check_index()

    def names(self) -> Iterable[str]:
        return self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, box: Box) -> np.ndarray:
        info, (file, offset) = self._infos[name], self._places[name]
        return np.ndarray(info.shape, info.dtype, file.map, offset)[slices(box)]

    def release(self, name: str) -> None:
        info, (file, offset) = self._infos[name], self._places[name]
        start = offset // _ALIGN * _ALIGN
        end = offset + info.dtype.itemsize * int(np.prod(info.shape, dtype=np.int64))
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            file.map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _check_index(self) -> None:
        for name, file in _index_of(self.path).items():
            info = self._infos.get(name)
            if info is None or info.file.name != file:
                raise WeightsError(
                    "the index names a tensor that its file does not hold",
                    file=self.path / INDEX_NAME,
                    tensor=name,
                    expected=f"it in {file}",
                    found="nowhere" if info is None else f"it in {info.file.name}",
                )


class _File:
    """One mapped file: `tensors` maps each name to its info and the offset of its data."""

    def __init__(self, path: Path):
        try:
            with safe_open(path, framework="np"):
                pass  # opening it checks the header against the length of the file
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, SafetensorError) as error:
            raise WeightsError(
                f"not a readable safetensors file ({error}); it may be truncated: fetch it again",
                file=path,
                found=f"{path.stat().st_size} bytes" if path.exists() else "no file",
            ) from error
        (size,) = struct.unpack("<Q", self.map[:8])
        header = _header(self.map[8 : 8 + min(size, MAX_HEADER_BYTES)], path)
        self.tensors: dict[str, tuple[TensorInfo, int]] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise WeightsError(
                    "unsupported dtype of weights",
                    file=path,
                    tensor=name,
                    expected=", ".join(DTYPES),
                    found=entry["dtype"],
                )
            info = TensorInfo(tuple(entry["shape"]), dtype, path)
            begin, end = entry["data_offsets"]
            expected = dtype.itemsize * int(np.prod(info.shape, dtype=np.float64))
            if end - begin != expected or 8 + size + end > len(self.map):
                raise WeightsError(
                    "a tensor's byte range and its shape disagree", file=path, tensor=name, expected=expected,
                    found=end - begin,
                )  # fmt: skip
            self.tensors[name] = (info, 8 + size + begin)


def _header(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise WeightsError("the header names the same tensor twice", file=path, tensor=twice)
        return found

    try:
        return dict(json.loads(raw, object_pairs_hook=unique))
    except ValueError as error:
        raise WeightsError(f"the header is not JSON: {error}", file=path) from error


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError("no such file or folder of weights", file=path)
    indexed = sorted(set(_index_of(path).values()))
    files = [path / name for name in indexed] or sorted(path.glob("*.safetensors"))
    # Some publishers put the original checkpoint, all in one, beside its shards.
    if not indexed and len(files) > 1 and (path / "model.safetensors") in files:
        files = [path / "model.safetensors"]
    if files:
        return files
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES)
    if pickles:
        raise WeightsError(
            "pickled weights are refused, for loading them can run code; convert them with "
            "transformers' save_pretrained(safe_serialization=True), or choose a revision with safetensors",
            file=path,
            expected="*.safetensors",
            found=", ".join(pickles[:4]),
        )
    raise WeightsError("the folder holds no weights", file=path, expected="*.safetensors, a .gguf or a snapshot")


def _index_of(path: Path) -> dict[str, str]:
    """Tensor -> file name, of a folder's index; empty without one."""
    index = path / INDEX_NAME
    if not index.is_file():
        return {}
    if index.stat().st_size > MAX_JSON_BYTES:
        raise WeightsError("the index is too large", file=index, expected=f"at most {MAX_JSON_BYTES} bytes")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        entries = {str(name): file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"the index is not readable: {error!r}", file=index) from error
    for name, file in entries.items():
        plain = isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")
        if not plain:
            raise WeightsError(
                "the index must name safetensors files beside it", file=index, tensor=name, found=repr(file)
            )
    return entries
