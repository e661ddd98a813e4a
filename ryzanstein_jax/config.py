"""Frozen, validated settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ryzanstein_jax.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "snapshot", "dummy")


@dataclass(frozen=True)
class EngineConfig:
    """Everything that an engine is built from. Names follow vLLM's where they mean the same.

    Attributes:
        model: Hugging Face id, folder of one, `.gguf` file, snapshot folder, or `"smollm2"` for
            the embedded default model.
        tokenizer: folder, id or `tokenizer.json`; None takes the model's own.
        revision: branch, tag or commit on the hub.
        load_format: where the weights come from; "auto" looks at the model, "dummy" draws random ones.
        tensor_parallel_size: number of devices the weights and the KV cache are sharded over.
        dtype: of weights, activations and KV cache. "auto" is the checkpoint's on an accelerator
            and float32 on a CPU, where it is the fastest.
        max_model_len: longest prompt + completion, in tokens; None takes the model's own limit.
        memory_fraction: share of each device's memory that weights, temporaries and KV cache may
            take together. None is 0.9 on an accelerator and 0.25 of the host's on a CPU.
        num_pages: exact number of KV-cache pages instead of what is left of the budget.
        page_size: tokens in a page of KV cache.
        max_num_seqs: most sequences that decode in one step.
        max_num_batched_tokens: most prompt tokens in one step (the chunk of chunked prefill).
        enable_prefix_caching: share the pages of equal prompt prefixes.
        seed: of every request that brings no seed of its own, and of dummy weights.
        max_logprobs: most alternatives per token that a request may ask for.
        max_logit_bias: most biased tokens that a request may name.
        compilation_cache_dir: persistent cache of compiled programs; None takes the user's cache
            folder, "" switches it off.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    load_format: str = "auto"
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    max_model_len: int | None = None
    memory_fraction: float | None = None
    num_pages: int | None = None
    page_size: int = 16
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    seed: int = 0
    max_logprobs: int = 20
    max_logit_bias: int = 300
    compilation_cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | Path) or not str(self.model).strip():
            raise ConfigError("model", self.model, "give a Hugging Face id, a folder or a .gguf file")
        object.__setattr__(self, "model", str(self.model))
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("dtype", self.dtype, DTYPES)
        _integer("tensor_parallel_size", self.tensor_parallel_size, 1, 4096)
        _integer("max_model_len", self.max_model_len, 2, 1 << 24, optional=True)
        _integer("num_pages", self.num_pages, 2, 1 << 30, optional=True)
        _integer("page_size", self.page_size, 1, 1024)
        if self.page_size & (self.page_size - 1):
            raise ConfigError("page_size", self.page_size, "use a power of two, such as 16")
        _integer("max_num_seqs", self.max_num_seqs, 1, 4096)
        _integer("max_num_batched_tokens", self.max_num_batched_tokens, 16, 1 << 20)
        _integer("seed", self.seed, 0, (1 << 63) - 1)
        _integer("max_logprobs", self.max_logprobs, 0, 1024)
        _integer("max_logit_bias", self.max_logit_bias, 0, 4096)
        fraction = self.memory_fraction
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if fraction is not None and not (number and 0 < fraction <= 1):
            raise ConfigError("memory_fraction", fraction, "use a number above 0 and at most 1, such as 0.9")

    def replace(self, **changes: object) -> EngineConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _one_of(field: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(field, value, f"use one of {', '.join(known)}")


def _integer(field: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(field, value, f"use a whole number from {low} to {high}")
