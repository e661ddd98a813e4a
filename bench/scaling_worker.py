"""One engine of the scaling benchmark, its devices in processes of their own, and the products of one core."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from bench.our_worker import OurWorker
from bench.protocol import serve
from ryzanstein_jax import LLM, SamplingParams
from ryzanstein_jax.batch import bucket_ladder
from ryzanstein_jax.plan import StepPlan, StepResult, most_prompt_tokens

#: The benchmark stops the processes of an engine while another one is measured: nobody may take them for hung.
PATIENT = {"heartbeat_timeout_sec": 1e5, "health_check_interval_sec": 1e5}


class ScalingWorker(OurWorker):
    """Handlers of the calls."""

    def start(self, model: str, **settings: Any) -> dict[str, Any]:
        """Loads a model onto worker processes; `settings` are fields of `EngineConfig`, with lengths and batches."""
        self._llm = LLM(model, progress=False, executor="processes", orchestrator=PATIENT, **settings)
        sequences = settings["max_num_seqs"]
        prompt_tokens = most_prompt_tokens(settings["max_num_batched_tokens"], sequences, settings["max_model_len"])
        self._buckets = bucket_ladder(sequences, prompt_tokens)
        self._programs = self._llm.collectives()
        self._watch()
        return {}

    def _watch(self) -> None:
        """Has the executor note when each step was handed over and when its tokens were there."""
        executor: Any = self._llm.orchestrator
        submit, collect = executor.submit, executor.collect
        self._submitted: list[tuple[float, StepPlan]] = []
        self._ended: list[float] = []

        def noting_submit(plan: StepPlan) -> None:
            self._submitted.append((time.perf_counter(), plan))
            submit(plan)

        def noting_collect() -> StepResult:
            result: StepResult = collect()
            self._ended.append(time.perf_counter())
            return result

        executor.submit, executor.collect = noting_submit, noting_collect

    def steps_of(self, prompts: list[list[int]], max_tokens: list[int]) -> dict[str, Any]:
        """Greedy completions of exactly so many tokens each, and the steps that they took.

        Of each step: the sizes of the program that ran it (`decodes`, `prefill`), what was asked of it (`asked_*`),
        mean `context` of its decodes, tokens `before` its first prompt chunk, `seconds` from its beginning (or the
        end of the one before it) to its tokens, and `collectives`: kind, bytes of a result, group and count of each.
        """
        self._submitted.clear()
        self._ended.clear()
        params = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False) for tokens in max_tokens
        ]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        steps, before = [], 0.0
        for (began, plan), ended in zip(self._submitted, self._ended, strict=True):
            steps.append({**self._step(plan), "seconds": ended - max(began, before)})
            before = ended
        return {"tokens": [output.outputs[0].token_ids for output in outputs], "steps": steps}

    def _step(self, plan: StepPlan) -> dict[str, Any]:
        bucket = next(bucket for bucket in self._buckets if bucket.holds(plan))
        programs = f"forward, {bucket}", f"sample, {bucket.sampled_rows} rows"
        decodes = plan.num_decodes
        return {
            "decodes": bucket.decodes if decodes else 0,
            "prefill": bucket.prefill_tokens,
            "asked_decodes": decodes,
            "asked_prefill": plan.num_prefill_tokens,
            "context": float(plan.positions[:decodes].mean()) + 1 if decodes else 0.0,
            "before": int(plan.positions[decodes]) if plan.num_prefills else 0,
            "collectives": [dataclasses.astuple(one) for name in programs for one in self._programs[name]],
        }

    def products(self, dtype: str) -> dict[str, Any]:
        """Bandwidth and rates of matrix products of one device of this process."""
        import numpy as np

        from ryzanstein_jax.planner.calibrate import products
        from ryzanstein_jax.sharding import make_mesh

        bandwidth, rates = products(make_mesh(1), np.dtype(dtype))
        return {"bandwidth": bandwidth, "rates": rates}


if __name__ == "__main__":
    worker = ScalingWorker()
    serve({name: getattr(worker, name) for name in ("start", "describe", "steps_of", "products")})
