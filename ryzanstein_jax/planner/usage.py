"""What a model takes of one device's memory: the sum that the engine makes at start, without a device."""

from __future__ import annotations

from dataclasses import dataclass

from ryzanstein_jax.config import QUANTIZATIONS, SHARDINGS, checked_kv_cache_dtype
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.plan import most_prompt_tokens
from ryzanstein_jax.planner.devices import Device
from ryzanstein_jax.planner.roofline import BLOCK, cached_itemsize

_MOST_CONTEXT = 1 << 22


@dataclass(frozen=True)
class Setting:
    """What a plan is made for; all rows share it.

    Attributes:
        context: tokens of each sequence while it decodes, prompt included.
        prompt: tokens of the prompt whose first token is timed.
        dtype: of activations, and of weights that are not quantized.
        memory_fraction: share of a device's memory that the engine may take.
        max_num_batched_tokens: prompt tokens in one step.
        page_size: tokens in a page of KV cache.
        sharding: the way to shard.
        kv_cache_dtype: of the KV cache: "auto" (that of the activations), "int8" or "fp8".
        quantization: of the weights, as `EngineConfig` takes it; None: as the checkpoint is.
    """

    context: int = 8192
    prompt: int = 2048
    dtype: str = "auto"
    memory_fraction: float | None = None
    max_num_batched_tokens: int = 512
    page_size: int = 16
    sharding: str = "megatron"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None

    def __post_init__(self) -> None:
        for name in ("context", "prompt"):
            whole(name, getattr(self, name), _MOST_CONTEXT)
        whole("max_num_batched_tokens", self.max_num_batched_tokens, 1 << 20, least=16)
        whole("page_size", self.page_size, 1024)
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ConfigError("dtype", self.dtype, "use one of auto, bfloat16, float16, float32")
        object.__setattr__(self, "kv_cache_dtype", checked_kv_cache_dtype(self.kv_cache_dtype))
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ConfigError("quantization", self.quantization, f"use one of {', '.join(QUANTIZATIONS)}")
        if self.sharding not in SHARDINGS:
            raise ConfigError("sharding", self.sharding, f"use one of {', '.join(SHARDINGS)}")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ConfigError(
                "memory_fraction", self.memory_fraction, "use a number above 0 and at most 1, such as 0.9"
            )

    def prompt_tokens(self, batch: int) -> int:
        """Prompt tokens that a step of an engine with `batch` sequences has room for."""
        return most_prompt_tokens(self.max_num_batched_tokens, batch, self.context)


@dataclass(frozen=True)
class MemoryUse:
    """The sum for one device, in bytes.

    Attributes:
        weights: its shard of the parameters.
        kv_cache: pages for all sequences.
        temporaries: most that a step takes besides its arguments and results.
        logits: of two steps, and the sampler's copies.
        budget: what the engine may take.
        card: memory of the device.
    """

    weights: int
    kv_cache: int
    temporaries: int
    logits: int
    budget: int
    card: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.temporaries + self.logits

    @property
    def fits(self) -> bool:
        return self.total <= self.budget


def pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def temporaries(spec: ModelSpec, sizes: PaddedSizes, decodes: int, prefill: int, itemsize: int) -> int:
    """Bytes that a forward takes besides arguments and results, as XLA's GPU compiler lays them out.

    The largest of four moments: the products of an MLP, one with few rows whose sum is cut into parts (float32, at most
    16 of them and 16 MiB), the attention of decode tokens over one block of each, and the last norm, which is taken in
    float32 over all tokens.
    """
    tokens, embed, width = decodes + prefill, spec.hidden_size, sizes.width
    slots = sizes.heads.num_slots // width
    queries = slots * sizes.heads.queries_per_slot
    stream = 3 * tokens * embed * itemsize
    ffn = sizes.ffn // width
    if spec.moe:
        ffn = max(ffn, sizes.experts // width * spec.moe.intermediate_size)
    mlp = stream + 3 * tokens * ffn * itemsize
    parts = stream // 3 + 4 * min(16 * tokens * embed, 4 << 20)
    last_norm = stream + 4 * tokens * embed
    block = decodes * BLOCK * slots * spec.head_dim * itemsize * 2  # keys and values
    scores = decodes * queries * (BLOCK * (4 + itemsize) + 3 * spec.head_dim * 4)
    return max(mlp, parts, last_norm, stream + block + scores)


def memory_use(
    spec: ModelSpec, device: Device, width: int, dtype: str, batch: int, setting: Setting, fraction: float
) -> MemoryUse:
    """What `batch` sequences of `setting.context` tokens take, beside the weights."""
    itemsize = 4 if dtype == "float32" else 2
    sizes = PaddedSizes.of(spec, width)
    held = batch * pages(setting.context, setting.page_size) + 1  # page 0 is scratch
    return MemoryUse(
        weights=sizes.weight_bytes_per_device(spec, itemsize),
        kv_cache=held * sizes.page_bytes(spec, setting.page_size, cached_itemsize(setting.kv_cache_dtype, itemsize)),
        temporaries=temporaries(spec, sizes, batch, setting.prompt_tokens(batch), itemsize),
        logits=4 * batch * sizes.vocab * 4,
        budget=int(device.memory * fraction),
        card=device.memory,
    )


def largest_batch(spec: ModelSpec, device: Device, width: int, dtype: str, setting: Setting, fraction: float) -> int:
    """Most sequences of `setting.context` tokens that fit; 0 where not even one does."""

    def fits(batch: int) -> bool:
        return memory_use(spec, device, width, dtype, batch, setting, fraction).fits

    low, high = 0, 1
    while fits(high) and high < 1 << 24:
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def whole(field: str, value: object, most: int, least: int = 1) -> None:
    """Raises ConfigError unless the value is a whole number in the range."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(field, value, f"use a whole number from {least} to {most}")
