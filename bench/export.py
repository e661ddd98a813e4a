"""Writes any model that this package reads as a Hugging Face folder, so that both sides read the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ryzanstein_jax.checkpoint.files import open_source, resolve_model
from ryzanstein_jax.checkpoint.source import whole


def export_hf_folder(model: str, folder: Path) -> int:
    """Writes config.json and model.safetensors, dequantized to float32; no tokenizer.

    Args:
        model: what `LLM` takes.
        folder: an existing folder.

    Returns:
        The size of the vocabulary.
    """
    files = resolve_model(model)
    source = open_source(files)
    tensors = {}
    for name in source.names():
        values = source.read(name, whole(source.info(name).shape))
        tensors[name] = np.ascontiguousarray(values, dtype=np.float32)
        source.release(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**files.config, "dtype": "float32"}, indent=1))
    return int(files.config["vocab_size"])
