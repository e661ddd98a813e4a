"""This package's side of the benchmarks."""

from __future__ import annotations

import time
from importlib.metadata import version
from platform import python_version
from typing import Any

from bench.protocol import peak_memory_bytes, serve
from ryzanstein_jax import LLM, SamplingParams

_SPANS = ("step_pack_seconds", "step_dispatch_seconds", "step_fetch_seconds")


class OurWorker:
    """Handlers of the calls."""

    def start(self, model: str, **settings: Any) -> dict[str, Any]:
        """Loads a model; `settings` are fields of `EngineConfig`."""
        self._llm = LLM(model, progress=False, **settings)
        return {}

    def describe(self) -> dict[str, Any]:
        report = self._llm.report
        memory = report.memory
        return {
            "versions": {
                "python": python_version(),
                **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
            },
            "device": report.device,
            "dtype": report.dtype,
            "weight_bytes": memory.weights,
            "kv_bytes_per_token": memory.page_bytes / memory.page_size,
            "num_pages": memory.num_pages,
            "cache_tokens": memory.num_tokens,
        }

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Greedy completions of exactly `max_tokens`; seconds, and mean seconds of each part of a step."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        before = self._llm.metrics.snapshot()["histograms"]
        began = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        after = self._llm.metrics.snapshot()["histograms"]
        first = outputs[0].timings.time_to_first_token
        spans = {}
        for name in _SPANS:
            count, total = (after[name][key] - (before[name][key] if name in before else 0) for key in ("count", "sum"))
            spans[name] = total / max(count, 1)
        return {
            "tokens": [output.outputs[0].token_ids for output in outputs],
            "seconds": seconds,
            "first_token_seconds": first,
            "spans": spans,
        }

    def score(self, text: str, count: int, length: int) -> dict[str, Any]:
        """Of `count` windows of a text, `length` tokens each: every token's loss and the most likely one before it."""
        tokenizer = self._llm.tokenizer
        # A toy model brings none: then bytes are tokens, which only shows that this runs.
        ids = list(text.encode()) if tokenizer is None else list(tokenizer.encode(text))
        step = (len(ids) - length) // max(1, count - 1)
        prompts = [ids[index * step : index * step + length] for index in range(count)]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": window} for window in prompts], params, use_tqdm=False)
        losses, best = [], []
        for window, output in zip(prompts, outputs, strict=True):
            assert output.prompt_logprobs is not None
            for token, found in zip(window[1:], output.prompt_logprobs[1:], strict=True):
                assert found is not None
                losses.append(-found[token].logprob)
                best.append(max(found, key=lambda one: found[one].logprob))
        return {"losses": losses, "best": best}

    def peak_memory(self) -> dict[str, Any]:
        return {"bytes": peak_memory_bytes()}


if __name__ == "__main__":
    worker = OurWorker()
    serve({name: getattr(worker, name) for name in ("start", "describe", "generate", "score", "peak_memory")})
