"""Make the golden fixtures: tiny random checkpoints and the logits that transformers computes from them.

    python tests/golden/make.py [FAMILY ...]

Each family gets a folder beside this script:

    config.json         in the spelling of transformers 5, or in that of the published checkpoints
    model.safetensors   bfloat16, under the tensor names of the published checkpoints
    expected.npz        prompt         int32   [40]
                        logits         float32 [40, vocab]  of the prompt
                        generated      int32   [16]         greedy continuation
                        decode_logits  float32 [16, vocab]  row i chose generated[i]; row 0 is logits[39]
    hidden.npy          float32 [40, hidden]    of `WITH_HIDDEN` only: the prompt's hidden states after the last norm

The reference is computed in float32, with eager attention and no cache, from the bfloat16-rounded weights.
Weights are large and nothing is left at a neutral value (norms, biases), so that a dropped bias, a wrong
norm offset or a missed soft cap moves the logits by far more than rounding does.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # everything here is made from nothing

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

VOCAB, PROMPT, GENERATED = 131, 40, 16
MARGIN = 1e-3  # between the first and second choice, so that rounding cannot change it

# Dimensions that do not divide by 8 or by the usual mesh sizes: padding is part of what is tested.
COMMON = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6)
COMMON |= dict(num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TIED = dict(tie_word_embeddings=True)
NINE_HEADS = dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3)
WIDE_HEADS = dict(hidden_size=40, num_attention_heads=4, head_dim=8)  # head_dim is not hidden / heads
GEMMA = WIDE_HEADS | dict(bos_token_id=2, eos_token_id=1, sliding_window=12)
GEMMA2 = GEMMA | dict(num_hidden_layers=4, query_pre_attn_scalar=12)
GEMMA2 |= dict(attn_logit_softcapping=4.0, final_logit_softcapping=6.0)
GEMMA3 = GEMMA | dict(num_hidden_layers=6, num_key_value_heads=1, query_pre_attn_scalar=10, sliding_window_pattern=3)
GEMMA3_ROPE = dict(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=None, head_dim=8)
MIXTRAL = dict(hidden_size=40, intermediate_size=44, num_attention_heads=5, num_key_value_heads=1)
MIXTRAL |= dict(num_local_experts=4, num_experts_per_tok=2)
QWEN_MOE = WIDE_HEADS | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)
QWEN_MOE |= dict(norm_topk_prob=True, mlp_only_layers=[0])
NO_WINDOW = dict(use_sliding_window=False, sliding_window=8, max_window_layers=2)  # a window that is turned off
# Wavelengths 6, 53, 444 and 3736 fall on all three branches of the Llama 3 scaling.
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
# As Phi-4-mini: longrope over three quarters of each head, tied embeddings. The sequence stays within the
# original length, so the short factors apply, but cos and sin are scaled already.
LONG = dict(partial_rotary_factor=0.75, short_factor=[1.0, 1.5, 2.5], long_factor=[1.0, 4.0, 16.0])
PHI_LONG = TIED | dict(original_max_position_embeddings=64, max_position_embeddings=256)


def rope(theta: float, rope_type: str = "default", **others: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": theta} | others


class Family(NamedTuple):
    model_type: str
    rope_parameters: dict[str, Any] | None
    settings: dict[str, Any]  # over COMMON
    #: None keeps config.json as transformers 5 writes it. Otherwise it is rewritten to the spelling of the
    #: published checkpoints, with these fields, which transformers 5 drops or moves, put back.
    published: dict[str, Any] | None = None


FAMILIES = {
    "llama": Family("llama", rope(1e4), {}),
    "llama3_rope": Family("llama", rope(5e3, "llama3", **LLAMA3), TIED | dict(eos_token_id=[2, 5]), {"head_dim": 8}),
    "smollm2": Family("llama", rope(1e5), TIED | NINE_HEADS),
    "mistral": Family("mistral", rope(1e4), dict(sliding_window=16), published={}),
    "qwen2": Family("qwen2", rope(1e6), {}, published=NO_WINDOW),
    "qwen3": Family("qwen3", rope(1e4), WIDE_HEADS),
    "gemma2": Family("gemma2", rope(1e4), GEMMA2, published=dict(head_dim=8)),
    "gemma3": Family(
        "gemma3_text", dict(full_attention=rope(1e6, "linear", factor=8.0), sliding_attention=rope(1e4)), GEMMA3
    ),
    "gemma3_classical": Family("gemma3_text", None, GEMMA3, published=GEMMA3_ROPE),
    "phi3": Family("phi3", rope(1e4), dict(sliding_window=24)),
    "phi3_longrope": Family("phi3", rope(1e4, "longrope", **LONG), PHI_LONG, published={}),
    "olmo2": Family("olmo2", rope(5e5), {}),
    "mixtral": Family("mixtral", rope(1e6), MIXTRAL, published={}),
    "qwen3_moe": Family("qwen3_moe", rope(1e6), QWEN_MOE),
}


#: What embeddings are checked with: the family that most embedding models are of, and one with another final norm.
WITH_HIDDEN = ("qwen3", "gemma2")


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Fill the parameters with bfloat16-representable random values that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            value *= 0.25 if tied else 1.0  # a tied embedding also makes the logits
        elif name.endswith("bias"):
            value *= 0.5
        elif tied and name == "model.norm.weight":  # of random sign, or a tied model just repeats its input
            value += parameter.detach() - 1.0  # one is neutral, or zero for Gemma
        elif parameter.ndim == 1:  # a norm, around its neutral value
            value = parameter.detach() + 0.3 * value
        else:
            value *= 1.3 / math.sqrt(parameter.shape[-1])
        parameter.data = value.bfloat16().float()


def smallest_gap(scores: torch.Tensor, kept: int) -> float:
    """How far the last kept score is from the first one left out, in the closest row."""
    top = scores.topk(kept + 1).values
    return (top[..., kept - 1] - top[..., kept]).min().item()


@torch.no_grad()
def reference(model: PreTrainedModel, seed: int) -> dict[str, np.ndarray] | None:
    """The contents of expected.npz; None where rounding could change a choice, of a token or an expert."""
    draw = np.random.default_rng(seed).integers(3, VOCAB, PROMPT)
    draw[0], draw[1] = model.config.bos_token_id, VOCAB - 1  # the last row of the embedding counts too
    tokens = draw.tolist()
    for _ in range(GENERATED):
        tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())

    router_gaps: list[float] = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda m, _, out: router_gaps.append(smallest_gap(out[0], m.top_k)))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]

    deciding, generated = logits[PROMPT - 1 : -1], tokens[PROMPT:]
    if min([smallest_gap(deciding, 1), *router_gaps]) < MARGIN:
        return None
    if np.isin(generated, model.config.eos_token_id).any() or len(set(generated)) < GENERATED // 2:
        return None  # it ends early, or repeats itself and so tests little
    ids = {"prompt": np.array(tokens[:PROMPT], np.int32), "generated": np.array(generated, np.int32)}
    return ids | {"logits": logits[:PROMPT].numpy(), "decode_logits": deciding.numpy()}


def publish(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Respell a config of transformers 5 as published checkpoints do."""
    config = dict(config)
    spec = dict(config.pop("rope_parameters"))
    if "rope_theta" in spec:  # Gemma 3 nests one set per kind of layer; its `extra` has them all
        config["rope_theta"] = spec.pop("rope_theta")
        if (partial := spec.pop("partial_rotary_factor", 1.0)) != 1.0:
            config["partial_rotary_factor"] = partial
        if spec["rope_type"] == "longrope":  # named by the older key, with the length outside
            spec["type"] = spec.pop("rope_type")
            config["original_max_position_embeddings"] = spec.pop("original_max_position_embeddings")
        config["rope_scaling"] = None if spec.get("rope_type") == "default" else spec
    config["torch_dtype"] = config.pop("dtype")
    for name in ("layer_types", "head_dim", "_sliding_window_pattern", "transformers_version"):
        config.pop(name, None)
    return dict(sorted((config | extra).items()))


@torch.no_grad()
def hidden(folder: Path, prompt: np.ndarray) -> np.ndarray:
    """The contents of hidden.npy, of the checkpoint in a folder."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model(torch.tensor(prompt[None]), use_cache=False).last_hidden_state[0].numpy()


def make(name: str, folder: Path) -> None:
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type, rope_parameters=family.rope_parameters, **COMMON | family.settings)
    for seed in range(100):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        randomize(model, seed)
        expected = reference(model, seed)
        if expected is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a robust greedy path")

    folder.mkdir(exist_ok=True)
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family.published is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(publish(json.loads(path.read_text()), family.published), indent=2) + "\n")
    np.savez_compressed(folder / "expected.npz", **expected)

    # What was written must mean what was computed, in either spelling of config.json.
    reloaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokens = np.concatenate([expected["prompt"], expected["generated"]])
    with torch.no_grad():
        logits = reloaded(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()
    np.testing.assert_array_equal(logits[:PROMPT], expected["logits"])
    np.testing.assert_array_equal(logits[PROMPT - 1 : -1], expected["decode_logits"])

    if name in WITH_HIDDEN:
        np.save(folder / "hidden.npy", hidden(folder, expected["prompt"]))

    size, spread = sum(path.stat().st_size for path in folder.iterdir()) / 1000, expected["logits"].std()
    print(f"{name:17} seed {seed:3}  {size:5.0f} kB  logits std {spread:.2f}  {expected['generated'].tolist()}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # one order of summation, whatever the machine
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for chosen in sys.argv[1:] or FAMILIES:
        make(chosen, Path(__file__).parent / chosen)
