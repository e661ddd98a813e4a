"""How checkpoints name their tensors, as data: one table per dialect.

A value is a name relative to the prefix of the text model. `{i}` is the layer, `{e}` the expert. `#q` picks
one segment of a fused tensor. An expert's name without `{e}` is a tensor that stacks all the experts.
Names of projections get `.weight` or `.bias` appended; those that end in `!` stand as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo-2; the experts are Qwen3-MoE's.
COMMON = {
    "embedding": "embed_tokens",
    "final_norm": "norm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "out": "layers.{i}.self_attn.o_proj",
    "q_norm": "layers.{i}.self_attn.q_norm",
    "k_norm": "layers.{i}.self_attn.k_norm",
    "gate": "layers.{i}.mlp.gate_proj",
    "up": "layers.{i}.mlp.up_proj",
    "down": "layers.{i}.mlp.down_proj",
    "router": "layers.{i}.mlp.gate",
    "expert_gate": "layers.{i}.mlp.experts.{e}.gate_proj",
    "expert_up": "layers.{i}.mlp.experts.{e}.up_proj",
    "expert_down": "layers.{i}.mlp.experts.{e}.down_proj",
}

#: Phi-3 fuses q, k, v and gate, up along the output dimension.
FUSED = {
    "q": "layers.{i}.self_attn.qkv_proj#q",
    "k": "layers.{i}.self_attn.qkv_proj#k",
    "v": "layers.{i}.self_attn.qkv_proj#v",
    "gate": "layers.{i}.mlp.gate_up_proj#gate",
    "up": "layers.{i}.mlp.gate_up_proj#up",
}

MIXTRAL = {
    "router": "layers.{i}.block_sparse_moe.gate",
    "expert_gate": "layers.{i}.block_sparse_moe.experts.{e}.w1",
    "expert_up": "layers.{i}.block_sparse_moe.experts.{e}.w3",
    "expert_down": "layers.{i}.block_sparse_moe.experts.{e}.w2",
}

#: What transformers 5 holds in memory, and writes where it does not convert back.
FUSED_EXPERTS = {
    "expert_gate": "layers.{i}.mlp.experts.gate_up_proj!#gate",
    "expert_up": "layers.{i}.mlp.experts.gate_up_proj!#up",
    "expert_down": "layers.{i}.mlp.experts.down_proj!",
}

#: GGUF stacks the experts of each projection; `gguf.py` gives them these names.
STACKED_EXPERTS = {
    "expert_gate": "layers.{i}.mlp.experts.gate_proj",
    "expert_up": "layers.{i}.mlp.experts.up_proj",
    "expert_down": "layers.{i}.mlp.experts.down_proj",
}

#: The first spelling that the checkpoint holds is taken.
DIALECTS = (COMMON, FUSED, MIXTRAL, FUSED_EXPERTS, STACKED_EXPERTS)

#: By `ModelSpec.norms`. The same name means another place in another family.
NORMS = {
    "pre": {
        "attention_norm": "layers.{i}.input_layernorm",
        "mlp_norm": "layers.{i}.post_attention_layernorm",
    },
    "post": {
        "attention_post_norm": "layers.{i}.post_attention_layernorm",
        "mlp_post_norm": "layers.{i}.post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "layers.{i}.input_layernorm",
        "attention_post_norm": "layers.{i}.post_attention_layernorm",
        "mlp_norm": "layers.{i}.pre_feedforward_layernorm",
        "mlp_post_norm": "layers.{i}.post_feedforward_layernorm",
    },
}

#: Where the text model stands, and where its output projection does.
PREFIXES = (
    ("model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("", "lm_head.weight"),
)

#: Parts of multimodal checkpoints that the text model does not use.
OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.", "vision_model.", "visual.", "audio_tower.")
#: Buffers that some publishers stored; they are computed here.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass(frozen=True)
class Spelling:
    """Where one dialect keeps one role: a tensor, or a segment of a fused one.

    Attributes:
        name: full tensor name, `{e}` still in it where each expert has its own.
        segment: "q", "k", "v", "gate" or "up" of a fused tensor, else "".
    """

    name: str
    segment: str = ""

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.name

    def of_expert(self, expert: int) -> str:
        return self.name.replace("{e}", str(expert))


def prefix_of(names: Iterable[str]) -> tuple[str, str]:
    """The prefix of the text model and the name of its output projection."""
    held = names if isinstance(names, set | dict) else set(names)
    for prefix, head in PREFIXES:
        if f"{prefix}embed_tokens.weight" in held:
            return prefix, head
    return PREFIXES[0]


def spellings(role: str, layer: int, kind: str, norms: str, prefix: str) -> Iterator[Spelling]:
    """Every known spelling of a role, the commonest first.

    Args:
        role: a key of the tables.
        layer: its number.
        kind: "weight" or "bias".
        norms: `ModelSpec.norms`.
        prefix: of the text model.
    """
    for table in (NORMS[norms], *DIALECTS):
        if role in table:
            name, _, segment = table[role].partition("#")
            name = name.removesuffix("!") if name.endswith("!") else f"{name}.{kind}"
            yield Spelling(prefix + name.replace("{i}", str(layer)), segment)


def harmless(name: str) -> bool:
    """Whether a tensor that no parameter uses may be left unread."""
    return name.endswith(HARMLESS_SUFFIXES) or name.removeprefix("model.").startswith(OTHER_MODALITIES)
