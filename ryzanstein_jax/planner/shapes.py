"""Models by name, without their files: the published `config.json` fields that fix what they compute."""

from __future__ import annotations

from typing import Any

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "bos_token_id": 128000,
    "eos_token_id": [128001, 128009], "num_key_value_heads": 8, "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "bos_token_id": 151643,
    "eos_token_id": 151645, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}  # fmt: skip


def _sizes(hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn,
        **more,
    }  # fmt: skip


#: Name -> `config.json`. The Llama 3 ones are 3.1's: the shapes are the same, the context is longer.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {**_LLAMA_3, **_sizes(4096, 32, 32, 14336)},
    "llama-3-70b": {**_LLAMA_3, **_sizes(8192, 80, 64, 28672)},
    "llama-3-405b": {**_LLAMA_3, **_sizes(16384, 126, 128, 53248)},
    "llama-3.2-1b": {**_LLAMA_3, **_sizes(2048, 16, 32, 8192, head_dim=64, tie_word_embeddings=True)},
    "llama-3.2-3b": {**_LLAMA_3, **_sizes(3072, 28, 24, 8192, head_dim=128, tie_word_embeddings=True)},
    "qwen3-8b": {**_QWEN_3, **_sizes(4096, 36, 32, 12288)},
    "qwen3-32b": {**_QWEN_3, **_sizes(5120, 64, 64, 25600)},
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "sliding_window": None, **_sizes(4096, 32, 32, 14336),
    },
}  # fmt: skip


def config_of(model: str) -> dict[str, Any]:
    """`config.json` of a model: of `SHAPES` by name, or of a folder, a `.gguf` file, "smollm2" or a hub id.

    Raises:
        ConfigError: there is no such model.
        WeightsError: its files are broken.
    """
    shape = SHAPES.get(model.lower())
    if shape is not None:
        return dict(shape)
    from ryzanstein_jax.checkpoint.files import resolve_model

    # "dummy": of a hub id the configuration alone is fetched.
    return resolve_model(model, load_format="dummy").config
