"""Hugging Face `config.json` -> `ModelSpec`. A family is a row of `FAMILIES`; there is no file per family.

Both spellings are read: the published checkpoints' (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of
transformers 5 (`rope_parameters`, `dtype`, `layer_types`). Where a field is absent, transformers' default holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ryzanstein_jax.errors import ConfigError, UnsupportedModelError
from ryzanstein_jax.model.config_fields import Fields, shown, whole_number
from ryzanstein_jax.model.quantized_checkpoints import resolve_quantization
from ryzanstein_jax.model.rope import MAX_POSITION, RopeContext, rope_spec
from ryzanstein_jax.model.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
DTYPES = ("float32", "bfloat16", "float16")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What sets a family apart.

    Attributes:
        model_type: its name in `config.json`.
        windows: which layers have a sliding window: "none"; "all"; "qwen": from `max_window_layers` on, if
            `use_sliding_window`; "switch": all, if `use_sliding_window`; "pattern": all but each n-th.
        attention_bias: "no"; "qkv": always; "field": `attention_bias` gives q, k, v and o a bias.
        moe: names of the fields for the number of experts and for their size, or None.
        local_rope: sliding layers have a rope of their own (Gemma 3).
        rope_fields: further top-level fields that belong to the rope.
        spec: fields of ModelSpec that are fixed.
        defaults: fields of `config.json` that may be absent.
    """

    model_type: str
    windows: str = "none"
    attention_bias: str = "no"
    mlp_bias: bool = False
    gemma: bool = False
    moe: tuple[tuple[str, ...], str] | None = None
    local_rope: bool = False
    rope_fields: tuple[str, ...] = ()
    spec: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "bos_token_id": 2, "eos_token_id": 1,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "vocab_size": 256_000, "max_position_embeddings": 8192, "rope_theta": 1e4, "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = _GEMMA | {
    "vocab_size": 262_208, "max_position_embeddings": 131_072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
}  # fmt: skip
_GEMMA3_FAMILY = Family(
    "gemma3_text", windows="pattern", attention_bias="field", gemma=True, local_rope=True, defaults=_GEMMA3,
    spec={"qk_norm": "head", "norms": "both", "norm_offset": 1.0},
)  # fmt: skip

#: Architecture -> its row.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias="field", mlp_bias=True, defaults=_LLAMA),
    "MistralForCausalLM": Family("mistral", windows="all", defaults=_LLAMA | {"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family("qwen2", windows="qwen", attention_bias="qkv", defaults=_QWEN),
    "Qwen3ForCausalLM": Family(
        "qwen3", windows="qwen", attention_bias="field", spec={"qk_norm": "head"}, defaults=_QWEN | {"head_dim": 128}
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2", windows="pattern", attention_bias="field", gemma=True, defaults=_GEMMA2,
        spec={"norms": "both", "norm_offset": 1.0},
    ),
    "Gemma3ForCausalLM": _GEMMA3_FAMILY,
    "Gemma3ForConditionalGeneration": _GEMMA3_FAMILY,
    "Phi3ForCausalLM": Family(
        "phi3", windows="all", rope_fields=("partial_rotary_factor", "original_max_position_embeddings"),
        defaults=_LLAMA | {"rms_norm_eps": 1e-5, "eos_token_id": 32000, "original_max_position_embeddings": 4096},
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", attention_bias="field", spec={"qk_norm": "all", "norms": "post"},
        defaults=_LLAMA | {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
    ),
    "MixtralForCausalLM": Family(
        "mixtral", windows="all", moe=(("num_local_experts", "num_experts"), "intermediate_size"),
        defaults=_LLAMA | {
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", windows="switch", attention_bias="field", spec={"qk_norm": "head"},
        moe=(("num_experts", "num_local_experts"), "moe_intermediate_size"),
        defaults=_QWEN | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
}  # fmt: skip

#: Of a model that also sees: what its outer configuration may hold. Only the text part is served.
_OUTER_FIELDS = (
    "text_config", "vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id",
    "boi_token_id", "eoi_token_id", "mm_tokens_per_image", "eos_token_id", "bos_token_id", "tie_word_embeddings",
    "quantization_config",
)  # fmt: skip


def spec_from_config(
    config: Mapping[str, Any], *, max_model_len: int | None = None, quantization: str | None = None
) -> ModelSpec:
    """Reads a model's `config.json`.

    Args:
        config: the parsed file; nothing in it is trusted, and code that it names is never run.
        max_model_len: the longest sequence to be served, in tokens; None is the model's own limit. It picks
            the short or the long factors of a longrope model (Phi-3), which is all that it is read for.
        quantization: a name of `QUANTIZATIONS`; None is what the checkpoint says.

    Raises:
        UnsupportedModelError: an architecture, or a field, that asks for what this engine does not compute.
        ConfigError: a field is missing, of another type or out of range.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("config.json", type(config).__name__, "it must hold a JSON object")
    architecture, family = _family(config)
    if architecture == "Gemma3ForConditionalGeneration":
        config = _text_config(config)
    fields = Fields(config, family.defaults)

    vocab_size = fields.integer("vocab_size", 1, 1 << 22)
    hidden_size = fields.integer("hidden_size", 1, 1 << 17)
    num_layers = fields.integer("num_hidden_layers", 1, 1024)
    num_heads = fields.integer("num_attention_heads", 1, 1024)
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError("num_key_value_heads", num_kv_heads, f"it must divide num_attention_heads={num_heads}")
    head_dim = fields.integer("head_dim", 2, 1024, default=hidden_size // num_heads)
    if fields.given("head_dim") is None and "head_dim" not in family.defaults and hidden_size % num_heads:
        raise ConfigError(
            "num_attention_heads", num_heads, f"it must divide hidden_size={hidden_size}, or give head_dim"
        )
    if head_dim % 2:
        raise ConfigError("head_dim", head_dim, "rotary embeddings need an even number")
    stated_max_position = fields.integer("max_position_embeddings", 2, MAX_POSITION)

    sliding, window = _sliding_layers(fields, family, num_layers)
    parameters = _rope_parameters(fields, family)
    max_position = _max_position(parameters[FULL], stated_max_position)
    if max_model_len is not None:
        whole_number("max_model_len", max_model_len, 1, MAX_POSITION)
    context = RopeContext(head_dim, stated_max_position, max_model_len or max_position)
    ropes: list[RopeSpec] = [rope_spec(parameters[FULL], context)]
    if family.local_rope:
        ropes.append(rope_spec(parameters[SLIDING], context))
    moe, moe_layers = _moe(fields, family, num_layers)
    # A window that no sequence outgrows is none.
    window = None if window is None or window >= max_position else window
    layers = tuple(
        LayerSpec(window=window if slides else None, rope=int(family.local_rope and slides), moe=index in moe_layers)
        for index, slides in enumerate(sliding)
    )
    has_bias = family.attention_bias == "field" and fields.flag("attention_bias")
    if family.attention_bias == "qkv" and fields.given("attention_bias") not in (None, True):
        raise UnsupportedModelError(f"{architecture} always has biases: config.json must not have attention_bias=false")
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        layers=layers,
        ropes=tuple(ropes),
        max_position_embeddings=max_position,
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0),
        activation=_activation(fields, family),
        attention_scale=fields.number("query_pre_attn_scalar", 1e-3, 1e6) ** -0.5 if family.gemma else head_dim**-0.5,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=has_bias or family.attention_bias == "qkv",
        out_bias=has_bias,
        mlp_bias=family.mlp_bias and fields.flag("mlp_bias"),
        # The decoder rounds it to the weights' dtype, as transformers does.
        embedding_scale=math.sqrt(hidden_size) if family.gemma else 1.0,
        attention_softcap=fields.optional_number("attn_logit_softcapping", 1e-3, 1e6) if family.gemma else None,
        logits_softcap=fields.optional_number("final_logit_softcapping", 1e-3, 1e6) if family.gemma else None,
        moe=moe,
        dtype=_dtype(fields),
        quantization=resolve_quantization(quantization, fields.given("quantization_config")),
        bos_token_id=_bos(fields, vocab_size),
        eos_token_ids=_eos(fields, vocab_size),
        **family.spec,
    )
    fields.refuse_unread()
    return spec


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The architecture that a configuration names, and its row."""
    names, model_type = config.get("architectures"), config.get("model_type")
    if names is None or names == []:
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModelError(
            f"the architecture {shown(name)} (model_type {shown(model_type)}) is not known; known are "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    expected = "gemma3" if name == "Gemma3ForConditionalGeneration" else family.model_type
    if model_type not in (None, expected):
        raise UnsupportedModelError(
            f"config.json has model_type={shown(model_type)}, but its architecture {name} has model_type={expected!r}; "
            f"correct one of them"
        )
    return name, family


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a model that also sees, with what the outer configuration says of it."""
    outer, text = Fields(config, {}), config.get("text_config")
    for name in _OUTER_FIELDS:
        outer.given(name)
    outer.refuse_unread()
    if not isinstance(text, Mapping):
        raise ConfigError("text_config", shown(text), "it must hold a JSON object")
    shared = ("eos_token_id", "bos_token_id", "tie_word_embeddings", "torch_dtype", "dtype", "quantization_config")
    return dict(text) | {name: config[name] for name in shared if config.get(name) is not None}


def _sliding_layers(fields: Fields, family: Family, num_layers: int) -> tuple[list[bool], int | None]:
    """Which layers have a sliding window, and its size if any has."""
    kind = family.windows
    on = fields.flag("use_sliding_window") if kind in ("qwen", "switch") else kind != "none"
    given = fields.get("sliding_window") if kind != "none" else None
    window = whole_number("sliding_window", given, 1, MAX_POSITION) if on and given is not None else None
    sliding = [window is not None] * num_layers
    if kind == "qwen":
        first = fields.integer("max_window_layers", 0, 1 << 20)
        sliding = [window is not None and index >= first for index in range(num_layers)]
    elif kind == "switch":
        fields.given("max_window_layers")  # transformers does not look at it in this family
    elif kind == "pattern":
        period = fields.integer("sliding_window_pattern", 1, 1024)
        sliding = [bool((index + 1) % period) for index in range(num_layers)]
    names = fields.given("layer_types")
    if names is not None:
        if (
            not isinstance(names, list)
            or len(names) != num_layers
            or any(name not in (FULL, SLIDING) for name in names)
        ):
            raise UnsupportedModelError(
                f"config.json has layer_types={shown(names)}; it must hold {num_layers} times {FULL!r} or {SLIDING!r}"
            )
        stated = [name == SLIDING for name in names]
        if kind not in ("qwen", "pattern") and stated != sliding:
            raise UnsupportedModelError(
                f"config.json has layer_types={shown(names)}, which model_type {family.model_type!r} does not go by"
            )
        sliding = stated
    if any(sliding) and window is None:
        raise ConfigError("sliding_window", shown(given), "some layers have a sliding window; give its size")
    return sliding, window


def _rope_parameters(fields: Fields, family: Family) -> dict[str, dict[str, Any]]:
    """Rope parameters of full and of sliding layers, in the words of transformers 5."""
    new, scaling = (_mapping(fields, name) for name in ("rope_parameters", "rope_scaling"))
    nested = {kind: new[kind] for kind in (FULL, SLIDING) if kind in new}
    if nested and set(new) - set(nested):
        raise UnsupportedModelError(
            f"config.json has rope_parameters={shown(new)}: it mixes layer types and parameters"
        )
    if nested and not family.local_rope:
        raise UnsupportedModelError(f"config.json has a rope per layer type, which {family.model_type!r} does not have")
    scaling = {("rope_type" if name == "type" else name): value for name, value in scaling.items()}
    if scaling and new and {**new, **scaling} != new:
        raise UnsupportedModelError("config.json has both rope_parameters and another rope_scaling; remove one of them")
    stated = {name: fields.given(name) for name in family.rope_fields}
    shared = {"rope_theta": fields.number("rope_theta", 1.0, 1e12)} | scaling
    full = shared | _section(nested, FULL) if nested or family.local_rope else shared | new
    if family.local_rope and new and not nested:
        raise UnsupportedModelError(
            f"config.json has rope_parameters={shown(new)}; {family.model_type!r} needs one per kind"
        )
    for name, value in stated.items():
        if value is not None and (name == "original_max_position_embeddings" or full.get(name) is None):
            full[name] = value
    # Phi-3 names the length beside the rope, where any rope type finds it, and has a default for it.
    rope_type = full.get("rope_type", "default")
    if "original_max_position_embeddings" in family.rope_fields:
        if rope_type == "default":
            full.pop("original_max_position_embeddings", None)
        elif full.get("original_max_position_embeddings") is None:
            full["original_max_position_embeddings"] = family.defaults["original_max_position_embeddings"]
    elif full.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedModelError(
            f"config.json has partial_rotary_factor={shown(full['partial_rotary_factor'])}, which this engine does not "
            f"compute for model_type {family.model_type!r}"
        )
    local = {"rope_theta": fields.number("rope_local_base_freq", 1.0, 1e12)} if family.local_rope else {}
    return {FULL: full, SLIDING: local | _section(nested, SLIDING)}


def _mapping(fields: Fields, name: str) -> dict[str, Any]:
    value = fields.given(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(name, shown(value), "it must hold a JSON object")
    return dict(value or {})


def _section(nested: Mapping[str, Any], kind: str) -> dict[str, Any]:
    value = nested.get(kind)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"rope_parameters.{kind}", shown(value), "it must hold a JSON object")
    return {name: entry for name, entry in (value or {}).items() if entry is not None}


def _max_position(parameters: Mapping[str, Any], stated: int) -> int:
    """Longest sequence: YaRN configurations state that of the model before the extension."""
    if parameters.get("rope_type") != "yarn":
        return stated
    original = parameters.get("original_max_position_embeddings")
    original = (
        stated if original is None else whole_number("original_max_position_embeddings", original, 2, MAX_POSITION)
    )
    factor = parameters.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= MAX_POSITION / original:
        raise ConfigError(
            "rope factor", shown(factor), f"use 1 to {MAX_POSITION // original} for sequences of {original}"
        )
    return max(stated, int(original * factor))


def _moe(fields: Fields, family: Family, num_layers: int) -> tuple[MoeSpec | None, frozenset[int]]:
    """The experts, and the layers that have them."""
    if family.moe is None:
        return None, frozenset()
    names, size = family.moe
    name = next((name for name in names if fields.given(name) is not None), names[0])
    num_experts = fields.integer(name, 1, 4096)
    top_k = fields.integer("num_experts_per_tok", 1, num_experts)
    spec = MoeSpec(num_experts, top_k, fields.integer(size, 1, 1 << 20), fields.flag("norm_topk_prob"))
    if family.model_type != "qwen3_moe":
        return spec, frozenset(range(num_layers))
    step = fields.integer("decoder_sparse_step", 1, 1024, default=1)
    dense = fields.given("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError("mlp_only_layers", shown(dense), "config.json needs a list of layers here")
    dense = {whole_number("mlp_only_layers", layer, 0, num_layers - 1) for layer in dense}
    return spec, frozenset(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)


def _activation(fields: Fields, family: Family) -> str:
    # Gemma's hidden_act is a relic that its authors never used.
    name = "hidden_activation" if family.gemma else "hidden_act"
    fields.given("hidden_act")
    value = fields.get(name)
    value = family.defaults[name] if value is None else value
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedModelError(f"config.json has {name}={shown(value)}; this engine has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _dtype(fields: Fields) -> str:
    value = fields.given("dtype") or fields.given("torch_dtype") or "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        raise UnsupportedModelError(f"config.json has dtype={shown(value)}; this engine reads {', '.join(DTYPES)}")
    return str(name)


def _bos(fields: Fields, vocab_size: int) -> int | None:
    value = fields.get("bos_token_id")
    return None if value is None else whole_number("bos_token_id", value, 0, vocab_size - 1)


def _eos(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > 256:
        raise ConfigError("eos_token_id", shown(values), "use at most 256 tokens")
    return tuple(whole_number("eos_token_id", token, 0, vocab_size - 1) for token in values)
