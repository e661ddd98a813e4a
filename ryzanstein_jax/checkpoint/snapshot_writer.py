"""Writes snapshots; `snapshot` describes and reads them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import NamedSharding, PartitionSpec

from ryzanstein_jax.checkpoint.layout import Layout, layout_of
from ryzanstein_jax.checkpoint.snapshot import FORMAT, MANIFEST, PAIRS, VERSION, WEIGHTS, file_entry
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes

_CHUNK_BYTES = 4 << 20  # the least that a reader takes of a tensor: a device's slice is a few of them


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
    in_pairs = {path for path, array in canonical.items() if array.dtype == jnp.int4 and array.shape[-1] % 2 == 0}
    canonical |= {path: _in_pairs(canonical[path]) for path in in_pairs}
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
            path: {"shape": list(array.shape), "dtype": PAIRS if path in in_pairs else np.dtype(array.dtype).name}
            for path, array in canonical.items()
        }
        _publish(partial, folder, tensors)
    _barrier("published")
    return folder


def _canonical(array: jax.Array, layout: Layout, made: dict[object, Callable[[jax.Array], jax.Array]]) -> jax.Array:
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


@jax.jit
def _in_pairs(values: jax.Array) -> jax.Array:
    """uint8 [..., N / 2] of int4 [..., N]: files would hold each value in a byte of its own."""
    low, high = (values[..., place::2].astype(jnp.uint8) for place in (0, 1))
    return low & 15 | high << 4


def _publish(partial: Path, folder: Path, tensors: dict[str, Any]) -> None:
    """Makes all of it durable, writes the manifest last, and gives the folder its name."""
    names = sorted(str(p.relative_to(partial).as_posix()) for p in partial.rglob("*") if p.is_file())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        entries = dict(zip(names, pool.map(lambda name: file_entry(partial / name), names), strict=True))
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"snapshot {name}")
