"""`ModelSpec`: what a model computes, as data. No JAX here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ryzanstein_jax.model.quantization import Quantization, Scheme


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding.

    `inv_freq` are the frequencies of the rotated pairs, [rotary_dim / 2], all scaling (linear, Llama 3,
    YaRN, longrope) already in them; `scale` multiplies cos and sin (YaRN and longrope use it).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between the layers of one model."""

    window: int | None = None  # sliding-window attention over that many tokens, itself included
    rope: int = 0  # index into ModelSpec.ropes
    moe: bool = False


@dataclass(frozen=True)
class MoeSpec:
    num_experts: int
    top_k: int
    intermediate_size: int
    normalize_top_k: bool  # divide the chosen probabilities by their sum


@dataclass(frozen=True)
class ModelSpec:
    """One decoder of any family. `families.py` makes it from a Hugging Face `config.json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    max_position_embeddings: int
    norm_eps: float
    activation: str  # "silu", "gelu" or "gelu_tanh"
    attention_scale: float
    tie_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": over each head; "all": over all heads together (OLMo-2)
    norms: str = "pre"  # "pre", "post" (OLMo-2) or "both" (Gemma): around attention and MLP
    norm_offset: float = 0.0  # Gemma's weights are stored less one
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    moe: MoeSpec | None = None
    dtype: str = "float32"  # of the checkpoint
    quantization: Quantization | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def replace(self, **changes: object) -> ModelSpec:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Role of each quantized kernel -> how it is computed."""
        return self.quantization.schemes if self.quantization is not None else {}

    def num_parameters(self) -> int:
        """Parameters of the model itself, without the padding that sharding may add, and without scales."""
        return self.count_parameters(
            vocab=self.vocab_size,
            query_heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            ffn=self.intermediate_size,
            experts=self.moe.num_experts if self.moe else 0,
        )

    def count_parameters(self, *, vocab: int, query_heads: int, kv_heads: int, ffn: int, experts: int) -> int:
        """Parameters if the dimensions that a mesh shards had these sizes: those of one device, for example."""
        sizes = dict(vocab=vocab, query_heads=query_heads, kv_heads=kv_heads, ffn=ffn, experts=experts)
        return sum(outputs * inputs for _, outputs, inputs in self.kernels(**sizes)) + self._count_others(**sizes)

    def count_bytes(self, itemsize: int, *, vocab: int, query_heads: int, kv_heads: int, ffn: int, experts: int) -> int:
        """Bytes of those parameters with the scales of the quantized ones; the others take `itemsize` bytes each."""
        sizes = dict(vocab=vocab, query_heads=query_heads, kv_heads=kv_heads, ffn=ffn, experts=experts)
        kernels = sum(self.kernel_bytes(itemsize, *kernel) for kernel in self.kernels(**sizes))
        return kernels + itemsize * self._count_others(**sizes)

    def kernel_bytes(self, itemsize: int, role: str, outputs: int, inputs: int) -> int:
        """Bytes of a kernel of these sizes: with its scales if it is quantized, or else `itemsize` for each weight."""
        scheme = self.schemes.get(role)
        if scheme is None:
            return itemsize * outputs * inputs
        return scheme.kernel_bytes(outputs, inputs, self.head_dim if role == "out" else inputs)

    def kernels(
        self, *, vocab: int, query_heads: int, kv_heads: int, ffn: int, experts: int
    ) -> Iterator[tuple[str, int, int]]:
        """Role, outputs and inputs of every kernel, those of all experts as one."""
        d, heads = self.hidden_size, query_heads * self.head_dim
        yield "embedding", vocab, d
        if not self.tie_embeddings:
            yield "unembed", vocab, d
        for layer in self.layers:
            yield "qkv", heads + 2 * kv_heads * self.head_dim, d
            yield "out", d, heads
            if layer.moe:
                assert self.moe is not None
                size = self.moe.intermediate_size
                yield "gate_up", experts * 2 * size, d
                yield "down", experts * d, size
            else:
                yield "gate_up", 2 * ffn, d
                yield "down", d, ffn

    def _count_others(self, *, vocab: int, query_heads: int, kv_heads: int, ffn: int, experts: int) -> int:
        """Parameters that are no kernels: norms, biases, routers."""
        d, q, k, h = self.hidden_size, query_heads, kv_heads, self.head_dim
        attention = (q + 2 * k) * h * self.qkv_bias + d * self.out_bias
        attention += {None: 0, "head": 2 * h, "all": (q + k) * h}[self.qk_norm]
        norms = d * (4 if self.norms == "both" else 2)
        total = d
        for layer in self.layers:
            total += attention + norms
            if layer.moe:
                assert self.moe is not None
                # The router is not sharded: every device routes to all experts.
                total += self.moe.num_experts * d
            else:
                total += (2 * ffn + d) * self.mlp_bias
        return total
