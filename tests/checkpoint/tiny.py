"""Tiny models, their Hugging Face weights and the parameters that a module would ask for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from ryzanstein_jax.checkpoint.source import Box, TensorInfo, slices
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec
from ryzanstein_jax.sharding import PaddedSizes, make_mesh

# Nothing divides by 2, 4 or 8.
BASE = ModelSpec(
    architecture="TinyForCausalLM", vocab_size=37, hidden_size=12, num_heads=9, num_kv_heads=3, head_dim=4,
    intermediate_size=13, layers=(LayerSpec(), LayerSpec()), ropes=(RopeSpec((1.0, 0.1)),),
    max_position_embeddings=64, norm_eps=1e-5, activation="silu", attention_scale=0.5, tie_embeddings=True,
)  # fmt: skip
MOE = MoeSpec(num_experts=5, top_k=2, intermediate_size=7, normalize_top_k=True)
MOE_LAYERS = (LayerSpec(), LayerSpec(moe=True))

HEAD_AXES = ("kv_slots", "heads_per_slot", "head_dim")


class DictSource:
    """Tensors in memory."""

    dialect = "huggingface"
    path = Path("memory")

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors, self.reads = tensors, []

    def names(self) -> Iterable[str]:
        return self.tensors

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].shape, self.tensors[name].dtype, self.path)

    def read(self, name: str, box: Box) -> np.ndarray:
        self.reads.append((name, box))
        return self.tensors[name][slices(box)]

    def release(self, name: str) -> None:
        pass


def setup(spec: ModelSpec, width: int, dtype: str = "float32") -> tuple[PaddedSizes, dict[str, ParamSpec], Mesh]:
    sizes = PaddedSizes.of(spec, width)
    return sizes, params_of(spec, sizes, dtype), make_mesh(width, jax.devices("cpu"))


def params_of(spec: ModelSpec, sizes: PaddedSizes, dtype: str = "float32") -> dict[str, ParamSpec]:
    """By hand, so that these tests stand apart from the decoder."""
    embed, head, heads = spec.hidden_size, spec.head_dim, sizes.heads
    slots, queries = heads.num_slots, heads.queries_per_slot
    found: dict[str, ParamSpec] = {}

    def add(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
        found[path] = ParamSpec(shape, np.dtype(dtype), axes)

    add("embedding.table", (sizes.vocab, embed), ("vocab", "embed"))
    if not spec.tie_embeddings:
        add("unembed.table", (sizes.vocab, embed), ("vocab", "embed"))
    add("final_norm.scale", (embed,), ("embed",))
    norms = {
        "pre": ("attention_norm", "mlp_norm"),
        "post": ("attention_post_norm", "mlp_post_norm"),
        "both": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
    }[spec.norms]
    for index, layer in enumerate(spec.layers):
        at = f"layers.{index}."
        for norm in norms:
            add(f"{at}{norm}.scale", (embed,), ("embed",))
        add(f"{at}attention.qkv.kernel", (slots, queries + 2, head, embed), (*HEAD_AXES, "embed"))
        add(f"{at}attention.out.kernel", (embed, slots, queries, head), ("embed", *HEAD_AXES))
        if spec.qkv_bias:
            add(f"{at}attention.qkv.bias", (slots, queries + 2, head), HEAD_AXES)
        if spec.out_bias:
            add(f"{at}attention.out.bias", (embed,), ("embed",))
        if spec.qk_norm == "all":
            add(f"{at}attention.q_norm.scale", (slots, queries, head), HEAD_AXES)
            add(f"{at}attention.k_norm.scale", (slots, head), ("kv_slots", "head_dim"))
        elif spec.qk_norm == "head":
            add(f"{at}attention.q_norm.scale", (head,), ("head_dim",))
            add(f"{at}attention.k_norm.scale", (head,), ("head_dim",))
        if layer.moe and spec.moe:
            size = spec.moe.intermediate_size
            add(f"{at}mlp.router", (spec.moe.num_experts, embed), (None, "embed"))
            add(f"{at}mlp.gate_up", (sizes.experts, 2, size, embed), ("experts", "gate_up", "expert_ffn", "embed"))
            add(f"{at}mlp.down", (sizes.experts, embed, size), ("experts", "embed", "expert_ffn"))
        else:
            add(f"{at}mlp.gate_up.kernel", (sizes.ffn, 2, embed), ("ffn", "gate_up", "embed"))
            add(f"{at}mlp.down.kernel", (embed, sizes.ffn), ("embed", "ffn"))
            if spec.mlp_bias:
                add(f"{at}mlp.gate_up.bias", (sizes.ffn, 2), ("ffn", "gate_up"))
                add(f"{at}mlp.down.bias", (embed,), ("embed",))
    return found


def weights_of(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint under the common Hugging Face names, every value different."""
    rng = np.random.default_rng(seed)
    embed, queries = spec.hidden_size, spec.num_heads * spec.head_dim
    keys, ffn = spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, embed), "norm.weight": (embed,)}
    norms = ["post_attention_layernorm"]
    norms += ["input_layernorm"] if spec.norms != "post" else []
    norms += ["post_feedforward_layernorm"] if spec.norms != "pre" else []
    norms += ["pre_feedforward_layernorm"] if spec.norms == "both" else []
    for index, layer in enumerate(spec.layers):
        at = f"layers.{index}."
        shapes |= {f"{at}{norm}.weight": (embed,) for norm in norms}
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, embed)
            if spec.qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
            if spec.qk_norm and name != "v":
                shapes[f"{at}self_attn.{name}_norm.weight"] = (rows if spec.qk_norm == "all" else spec.head_dim,)
        shapes[f"{at}self_attn.o_proj.weight"] = (embed, queries)
        if spec.out_bias:
            shapes[f"{at}self_attn.o_proj.bias"] = (embed,)
        if layer.moe and spec.moe:
            size = spec.moe.intermediate_size
            shapes[f"{at}mlp.gate.weight"] = (spec.moe.num_experts, embed)
            for expert in range(spec.moe.num_experts):
                for name, shape in (("gate", (size, embed)), ("up", (size, embed)), ("down", (embed, size))):
                    shapes[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = shape
        else:
            for name, shape in (("gate", (ffn, embed)), ("up", (ffn, embed)), ("down", (embed, ffn))):
                shapes[f"{at}mlp.{name}_proj.weight"] = shape
                if spec.mlp_bias:
                    shapes[f"{at}mlp.{name}_proj.bias"] = shape[:1]
    found = {f"model.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if not spec.tie_embeddings:
        found["lm_head.weight"] = rng.standard_normal((spec.vocab_size, embed)).astype(np.float32)
    return found
