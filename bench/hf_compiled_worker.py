"""Transformers at its best on one GPU: static cache and `torch.compile`, on random weights.

Runs under any interpreter that has torch and transformers; needs nothing of this package.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bench.hf_worker import HfWorker
from bench.protocol import serve

_ROUNDS = 3


class HfCompiledWorker(HfWorker):
    """Handlers of the calls."""

    @torch.inference_mode()
    def start(self, config: dict[str, Any], dtype: str, device: str) -> dict[str, Any]:  # type: ignore[override]
        """Makes a model of this `config.json` on "cuda" or "cpu"."""
        self._device = device
        known = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
        with torch.device(self._device):
            self._model = AutoModelForCausalLM.from_config(known, dtype=getattr(torch, dtype)).eval()
        self._model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
        self._vocab = known.vocab_size
        return {}

    def _ids(self, count: int, length: int) -> torch.Tensor:
        return torch.randint(0, self._vocab, (count, length), device=self._device)

    def _seconds(self, run: Callable[[], object]) -> float:
        """Of a run: the median, after two that compile and capture."""
        taken = []
        for number in range(2 + _ROUNDS):
            began = time.perf_counter()
            run()
            if self._device == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def _generate(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        """Greedy tokens, with the static cache, whose steps transformers compiles by itself on a GPU."""
        with torch.inference_mode():
            out: torch.Tensor = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                cache_implementation="static",
            )  # fmt: skip
        assert out.shape[1] == ids.shape[1] + tokens
        return out

    def decode(self, count: int, context: int, steps: int) -> dict[str, Any]:
        """Seconds of a decode step of so many sequences: what that many more tokens took."""
        ids = self._ids(count, max(1, context - steps))
        long = self._seconds(lambda: self._generate(ids, steps + 1))
        # Of one token only the prompt is computed.
        short = self._seconds(lambda: self._generate(ids, 1))
        step = (long - short) / steps
        return {"step_seconds": step, "tokens_per_s": count / step}

    def prefill(self, prompts: int, length: int) -> dict[str, Any]:
        """Seconds of a forward over whole prompts, logits of the last tokens only."""
        ids = self._ids(prompts, length)

        def run() -> object:
            with torch.inference_mode():
                return self._model(ids, use_cache=True, logits_to_keep=1).logits

        seconds = self._seconds(run)
        return {"forward_seconds": seconds, "tokens_per_s": prompts * length / seconds}

    def first_token(self, length: int) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        ids = self._ids(1, length)
        return {"step_seconds": self._seconds(lambda: self._generate(ids, 1))}


if __name__ == "__main__":
    worker = HfCompiledWorker()
    serve({name: getattr(worker, name) for name in ("start", "describe", "decode", "prefill", "first_token")})
