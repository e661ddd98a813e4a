"""`ryzanstein snapshot` and `ryzanstein info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ryzanstein_jax.commands.options import Dtype, Model, Quantize, Width
from ryzanstein_jax.llm import default_sampling_params
from ryzanstein_jax.start import make_config


def snapshot(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="What the snapshot will be called.")],
    tp: Width = 1,
    dtype: Dtype = "auto",
    quantization: Quantize = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Writes an Orbax checkpoint of the sharded weights with config and tokenizer; it restores onto any width."""
    from ryzanstein_jax.engine.local import snapshot_model

    settings = {"tensor_parallel_size": tp, "dtype": dtype, "quantization": quantization}
    path = snapshot_model(make_config(model, settings), folder, overwrite=overwrite)
    print(path)


def info(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Shows what a model computes, its parameters, and what it takes per device at each width."""
    from ryzanstein_jax.engine.open import open_model
    from ryzanstein_jax.memory import footprint

    opened = open_model(make_config(model, {}))
    spec = opened.spec
    widths = [footprint(spec, width) for width in (1, 2, 4, 8)]
    facts = {
        "architecture": spec.architecture,
        "parameters": spec.num_parameters(),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": f"{spec.num_heads} query, {spec.num_kv_heads} KV, {spec.head_dim} wide",
        "vocabulary": spec.vocab_size,
        "max_model_len": spec.max_position_embeddings,
        "checkpoint": f"{opened.files.kind}, {spec.dtype}",
        "sampling": str(
            {k: v for k, v in vars(default_sampling_params(opened)).items() if k in ("temperature", "top_p", "top_k")}
        ),
    }
    if as_json:
        print(json.dumps({**facts, "per_device": [vars(width) for width in widths]}, indent=2))
        return
    console = Console()
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    weights = Table("devices", "float32", "bfloat16", "int8", "int4", "fp8", "padding", title="weights per device, MiB")
    cache = Table("devices", "float32", "bfloat16", "int8 or fp8", title="KV cache per token and device, KiB")
    for width in widths:
        held = width.weights * 4, width.weights * 2, width.int8_bytes, width.int4_bytes, width.fp8_bytes
        weights.add_row(str(width.width), *(f"{size / 2**20:,.1f}" for size in held), f"{width.padding:.0%}")
        entries = width.kv_values * 4, width.kv_values * 2, width.kv_8bit_bytes
        cache.add_row(str(width.width), *(f"{size / 2**10:,.1f}" for size in entries))
    console.print(weights)
    console.print(cache)
