"""Configurations that no golden file holds, computed by transformers in the same run, where it is installed."""

import importlib
import json

import numpy as np
import pytest

from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.checkpoint.files import resolve_model
from ryzanstein_jax.model.families import spec_from_config
from tests.support import Forward, load, make_plan, make_programs, small_blocks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

LENGTH = 30
BUCKET = Bucket(decodes=1, prefill_tokens=20, prefills=2, rows=21)
COMMON = dict(
    vocab_size=67, hidden_size=32, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def rope(theta, rope_type="default", **others):
    return {"rope_type": rope_type, "rope_theta": theta} | others


#: Name: (model type, settings, width).
CONFIGS = {
    "llama with biases, yarn": (
        "llama",
        dict(
            attention_bias=True, mlp_bias=True, head_dim=12, tie_word_embeddings=True,
            rope_parameters=rope(1e4, "yarn", factor=4.0, original_max_position_embeddings=32),
        ),
        2,
    ),
    "llama, one KV head, linear rope": (
        "llama",
        dict(num_key_value_heads=1, rope_parameters=rope(1e4, "linear", factor=2.0)),
        4,
    ),
    "mistral, no window": ("mistral", dict(sliding_window=None, head_dim=16), 3),
    "qwen2, windows above": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True),
        2,
    ),
    "qwen3, biased, full heads": ("qwen3", dict(num_key_value_heads=4, attention_bias=True, head_dim=8), 8),
    "gemma2, other caps": (
        "gemma2",
        dict(
            head_dim=8, query_pre_attn_scalar=5, sliding_window=4, attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
        ),
        2,
    ),
    "gemma3, every second window": (
        "gemma3_text",
        dict(
            head_dim=8, query_pre_attn_scalar=8, sliding_window=5, num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        2,
    ),
    "phi3, half rotary": ("phi3", dict(rope_parameters=rope(1e4, partial_rotary_factor=0.5)), 2),
    "phi3, beyond the original length": (
        "phi3",
        dict(
            original_max_position_embeddings=16,
            rope_parameters=rope(
                1e4, "longrope", short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 9.0],
                original_max_position_embeddings=16,
            ),
        ),
        2,
    ),
    "olmo2, one KV head": ("olmo2", dict(num_key_value_heads=1), 8),
    "mixtral, three of five": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=3, sliding_window=7), 2),
    "qwen3_moe, shares not normalized": (
        "qwen3_moe",
        dict(
            num_experts=5, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=False, head_dim=8,
            decoder_sparse_step=2,
        ),
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name, tmp_path):
    model_type, settings, width = CONFIGS[name]
    config = transformers.AutoConfig.for_model(model_type, **COMMON | settings)
    reference = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    importlib.import_module("tests.golden.make").randomize(reference, seed=len(name))
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(len(name)).integers(0, COMMON["vocab_size"], LENGTH)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()

    spec = spec_from_config(resolve_model(str(tmp_path)).config)
    with small_blocks(8, 8):
        programs = make_programs(spec, width, BUCKET)
        forward = Forward(programs, load(programs, tmp_path))
        pages = np.random.default_rng(0).permutation(np.arange(1, 64))[:8].tolist()
        logits = [forward(make_plan([], [(tokens, pages, begin, end)])) for begin, end in ((0, 9), (9, 10), (10, 27))]
        logits += [forward(make_plan([(tokens, pages, position)])) for position in range(27, LENGTH)]
    np.testing.assert_allclose(np.concatenate(logits), expected, rtol=0, atol=1e-4, err_msg=json.dumps(settings))
