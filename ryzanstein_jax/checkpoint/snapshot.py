"""Snapshots: an Orbax checkpoint of the weights in their canonical form, with config and tokenizer beside it.

    manifest.json    written last: format, version, every tensor's shape and dtype, every file's size and SHA-256
    config.json      and the tokenizer's files, as Hugging Face spells them
    weights/         the Orbax checkpoint, parameters under their own paths

Nothing in it depends on the mesh that saved it, so it restores onto any width. A folder takes its name only
once it is whole and on the disk: a snapshot that loads is never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from ryzanstein_jax.checkpoint.layout import Layout, layout_of
from ryzanstein_jax.checkpoint.source import MAX_JSON_BYTES, Box, TensorInfo, slices
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes

MANIFEST = "manifest.json"
FORMAT = "ryzanstein-jax snapshot"
VERSION = 1
WEIGHTS = "weights"
_CHUNK_BYTES = 4 << 20  # the least that a reader takes of a tensor: a device's slice is a few of them
_MAX_FILES = 1 << 20


def save_snapshot(
    folder: str | Path,
    arrays: Mapping[str, jax.Array],
    params: Mapping[str, ParamSpec],
    spec: ModelSpec,
    sizes: PaddedSizes,
    *,
    config: Mapping[str, Any],
    files: Iterable[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Writes a snapshot; with several processes every one must call it, over a filesystem that they share.

    Args:
        folder: what it will be called; its parent is made where it is missing.
        arrays: path -> array, sharded over any mesh.
        params: path -> shape, dtype and axes, of the module built for `sizes`.
        spec: the model.
        sizes: its sizes as padded for the mesh.
        config: for `config.json`.
        files: the tokenizer's files, copied under their own names.
        overwrite: replace what is there already.

    Raises:
        WeightsError: the folder exists and `overwrite` is false, or a file to copy is missing.
    """
    folder = Path(folder).absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    first = jax.process_index() == 0
    if folder.exists() and not overwrite:
        raise WeightsError("the snapshot's folder exists; pass overwrite=True or another name", file=folder)
    extra = {file.name: Path(file) for file in map(Path, files)}
    for file in extra.values():
        if not file.is_file():
            raise WeightsError("a file that the snapshot should hold is missing", file=file)
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier("begin")

    made: dict[object, Callable[[jax.Array], jax.Array]] = {}
    canonical = {
        path: _canonical(array, layout_of(path, params[path], spec, sizes), made) for path, array in arrays.items()
    }
    context = ocp.Context()
    # Weights hardly compress, and decompressing them would take longer than reading them.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with context:
        ocp.save(partial / WEIGHTS, canonical)
    _barrier("saved")
    if first:
        (partial / "config.json").write_text(json.dumps(dict(config), indent=2))
        for name, file in extra.items():
            shutil.copyfile(file, partial / name)
        tensors = {
            path: {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name} for path, array in canonical.items()
        }
        _publish(partial, folder, tensors)
    _barrier("published")
    return folder


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
            found = (tuple(store.shape), store.dtype.numpy_dtype.name)
            if found != (tuple(entry["shape"]), entry["dtype"]):
                raise WeightsError(
                    "the snapshot's manifest and its weights disagree", file=self.path, tensor=name,
                    expected=entry, found=found,
                )  # fmt: skip
            self._infos[name] = TensorInfo(found[0], np.dtype(store.dtype.numpy_dtype), self.path)
            self._stores[name] = store

    def names(self) -> Iterable[str]:
        return self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, box: Box) -> np.ndarray:
        try:
            return np.asarray(self._stores[name][slices(box)].read().result())
        except (ValueError, OSError) as error:
            raise self._unreadable(name, error) from error

    def release(self, name: str) -> None:
        """Nothing is held but the bounded cache."""

    def _spec(self, name: str) -> dict[str, Any]:
        # Orbax's layout on disk: one OCDBT store of zarr3 arrays under the tree's own paths.
        base = f"file://{self.path / WEIGHTS / 'state'}/"
        return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}

    def _unreadable(self, name: str, error: Exception) -> WeightsError:
        reason = str(error).splitlines()[0][:300]
        return WeightsError(f"the snapshot is corrupt: {reason}; make it again", file=self.path, tensor=name)


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
    if manifest.get("version") != VERSION:
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


def _canonical(
    array: jax.Array, layout: Layout, made: dict[object, Callable[[jax.Array], jax.Array]]
) -> jax.Array:
    if layout.trivial:
        return array
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        divisible = [size % mesh.size == 0 for size in layout.canonical]
        axes = tuple(mesh.axis_names) if True in divisible else None
        where = divisible.index(True) if axes else 0
        sharding = NamedSharding(mesh, PartitionSpec(*([None] * where), axes))
    # Layers are alike: one program for each kind of parameter.
    key = (layout.shape, layout.canonical, layout.axis, array.dtype, sharding)
    if key not in made:
        made[key] = jax.jit(layout.contract, out_shardings=sharding)
    return made[key](array)


def _publish(partial: Path, folder: Path, tensors: dict[str, Any]) -> None:
    """Makes all of it durable, writes the manifest last, and gives the folder its name."""
    names = sorted(str(p.relative_to(partial).as_posix()) for p in partial.rglob("*") if p.is_file())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        entries = dict(zip(names, pool.map(lambda name: _entry(partial / name), names), strict=True))
    manifest = {"format": FORMAT, "version": VERSION, "tensors": tensors, "files": entries}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    old = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        if (verify or not name.startswith(f"{WEIGHTS}/")) and _entry(path) != entry:
            raise WeightsError(
                "a file of the snapshot was changed after it was saved; make it again", file=path,
                expected=entry.get("sha256"),
            )  # fmt: skip

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(check, files.items()))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"snapshot {name}")
