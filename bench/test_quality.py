"""What fewer bits cost in quality: perplexity, and how often the most likely token stays the same."""

from __future__ import annotations

import math
import pydoc_data.topics
import sys
from contextlib import closing
from typing import Any

import pytest
from rich.table import Table

from bench.harness import MODULES, OURS, Bench
from bench.protocol import Worker

#: Every precision that the engine has; the first is what the others are compared with.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "float32", "quantization": "int4"},
    "fp8": {"dtype": "float32", "quantization": "fp8"},
    "int8 KV cache": {"dtype": "float32", "kv_cache_dtype": "int8"},
    "fp8 KV cache": {"dtype": "float32", "kv_cache_dtype": "fp8"},
}


def test_quality(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Python's own reference, which every Python brings: windows spread evenly over some 100,000 tokens of English."""
    smoke = request.config.getoption("--smoke")
    count, length = (1, 16) if smoke else (request.config.getoption("--windows"), 512)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    found: dict[str, dict[str, Any]] = {}
    tokens = 0
    for name, settings in VARIANTS.items():
        if smoke and name not in ("float32", "int8"):
            continue
        with closing(Worker(sys.executable, MODULES[OURS])) as worker:
            worker.call(
                "start", model=bench.settings["model"], tensor_parallel_size=bench.settings["tensor_parallel_size"],
                max_model_len=length + 32, max_num_seqs=32, max_num_batched_tokens=length, num_pages=2 + length // 8,
                enable_prefix_caching=False, **settings,
            )  # fmt: skip
            score = worker.call("score", text=text[: 4000 if smoke else None], count=count, length=length)
        loss, best = score["losses"], score["best"]
        reference = found.get("float32", {"best": best, "losses": loss})
        tokens = len(loss)
        assert tokens == count * (length - 1) and len(best) == tokens
        found[name] = {
            "perplexity": math.exp(sum(loss) / tokens),
            "perplexity_over_float32": math.exp((sum(loss) - sum(reference["losses"])) / tokens),
            "same_most_likely_token": sum(map(int.__eq__, best, reference["best"])) / tokens,
            "losses": loss,
            "best": best,
        }
    table = Table("precision", "perplexity", "against float32", "same most likely token", title="quality")
    for name, figures in found.items():
        del figures["losses"], figures["best"]
        change = figures["perplexity_over_float32"] - 1
        cells = f"{figures['perplexity']:.3f}", f"{change:+.2%}", f"{figures['same_most_likely_token']:.2%}"
        table.add_row(name, *cells)
    bench.write("quality", {"benchmark": "quality", "tokens": tokens, "figures": found}, table)
