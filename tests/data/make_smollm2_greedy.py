"""Make smollm2_greedy.json: what transformers answers with the weights of the default model.

    python tests/data/make_smollm2_greedy.py

The GGUF's weights, dequantized to float32 through our own reader, go into transformers' LlamaForCausalLM (float32, no
cache, CPU). Prompts are tokenized by our tokenizer. A prompt is kept only if along the whole continuation the first
choice leads the second by at least MARGIN in its logit, so that no order of summation changes a token.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ryzanstein_jax.checkpoint.default_model import default_model_path
from ryzanstein_jax.checkpoint.gguf import GgufSource
from ryzanstein_jax.checkpoint.gguf_config import hf_config
from ryzanstein_jax.checkpoint.source import whole
from ryzanstein_jax.engine.tokens import Tokenizer

PROMPTS, NEW_TOKENS, MARGIN = 10, 32, 0.02
CANDIDATES = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "The three primary colors are red,",
    "Photosynthesis is the process by which plants",
    "1, 2, 3, 4, 5, 6,",
    "In 1969, Neil Armstrong became the first",
    "The opposite of hot is",
    "import numpy as np\n\ndef mean(values):",
    "Roses are red, violets are",
    "A haiku about the autumn wind:\n",
    "The largest planet of the solar system is",
    "To make bread you need flour, water,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The derivative of x squared is",
    "Shakespeare wrote the plays Hamlet,",
    "<html>\n<head>\n<title>",
    "SELECT name, age FROM users WHERE",
    "The mitochondria is the",
    "\u00c9t\u00e9 comme hiver, le caf\u00e9",
    "Monday, Tuesday, Wednesday,",
    "The Pythagorean theorem states that",
    "Question: What is the speed of light?\nAnswer:",
)


def load(path: Path) -> LlamaForCausalLM:
    source = GgufSource(path)
    model = LlamaForCausalLM._from_config(LlamaConfig(**hf_config(source)), attn_implementation="eager")
    tensors = {}
    for name in source.names():
        values = source.read(name, whole(source.info(name).shape))
        tensors[name] = torch.tensor(values.astype("float32"))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.float().eval()


@torch.no_grad()
def main() -> None:
    path = default_model_path(progress=False)
    model, tokenizer = load(path), Tokenizer.from_gguf(path)
    kept = []
    for prompt in CANDIDATES:
        ids = tokenizer.encode(prompt)
        tokens, margin = list(ids), float("inf")
        for _ in range(NEW_TOKENS):
            top = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
            margin = min(margin, (top.values[0] - top.values[1]).item())
            if margin < MARGIN:
                break
            tokens.append(top.indices[0].item())
        print(f"{'keep' if margin >= MARGIN else 'drop'} margin {margin:.4f}  {prompt!r}")
        if margin >= MARGIN:
            kept.append(
                {"prompt": prompt, "prompt_token_ids": ids, "token_ids": tokens[len(ids) :], "margin": round(margin, 4)}
            )
        if len(kept) == PROMPTS:
            break
    assert len(kept) == PROMPTS, f"only {len(kept)} prompts have a margin of {MARGIN}"
    lines = ",\n".join(json.dumps(entry) for entry in kept)
    (Path(__file__).parent / "smollm2_greedy.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
