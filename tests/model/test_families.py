"""config.json -> ModelSpec: published models, both spellings, and configurations that must be refused.

`published_configs.json` holds published configurations (the longrope factors are made up), the published number of
parameters of the language model, and of each rope: inv_freq[1], [middle], [last], their sum, and the scale, as
transformers computes them; `config_5` is the same model as transformers 5 writes it.
"""

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzanstein_jax.errors import ConfigError, RyzansteinError, UnsupportedModelError
from ryzanstein_jax.model.families import FAMILIES, spec_from_config

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
GEMMA3 = PUBLISHED["gemma-3-1b-it"]["config"]


def published(name, **changes):
    return copy.deepcopy(PUBLISHED[name]["config"]) | changes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    entry = PUBLISHED[name]
    spec = spec_from_config(entry["config"])
    assert spec.num_parameters() == entry["parameters"]
    assert len(spec.ropes) == len(entry["ropes"])
    for rope, (expected, scale) in zip(spec.ropes, entry["ropes"], strict=True):
        f = rope.inv_freq
        assert [f[1], f[len(f) // 2], f[-1], math.fsum(f)] == pytest.approx(expected, rel=1e-6)
        assert rope.scale == pytest.approx(scale, rel=1e-12)
    if "config_5" in entry:
        other = spec_from_config(entry["config_5"])
        changes = {"architecture": "", "dtype": "", "bos_token_id": None, "eos_token_ids": ()}
        assert other.replace(**changes) == spec.replace(**changes)


def test_every_family_is_covered():
    assert {entry["config"]["architectures"][0] for entry in PUBLISHED.values()} == set(FAMILIES)


def test_what_sets_families_apart():
    gemma2 = spec_from_config(published("gemma-2-2b"))
    assert [layer.window for layer in gemma2.layers[:3]] == [4096, None, 4096]
    assert (gemma2.attention_softcap, gemma2.logits_softcap, gemma2.norms, gemma2.norm_offset) == (50, 30, "both", 1)
    assert gemma2.embedding_scale == math.sqrt(2304) and gemma2.activation == "gelu_tanh" and gemma2.tie_embeddings
    assert spec_from_config(published("gemma-2-2b", query_pre_attn_scalar=144)).attention_scale == 1 / 12
    gemma3 = spec_from_config(GEMMA3)
    assert [(layer.window, layer.rope) for layer in gemma3.layers[4:7]] == [(512, 1), (None, 0), (512, 1)]
    assert gemma3.qk_norm == "head" and gemma3.eos_token_ids == (1, 106) and gemma3.attention_softcap is None
    seeing = spec_from_config(published("gemma-3-4b-it"))
    assert seeing.eos_token_ids == (1, 106) and seeing.dtype == "bfloat16" and seeing.head_dim == 256
    qwen2 = spec_from_config(published("Qwen2.5-0.5B"))
    assert qwen2.qkv_bias and not qwen2.out_bias and qwen2.eos_token_ids == (151643,)
    olmo2 = spec_from_config(published("OLMo-2-1124-7B"))
    assert (olmo2.qk_norm, olmo2.norms) == ("all", "post") and olmo2.bos_token_id is None
    mixtral = spec_from_config(published("Mixtral-8x7B-v0.1"))
    assert mixtral.moe.normalize_top_k and mixtral.moe.top_k == 2 and all(layer.moe for layer in mixtral.layers)
    assert spec_from_config(published("Phi-3-mini-4k-instruct")).layers[0].window == 2047
    assert spec_from_config(published("Qwen3-8B with YaRN")).max_position_embeddings == 131072


def test_windows_of_qwen():
    on = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}
    assert [layer.window for layer in spec_from_config(QWEN2 | on).layers] == [None, None, None, 32]
    types = ["sliding_attention", "full_attention"] * 2
    assert [layer.window for layer in spec_from_config(QWEN2 | on | {"layer_types": types}).layers] == [32, None] * 2
    assert all(layer.window is None for layer in spec_from_config(QWEN2 | on | {"use_sliding_window": False}).layers)
    with pytest.raises(ConfigError, match="sliding_window"):
        spec_from_config(QWEN2 | {"layer_types": types})


def test_absent_and_null_window_of_mistral():
    mistral = LLAMA | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "max_position_embeddings": 8192,
    }
    assert spec_from_config(mistral).layers[0].window == 4096
    assert spec_from_config(mistral | {"sliding_window": None}).layers[0].window is None


def test_sparse_layers_of_qwen3_moe():
    config = published("Qwen3-30B-A3B", decoder_sparse_step=2, mlp_only_layers=[3], num_hidden_layers=8)
    spec = spec_from_config(config | {"norm_topk_prob": False})
    assert [i for i, layer in enumerate(spec.layers) if layer.moe] == [1, 5, 7] and not spec.moe.normalize_top_k


def test_biases():
    spec = spec_from_config(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert spec.qkv_bias and spec.out_bias and spec.mlp_bias


def test_longrope_goes_by_the_served_length():
    config = published("Phi-3-mini-128k-instruct")
    short, long = (spec_from_config(config, max_model_len=n).ropes[0] for n in (4096, 4097))
    factors = config["rope_scaling"]
    assert short.inv_freq[5] * factors["short_factor"][5] == pytest.approx(long.inv_freq[5] * factors["long_factor"][5])
    assert short.inv_freq != long.inv_freq and short.scale == long.scale == pytest.approx(math.sqrt(1 + 5 / 12))
    assert spec_from_config(config).ropes[0] == long
    config["rope_scaling"]["type"] = "su"
    assert spec_from_config(config).ropes[0] == long


def test_partial_rotation():
    spec = spec_from_config(published("Phi-3-mini-4k-instruct", partial_rotary_factor=0.75))
    assert spec.ropes[0].rotary_dim == 72 and spec.head_dim == 96


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Qwen3MoeForCausalLM"),
        (LLAMA, {"architectures": []} | {"model_type": "bloom"}, "bloom"),
        (LLAMA, {"architectures": [["x"]]}, "architecture"),
        (LLAMA, {"model_type": "mistral"}, "mistral"),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*quantized"),
        (LLAMA, {"clip_qkv": 8.0}, "clip_qkv"),
        (LLAMA, {"residual_multiplier": 0.22}, "residual_multiplier"),
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (LLAMA, {"num_shared_experts": 1}, "num_shared_experts"),
        (LLAMA, {"use_qkv_bias": True}, "use_qkv_bias"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp"),
        (LLAMA, {"sliding_window": 64}, "sliding_window"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"some_new_mathematics": 3}, "some_new_mathematics"),
        (LLAMA, {"some_new_switch": False}, "some_new_switch"),
        (LLAMA, {"hidden_act": "relu2"}, "relu2"),
        (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "both"),
        (LLAMA, {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "layer type"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        (QWEN2, {"mlp_bias": True}, "mlp_bias"),
        (QWEN2, {"attention_bias": False}, "attention_bias"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)  # fmt: skip
def test_mathematics_that_is_not_computed_is_refused_by_name(base, changes, named):
    with pytest.raises(UnsupportedModelError, match=named):
        spec_from_config(base | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"intermediate_size": 1e3}, "intermediate_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"num_attention_heads": 6}, "num_attention_heads"),
        ({"head_dim": 33}, "head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"eos_token_id": 100}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "high_freq",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"vocab_size": "9" * 10_000}, "vocab_size"),
    ],
)
def test_invalid_values_are_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named) as error:
        spec_from_config(LLAMA | changes)
    assert len(str(error.value)) < 400


def test_not_an_object_or_no_text_config():
    for config in ([], None, "x"):
        with pytest.raises(ConfigError):
            spec_from_config(config)
    with pytest.raises(ConfigError, match="text_config"):
        spec_from_config(published("gemma-3-4b-it", text_config=7))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_hostile_value_anywhere_gives_a_typed_error_or_a_spec(data):
    config = copy.deepcopy(data.draw(st.sampled_from([entry["config"] for entry in PUBLISHED.values()])))
    extra = ["rope_parameters", "layer_types", "attention_bias", "mlp_only_layers", "sliding_window", "head_dim"]
    place = config
    field = data.draw(st.sampled_from(sorted(config) + extra))
    if isinstance(config.get(field), dict) and data.draw(st.booleans()):
        place, field = config[field], data.draw(st.sampled_from(sorted(config[field]) or ["factor"]))
    place[field] = data.draw(_JSON)
    message = ""
    try:
        assert spec_from_config(config).num_parameters() > 0
    except RyzansteinError as error:
        message = str(error)
    assert len(message) < 1500
