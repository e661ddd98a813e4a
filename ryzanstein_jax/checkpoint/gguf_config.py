"""GGUF metadata -> a Hugging Face `config.json`, so that one parser makes every `ModelSpec`."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as QuantType

from ryzanstein_jax.checkpoint.gguf import GgufSource
from ryzanstein_jax.errors import UnsupportedModelError, WeightsError

#: GGUF architecture -> (model_type, architectures[0]).
_MODEL_TYPES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
}
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def hf_config(source: GgufSource) -> dict[str, Any]:
    """The file's settings in the words of a Hugging Face `config.json`.

    Raises:
        WeightsError: a setting that the model needs is missing or impossible.
        UnsupportedModelError: its rotary scaling is not known.
    """
    arch = source.architecture
    settings = _Settings(source)
    hidden, heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    layers = settings.whole("block_count")
    head_dim = settings.whole("attention.key_length", hidden // heads)
    names = set(source.names())
    if "model.embed_tokens.weight" not in names:
        raise WeightsError("the GGUF file holds no token embedding", file=source.path, tensor="token_embd.weight")
    model_type, architecture = _MODEL_TYPES[arch]
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": source.info("model.embed_tokens.weight").shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": settings.whole("feed_forward_length", 0),
        "max_position_embeddings": settings.whole("context_length"),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.number("rope.freq_base", 1e6 if arch == "gemma3" else 1e4),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in names,
        "torch_dtype": _dtype(source),
    }
    if arch != "qwen2":  # whose q, k and v always have biases, and o none: its config.json has no such field
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    config.update(_tokens(source))
    config["rope_scaling"] = _rope_scaling(source, settings, config)
    rotary = settings.whole("rope.dimension_count", head_dim)
    if rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    if (window := settings.whole("attention.sliding_window", 0)) > 0:
        config["sliding_window"] = window
    if arch.startswith("gemma"):
        config.update(_gemma(arch, settings, config))
    if (experts := settings.whole("expert_count", 0)) > 0:
        config.update(_experts(arch, settings, experts))
    return config


class _Settings:
    def __init__(self, source: GgufSource):
        self.source = source

    def get(self, key: str) -> Any:
        return self.source.metadata.get(f"{self.source.architecture}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # one number for each layer, all the same
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < (1 if default is None else 0):
            self._refuse(key, "a whole number, the same for all layers", value)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            self._refuse(key, "a number", value)
        # GGUF stores float32; six digits give back the decimal that was meant (1e-05, not 9.99999975e-06).
        return float(f"{value:.6g}")

    def _refuse(self, key: str, expected: str, found: object) -> None:
        name = f"{self.source.architecture}.{key}"
        raise WeightsError(f"GGUF setting {name} is unusable", file=self.source.path, expected=expected, found=found)


def _dtype(source: GgufSource) -> str:
    """float16 or float32 where most is stored so; quantized weights are computed with in bfloat16."""
    sizes: dict[QuantType, int] = {}
    for name in source.names():
        kind = source.type_of(name)
        sizes[kind] = sizes.get(kind, 0) + int(np.prod(source.info(name).shape, dtype=np.int64))
    most = max(sizes, key=lambda kind: sizes[kind])
    return {QuantType.F32: "float32", QuantType.F16: "float16"}.get(most, "bfloat16")


def _tokens(source: GgufSource) -> dict[str, Any]:
    def ids(*keys: str) -> list[int]:
        found = [source.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
        return list(dict.fromkeys(i for i in found if isinstance(i, int) and not isinstance(i, bool)))

    bos, pad = ids("bos"), ids("padding")
    return {
        "bos_token_id": bos[0] if bos else None,
        "pad_token_id": pad[0] if pad else None,
        # The end of a turn ends a completion as well.
        "eos_token_id": ids("eos", "eot"),
    }


def _rope_scaling(source: GgufSource, settings: _Settings, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = settings.get("rope.scaling.type")
    if "rope_factors_long.weight" in source.settings:
        original = settings.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
        config["original_max_position_embeddings"] = original
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "type": "longrope",
            "long_factor": source.settings["rope_factors_long.weight"].astype(float).tolist(),
            "short_factor": source.settings["rope_factors_short.weight"].astype(float).tolist(),
        }
        if settings.get("rope.scaling.attn_factor") is not None:
            scaling["attention_factor"] = settings.number("rope.scaling.attn_factor")
        return scaling
    if "rope_freqs.weight" in source.settings:
        return _llama3(source, config)
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"GGUF rope scaling {kind!r} is not supported; use linear, yarn or none")
    scaling = {"rope_type": kind, "type": kind, "factor": settings.number("rope.scaling.factor")}
    if settings.get("rope.scaling.original_context_length") is not None:
        scaling["original_max_position_embeddings"] = settings.whole("rope.scaling.original_context_length")
    return scaling


def _llama3(source: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's settings, which GGUF keeps only as the factors that follow from them."""
    found = source.settings["rope_freqs.weight"].astype(np.float64)
    low, high, original = 1.0, 4.0, 8192
    factor = float(f"{np.max(found):.6g}")
    if factor == 1.0:
        raise UnsupportedModelError("GGUF rope_freqs without scaling are not supported; convert without them")
    size = 2 * len(found)
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(found, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"the rope_freqs of {source.path} are not those of Llama 3 (factor {factor}); use its safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _gemma(arch: str, settings: _Settings, config: dict[str, Any]) -> dict[str, Any]:
    layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    # Not stored: as llama.cpp, tell the 27B models by their number of layers.
    large = layers == _GEMMA_27B_LAYERS[arch]
    extra: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if large else config["head_dim"],
    }
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        extra[name] = settings.number(key) if settings.get(key) is not None else None
    every = 2 if arch == "gemma2" else 6
    extra["layer_types"] = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if arch == "gemma3":
        extra["rope_local_base_freq"] = settings.number("rope.freq_base_swa", 1e4)
    return extra


def _experts(arch: str, settings: _Settings, experts: int) -> dict[str, Any]:
    used = settings.whole("expert_used_count")
    if arch == "llama":
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": experts,
            "num_experts_per_tok": used,
        }
    if arch != "qwen3moe":
        raise UnsupportedModelError(f"experts in a GGUF of architecture {arch!r} are not supported")
    return {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": settings.whole("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
