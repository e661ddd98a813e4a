"""Hugging Face transformers' side of the benchmarks, as its users run it: `generate` on a left-padded batch.

Runs under any interpreter that has torch and transformers; needs nothing of this package.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from bench.protocol import peak_memory_bytes, serve


class _FirstToken(BaseStreamer):
    """Notes when the first new token came; `generate` hands over the prompt before it."""

    def __init__(self) -> None:
        self.calls, self.time = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.time = time.perf_counter()

    def end(self) -> None:
        pass


class HfWorker:
    """Handlers of the calls."""

    @torch.inference_mode()
    def start(self, model: str, dtype: str) -> dict[str, Any]:
        """Loads a folder of config.json and safetensors."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(self._device).eval()
        self._model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
        return {}

    def describe(self) -> dict[str, Any]:
        return {"versions": {name: version(name) for name in ("torch", "transformers")}, "device": self._device}

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Greedy completions of exactly `max_tokens`, and seconds."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        streamer = _FirstToken() if len(prompts) == 1 else None
        began = time.perf_counter()
        out = self._model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, streamer=streamer)
        tokens = out[:, width:].tolist()
        seconds = time.perf_counter() - began
        return {
            "tokens": tokens,
            "seconds": seconds,
            "first_token_seconds": streamer.time - began if streamer else None,
        }

    @torch.inference_mode()
    def margin(self, prompt: list[int], one: int, other: int) -> dict[str, Any]:
        """How far apart the logits of two next tokens are."""
        logits = self._model(torch.tensor([prompt], device=self._device)).logits[0, -1].float()
        return {"logits": abs(float(logits[one] - logits[other]))}

    def peak_memory(self) -> dict[str, Any]:
        return {"bytes": peak_memory_bytes()}


if __name__ == "__main__":
    worker = HfWorker()
    serve({name: getattr(worker, name) for name in ("start", "describe", "generate", "margin", "peak_memory")})
