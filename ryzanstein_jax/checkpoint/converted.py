"""Weights that take arithmetic to load, written once as they are computed with: the next start only copies them.

A quantized GGUF file is dequantized into safetensors under the same Hugging Face names, in the dtype of the devices;
kernels that are quantized are kept so, with their scales, 4-bit ones as int8.
An entry belongs to one source file by its path, size and time of change; a checkpoint that needs no arithmetic has
none. Weights are no code, but they decide what a model says: only this user may write them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil

from ryzanstein_jax.cache import check_private, clear_partial, private_folder, whole_file
from ryzanstein_jax.checkpoint.gguf import QUANTIZED, GgufSource
from ryzanstein_jax.checkpoint.quantize import SCALE, QuantizingSource
from ryzanstein_jax.checkpoint.safetensors import SafetensorsSource
from ryzanstein_jax.checkpoint.source import DTYPES, WeightSource, whole
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.quantization import Quantization

_LOG = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_ALIGNMENT = 64
#: Of the host's memory: what is larger may have to come from the disk, which can take longer than the arithmetic.
_MEMORY_SHARE = 0.125


class ConvertedWeights:
    """The converted copy of one GGUF file, there or not.

    Args:
        folder: of all such copies.
        file: the GGUF file.
        dtype: of the weights on the devices.
        quantization: of the weights on the devices, if any.
        max_bytes: of all copies together; those used longest ago are deleted to stay below.
    """

    def __init__(
        self, folder: Path, file: Path, dtype: np.dtype, max_bytes: int, quantization: Quantization | None = None
    ):
        self.folder, self.file, self.dtype, self.max_bytes = folder, file.resolve(), np.dtype(dtype), max_bytes
        status = self.file.stat()
        code = hashlib.sha256()
        for module in ("gguf.py", "quantize.py"):
            code.update(Path(__file__).with_name(module).read_bytes())
        identity = [
            str(self.file), status.st_size, status.st_mtime_ns, status.st_ino, self.dtype.name, repr(quantization),
            code.hexdigest(),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps([*identity, np.__version__]).encode()).hexdigest()
        self.path = folder / f"{name}{_SUFFIX}"

    def open(self) -> WeightSource | None:
        """The copy; None where there is none that can be used and trusted."""
        try:
            check_private(os.stat(self.folder), self.folder)
            clear_partial(self.folder)
            check_private(os.lstat(self.path), self.path)  # of a link too: it counts as writable by others
            source = SafetensorsSource(self.path)
            os.utime(self.path)  # the time of last use, which deletion goes by
            return source
        except FileNotFoundError:
            return None
        except (OSError, WeightsError) as error:
            _LOG.warning("ignoring %s: %s", self.path, error)
            return None

    def pays(self, source: WeightSource) -> bool:
        """Whether a copy would be quicker to load than its source, and there is room for it."""
        stored = source.source if isinstance(source, QuantizingSource) else source
        if not isinstance(stored, GgufSource):
            return False
        if stored is source and all(stored.type_of(name) not in QUANTIZED for name in stored.names()):
            return False
        size = self._bytes(source)
        return size <= min(self.max_bytes, _MEMORY_SHARE * psutil.virtual_memory().total)

    def write(self, source: WeightSource) -> bool:
        """Writes the copy, tensor by tensor; returns whether that was possible. It appears whole or not at all."""
        try:
            private_folder(self.folder)
            self._trim(self._bytes(source))
            if self._bytes(source) > psutil.disk_usage(str(self.folder)).free // 2:
                return False
            with whole_file(self.path) as file:
                file.write(self._header(source))
                for tensor in source.names():
                    values = source.read(tensor, whole(source.info(tensor).shape)).astype(self._kept(source, tensor))
                    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
                    source.release(tensor)
                file.flush()
                os.fsync(file.fileno())  # a name that outlives a power cut must not outlive its content
        except (OSError, WeightsError) as error:
            _LOG.warning("cannot keep converted weights in %s: %s", self.folder, error)
            return False
        return True

    def _bytes(self, source: WeightSource) -> int:
        return sum(
            self._kept(source, name).itemsize * int(np.prod(source.info(name).shape, dtype=np.int64))
            for name in source.names()
        )

    def _kept(self, source: WeightSource, name: str) -> np.dtype:
        """The dtype that a tensor is kept in."""
        if isinstance(source, QuantizingSource) and (
            name in source.tensors or name.removesuffix(SCALE) in source.tensors
        ):
            dtype = source.info(name).dtype
            return np.dtype(np.int8) if dtype == ml_dtypes.int4 else dtype  # files have no int4
        return self.dtype

    def _header(self, source: WeightSource) -> bytes:
        kinds = {dtype: name for name, dtype in DTYPES.items()}
        entries: dict[str, object] = {"__metadata__": {"source": str(self.file)}}
        begin = 0
        for name in source.names():
            shape, dtype = source.info(name).shape, self._kept(source, name)
            end = begin + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            entries[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(entries).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def _trim(self, room: int) -> None:
        """Deletes what was used longest ago until `room` bytes more fit."""
        entries = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.lstat()
                if path.suffix == _SUFFIX:
                    entries.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in entries) + room - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
