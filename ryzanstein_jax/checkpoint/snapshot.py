"""Snapshots: an Orbax checkpoint of the weights in their canonical form, with config and tokenizer beside it.

    manifest.json    written last: format, version, every tensor's shape and dtype, every file's size and SHA-256
    config.json      and the tokenizer's files, as Hugging Face spells them
    weights/         the Orbax checkpoint, parameters under their own paths; int4 as uint8, two of a row in a byte

Nothing in it depends on the mesh that saved it, so it restores onto any width. A folder takes its name only
once it is whole and on the disk: a snapshot that loads is never half of one. Reading needs no JAX; `snapshot_writer`
writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

from ryzanstein_jax.checkpoint.source import MAX_JSON_BYTES, Box, TensorInfo, slices
from ryzanstein_jax.errors import WeightsError

MANIFEST = "manifest.json"
FORMAT = "ryzanstein-jax snapshot"
#: 1 held an int4 value in a byte.
VERSION = 2
_READABLE = (1, VERSION)
#: The dtype that a manifest gives to int4 values in pairs, the first in the low half; its shape is that of the bytes.
PAIRS = "int4 pairs"
WEIGHTS = "weights"
_MAX_FILES = 1 << 20


class SnapshotSource:
    """The tensors of a snapshot, in canonical form, read slice by slice.

    Args:
        path: the snapshot's folder.
        verify: read every file once and compare its SHA-256; sizes are compared in any case.

    Raises:
        WeightsError: no snapshot, of another version, incomplete or corrupt.
    """

    dialect = "canonical"

    def __init__(self, path: str | Path, verify: bool = False):
        self.path = Path(path).absolute()
        manifest = read_manifest(self.path)
        _check_files(self.path, manifest["files"], verify)
        self._infos: dict[str, TensorInfo] = {}
        self._stores: dict[str, Any] = {}
        self._pairs: set[str] = set()
        # One context: the tensors share one view of the store. No cache: it halves the speed.
        context = tensorstore.Context()
        opening = {
            name: tensorstore.open(self._spec(name), open=True, read=True, context=context)
            for name in manifest["tensors"]
        }
        for name, entry in manifest["tensors"].items():
            try:
                store = opening[name].result()
            except (ValueError, OSError) as error:
                raise self._unreadable(name, error) from error
            in_pairs = entry["dtype"] == PAIRS
            found = (tuple(store.shape), store.dtype.numpy_dtype.name)
            if found != (tuple(entry["shape"]), "uint8" if in_pairs else entry["dtype"]):
                raise WeightsError(
                    "the snapshot's manifest and its weights disagree", file=self.path, tensor=name,
                    expected=entry, found=found,
                )  # fmt: skip
            shape, dtype = found[0], np.dtype(store.dtype.numpy_dtype)
            if in_pairs:
                self._pairs.add(name)
                shape, dtype = (*shape[:-1], 2 * shape[-1]), np.dtype(ml_dtypes.int4)
            self._infos[name] = TensorInfo(shape, dtype, self.path)
            self._stores[name] = store

    def names(self) -> Iterable[str]:
        return self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, box: Box) -> np.ndarray:
        begin, end = box[-1] if name in self._pairs else (0, 0)
        held = (*box[:-1], (begin // 2, -(-end // 2))) if name in self._pairs else box
        try:
            read = np.asarray(self._stores[name][slices(held)].read().result())
        except (ValueError, OSError) as error:
            raise self._unreadable(name, error) from error
        return _apart(read)[..., begin % 2 : begin % 2 + end - begin] if name in self._pairs else read

    def release(self, name: str) -> None:
        """Nothing is held but the bounded cache."""

    def _spec(self, name: str) -> dict[str, Any]:
        # Orbax's layout on disk: one OCDBT store of zarr3 arrays under the tree's own paths.
        base = f"file://{self.path / WEIGHTS / 'state'}/"
        return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}

    def _unreadable(self, name: str, error: Exception) -> WeightsError:
        reason = str(error).splitlines()[0][:300]
        return WeightsError(f"the snapshot is corrupt: {reason}; make it again", file=self.path, tensor=name)


def _apart(pairs: np.ndarray) -> np.ndarray:
    """int4 [..., 2 N] of uint8 [..., N], two in each: the first in the low half."""
    values = np.empty((*pairs.shape[:-1], 2 * pairs.shape[-1]), np.int8)
    values[..., 0::2] = (pairs << 4).view(np.int8) >> 4
    values[..., 1::2] = pairs.view(np.int8) >> 4
    return values.astype(ml_dtypes.int4)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A snapshot's manifest, checked for its form.

    Raises:
        WeightsError: there is none, or it is not one of this format and version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise WeightsError("not a snapshot: it has no manifest; a save that was cut short leaves none", file=folder)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise WeightsError("the manifest is too large", file=path, expected=f"at most {MAX_JSON_BYTES} bytes")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"the manifest is not JSON: {error}", file=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise WeightsError("the manifest is not that of a snapshot", file=path, expected=FORMAT)
    if manifest.get("version") not in _READABLE:
        raise WeightsError(
            "the snapshot is of another version; make it again", file=path, expected=VERSION,
            found=manifest.get("version"),
        )  # fmt: skip
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if not (isinstance(files, dict) and isinstance(tensors, dict) and 0 < len(files) <= _MAX_FILES):
        raise WeightsError("the manifest lacks its tables of files and tensors", file=path)
    for name, entry in tensors.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise WeightsError("the manifest's entry of a tensor is unusable", file=path, tensor=name, found=entry)
        if not isinstance(entry.get("dtype"), str) or "/" in name:
            raise WeightsError("the manifest's entry of a tensor is unusable", file=path, tensor=name, found=entry)
    return manifest


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size and SHA-256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _check_files(folder: Path, files: Mapping[str, Any], verify: bool) -> None:
    def check(item: tuple[str, Any]) -> None:
        name, entry = item
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or not isinstance(entry, dict):
            raise WeightsError("the manifest names a file outside of the snapshot", file=folder, found=name)
        path = folder / plain
        found = path.stat().st_size if path.is_file() else "no file"
        if found != entry.get("bytes"):
            raise WeightsError(
                "the snapshot is incomplete; make it again", file=path, expected=f"{entry.get('bytes')} bytes",
                found=found,
            )  # fmt: skip
        if (verify or not name.startswith(f"{WEIGHTS}/")) and file_entry(path) != entry:
            raise WeightsError(
                "a file of the snapshot was changed after it was saved; make it again", file=path,
                expected=entry.get("sha256"),
            )  # fmt: skip

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(check, files.items()))
