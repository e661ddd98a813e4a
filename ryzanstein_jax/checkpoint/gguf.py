"""GGUF weights: memory-mapped, dequantized slice by slice, under Hugging Face names.

llama.cpp stores some tensors otherwise than Hugging Face does: q and k of the llama architecture with their
rows interleaved for its rotary embedding, Gemma's norms with one added. Both are undone here.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as QuantType

from ryzanstein_jax.checkpoint.gguf_metadata import read_gguf_metadata
from ryzanstein_jax.checkpoint.source import Box, TensorInfo, extents, slices
from ryzanstein_jax.errors import UnsupportedModelError, WeightsError

#: Architectures whose tensors and settings are understood.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "olmo2")

_FLOATS = {
    QuantType.F32: np.dtype("<f4"),
    QuantType.F16: np.dtype("<f2"),
    QuantType.BF16: np.dtype(ml_dtypes.bfloat16),
}
QUANTIZED = (
    QuantType.Q8_0, QuantType.Q4_0, QuantType.Q4_1, QuantType.Q5_0, QuantType.Q5_1,
    QuantType.Q2_K, QuantType.Q3_K, QuantType.Q4_K, QuantType.Q5_K, QuantType.Q6_K,
)  # fmt: skip
#: Tensors that settings are read from (see `gguf_config.py`), not weights.
SETTINGS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_TOP = ("model.embed_tokens", "model.norm", "lm_head")
_BLOCK = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj",
    "mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj",
)  # fmt: skip
_PERMUTED = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.q_proj.bias", ".self_attn.k_proj.bias")
_MAX_BLOCKS = 4096
_BLOCKS_AT_ONCE = 128


class GgufSource:
    """Tensors of one `.gguf` file. Quantized tensors read as float32.

    Attributes:
        metadata: the file's key-value part.

    Raises:
        WeightsError: the file is no GGUF, truncated, corrupt, or quantized in a way not supported.
        UnsupportedModelError: its architecture is not.
    """

    dialect = "huggingface"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata: dict[str, Any] = read_gguf_metadata(self.path)
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"GGUF architecture {self.architecture!r} of {self.path} is not supported; "
                f"use one of {', '.join(ARCHITECTURES)}"
            )
        reader = _open(self.path)
        self._map: mmap.mmap | None = getattr(reader.data, "_mmap", None)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        self.settings = {name: np.array(stored.pop(name).data) for name in SETTINGS if name in stored}
        names = self._hugging_face_names(stored)
        self._tensors = {names.get(name, name): tensor for name, tensor in stored.items()}
        self._infos = {name: self._info(name, tensor) for name, tensor in self._tensors.items()}

    def names(self) -> Iterable[str]:
        return self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def type_of(self, name: str) -> QuantType:
        """How a tensor is stored."""
        return self._tensors[name].tensor_type

    def read(self, name: str, box: Box) -> np.ndarray:
        if self.architecture == "llama" and name.endswith(_PERMUTED):
            return self._read_permuted(name, box)
        values = self._stored(name, box)
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values.astype(np.float32) - 1
        return values

    def release(self, name: str) -> None:
        tensor = self._tensors[name]
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = tensor.data_offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            self._map.madvise(mmap.MADV_DONTNEED, start, tensor.data_offset + tensor.n_bytes - start)

    def _stored(self, name: str, box: Box) -> np.ndarray:
        tensor = self._tensors[name]
        kind = tensor.tensor_type
        if kind in _FLOATS:
            return tensor.data.view(_FLOATS[kind])[slices(box)]
        # A block of values along the last dimension is the least that can be decoded.
        size, width = gguf.GGML_QUANT_SIZES[kind]
        *rows, (start, stop) = box
        first, last = start // size, -(-stop // size)
        raw = tensor.data[(*slices(tuple(rows)), slice(first * width, last * width))]
        # The library decodes 16 rows at a time; longer rows make it up to four times as fast.
        blocks = raw.size // width
        flat = np.ascontiguousarray(raw).reshape(-1, width * math.gcd(blocks, _BLOCKS_AT_ONCE))
        values = gguf.quants.dequantize(flat, kind).reshape(*raw.shape[:-1], -1)
        return values[..., start - first * size : stop - first * size]

    def _read_permuted(self, name: str, box: Box) -> np.ndarray:
        """Rows (head, half, pair) as Hugging Face has them, of rows stored as (head, pair, half)."""
        count = self.metadata.get("llama.attention.head_count", 0)
        if ".k_proj" in name:
            count = self.metadata.get("llama.attention.head_count_kv", count)
        rows = self._infos[name].shape[0]
        if not isinstance(count, int) or count < 1 or rows % (2 * count):
            raise WeightsError("rows do not divide into heads", file=self.path, tensor=name, expected=count, found=rows)
        size = rows // count
        (start, stop), *rest = box
        first, last = start // size, -(-stop // size)
        stored = self._stored(name, ((first * size, last * size), *rest))
        heads = stored.reshape(last - first, size // 2, 2, *extents(tuple(rest))).swapaxes(1, 2)
        return heads.reshape(stored.shape)[start - first * size : stop - first * size]

    def _info(self, name: str, tensor: gguf.ReaderTensor) -> TensorInfo:
        kind = tensor.tensor_type
        if kind not in _FLOATS and kind not in QUANTIZED:
            raise WeightsError(
                "this GGUF quantization is not supported",
                file=self.path,
                tensor=name,
                expected=", ".join(known.name for known in (*_FLOATS, *QUANTIZED)),
                found=kind.name,
            )
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return TensorInfo(shape, _FLOATS.get(kind, np.dtype(np.float32)), self.path)

    def _hugging_face_names(self, stored: dict[str, gguf.ReaderTensor]) -> dict[str, str]:
        """GGUF name -> Hugging Face name, by the gguf library's own table."""
        blocks = self.metadata.get(f"{self.architecture}.block_count", 0)
        if not isinstance(blocks, int) or not 0 < blocks <= _MAX_BLOCKS:
            raise WeightsError(
                "the number of layers is impossible", file=self.path, expected=f"1 to {_MAX_BLOCKS}", found=blocks
            )
        known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(known[self.architecture], blocks)
        fused = self.architecture == "phi3"
        names = {}
        keys = [*_TOP, *(f"model.layers.{i}.{key}" for i in range(blocks) for key in _BLOCK)]
        for key in keys:
            # The table maps both spellings of the MLP to one name; only Phi-3 means the fused one.
            if key.endswith("mlp.gate_up_proj") != fused and key.endswith(("mlp.gate_up_proj", "mlp.up_proj")):
                continue
            base = table.get_name(key)
            for suffix in (".weight", ".bias"):
                if base is not None and base + suffix in stored:
                    names[base + suffix] = key + suffix
        return names


class _Reader(gguf.GGUFReader):
    """The library's reader, with every read bounded by the file, and long arrays passed over.

    It would take seconds for a vocabulary, and a hostile count would keep it busy for ever.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"the file ends before {int(count)} values at byte {offset}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        offset = orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            raw = self.data.data
            for _ in range(count):
                if offset + 8 > len(raw):
                    raise ValueError(f"the file ends within an array of {count} strings")
                offset += 8 + int.from_bytes(raw[offset : offset + 8], "little")
        else:
            offset += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        return offset - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


def _open(path: Path) -> gguf.GGUFReader:
    try:
        reader = _Reader(path)
        for tensor in reader.tensors:
            values = 1
            for size in tensor.shape:
                values *= int(size)  # the library's own product may wrap around
            if values != tensor.n_elements or values == 0:
                raise ValueError(f"tensor {tensor.name} has an impossible shape {tensor.shape.tolist()}")
        return reader
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise WeightsError(f"the GGUF file is truncated or corrupt: {error}", file=path) from error
