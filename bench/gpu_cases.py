"""What `bench.gpu` computes: models, sizes of steps, shards of models. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.planner.compiled import Job
from ryzanstein_jax.planner.roofline import Step, step_parts
from ryzanstein_jax.planner.shapes import config_of
from ryzanstein_jax.planner.usage import pages

Config = dict[str, Any]

PAGE_SIZE = 16
#: The models' names in `planner.shapes`, where Llama 3.1's sizes are found under Llama 3's.
SPEED_MODELS = {"llama-3.2-1b": "llama-3.2-1b", "llama-3.1-8b": "llama-3-8b"}
#: What the benchmark's own models have in common.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}  # fmt: skip
#: Compute-bound already at small batches, as that of `test_scaling`.
WIDE = LLAMA | {
    "vocab_size": 8192, "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip

#: Special tokens that a smaller vocabulary does not have.
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class Sizes:
    """Of all stages; those of `SMOKE` only show that they run.

    Attributes:
        dtype: of weights, activations and cache.
        speed: name -> `config.json` of the models whose speed is measured.
        context: tokens of each sequence that decodes.
        batch: sequences of the batched decode.
        prompts, prompt: prompts of the prefill, and tokens of each.
        first: tokens of the prompt whose first token is timed.
        steps: of a measurement; three of them are made.
        shard: name -> `config.json` of the models whose shards are timed, and how many of their layers: two numbers,
            from which the whole model's time is drawn as a line, or its own number alone.
        shard_widths, shard_batches, shard_context: of the shards.
        gibibytes: of the buffer that is copied.
        square: rows and columns of the matrices whose product is timed.
        attention: cases of attention alone: sequences, KV slots, queries of each, head size, context, prompt tokens.
        families: tiny models of `tests/golden`, whose logits are compared.
        schedules: whether to try other schedules of the kernel.
    """

    dtype: str = "bfloat16"
    speed: dict[str, Config] = field(default_factory=lambda: {n: config_of(m) for n, m in SPEED_MODELS.items()})
    context: int = 1024
    few: int = 8
    batch: int = 64
    prompts: int = 8
    prompt: int = 2048
    first: int = 128
    steps: int = 32
    shard: dict[str, tuple[Config, tuple[int, ...]]] = field(
        default_factory=lambda: {name: (config_of(name), (4, 12)) for name in ("llama-3-8b", "llama-3-70b")}
    )
    shard_widths: tuple[int, ...] = (1, 2, 4, 8)
    shard_batches: tuple[int, ...] = (1, 8, 32, 128)
    shard_context: int = 2048
    gibibytes: float = 4.0
    square: int = 8192
    attention: tuple[tuple[int, int, int, int, int, int], ...] = (
        (1, 8, 4, 128, 1024, 0), (1, 8, 4, 128, 8192, 0), (64, 8, 4, 128, 1024, 0), (64, 8, 4, 64, 1024, 0),
        (32, 1, 8, 128, 8192, 0), (8, 8, 4, 128, 2048, 2048), (4, 8, 4, 64, 2048, 2048),
    )  # fmt: skip
    families: tuple[str, ...] = ("llama", "gemma2", "qwen3", "mixtral", "phi3")
    schedules: bool = True


def _tiny(config: Config) -> Config:
    small = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    return config | small | {"intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 512} | _NO_TOKENS


SMOKE = Sizes(
    dtype="float32", speed={"tiny": _tiny(config_of("llama-3.2-1b"))}, context=64, few=4, batch=4, prompts=2, prompt=32,
    first=16, steps=2, shard={"tiny": (_tiny(config_of("llama-3-8b")) | {"num_hidden_layers": 2}, (1, 2))},
    shard_widths=(1, 2), shard_batches=(1, 4), shard_context=64, gibibytes=0.01, square=128,
    attention=((2, 2, 3, 16, 64, 0),), families=("llama",), schedules=False,
)  # fmt: skip


def on_cpu() -> Sizes:
    """For one core of a processor: what it says of shards is about the processor."""
    return Sizes(
        dtype="float32", speed={}, steps=4, shard_context=256, gibibytes=1.0, square=2048, attention=(),
        shard={"smollm2": (config_of("smollm2"), (30,)), "wide": (WIDE, (2,))}, schedules=False,
    )  # fmt: skip


def speed_jobs(sizes: Sizes, device: str) -> dict[str, list[Job]]:
    """By model, its programs: decode of one, a few and many, the long prefill, the short one of a first token."""
    longest = max(sizes.context, sizes.prompt)
    held = max(sizes.batch * pages(sizes.context, PAGE_SIZE), sizes.prompts * pages(sizes.prompt, PAGE_SIZE)) + 1
    shared: dict[str, Any] = {"context": longest, "num_pages": held, "page_size": PAGE_SIZE, "dtype": sizes.dtype}
    return {
        name: [
            Job(device, 1, 1, 0, sampler=True, **shared),
            Job(device, 1, sizes.few, 0, sampler=True, **shared),
            Job(device, 1, sizes.batch, 0, sampler=True, **shared),
            Job(device, 1, 0, sizes.prompts * sizes.prompt, **shared),
            Job(device, 1, 0, sizes.first, **shared),
        ]
        for name in sizes.speed
    }


def decode_bytes(config: Config, batch: int, context: int, itemsize: int) -> float:
    """Least bytes that a decode reads: all weights but an embedding of its own, and the cache of every sequence."""
    spec = spec_from_config(config)
    table = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    cached = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * batch * context
    return float(itemsize * (spec.num_parameters() - table + cached))


def prefill_operations(config: Config, prompts: int, prompt: int) -> float:
    """Operations of products and attention for so many whole prompts of equal length."""
    spec = spec_from_config(config)
    parts = step_parts(spec, PaddedSizes.of(spec, 1), Step(prefill=prompt), 2)
    return prompts * sum(part.operations for part in parts.values())


def shard_config(config: Config, width: int, layers: int) -> Config:
    """`config.json` of what one of `width` devices computes, as a model of its own: no collectives.

    Heads, ffn and vocabulary are those of one device, padded as the engine pads them; the hidden size is whole.
    """
    spec = spec_from_config(config)
    sizes = PaddedSizes.of(spec, width)
    slots = sizes.heads.num_slots // width
    return (
        config
        | {
            "head_dim": spec.head_dim,
            "num_key_value_heads": slots,
            "num_attention_heads": slots * sizes.heads.queries_per_slot,
            "intermediate_size": sizes.ffn // width,
            "vocab_size": sizes.vocab // width,
            "num_hidden_layers": layers,
        }
        | _NO_TOKENS
    )


def shard_jobs(sizes: Sizes, device: str) -> list[Job]:
    """The decode programs of every shard, by batch."""
    held = max(sizes.shard_batches) * pages(sizes.shard_context, PAGE_SIZE) + 1
    return [
        Job(device, 1, batch, 0, context=sizes.shard_context, num_pages=held, page_size=PAGE_SIZE, dtype=sizes.dtype)
        for batch in sizes.shard_batches
    ]
