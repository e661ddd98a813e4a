"""Plan -> devices -> result: runs the compiled step, always one step ahead of its reader."""

from __future__ import annotations

from collections import Counter, deque

import jax
import numpy as np

from ryzanstein_jax.batch import Bucket, FullRowLayout, RowLayout, StepLayout
from ryzanstein_jax.engine.executor import ExecutorLimits
from ryzanstein_jax.errors import EngineClosedError
from ryzanstein_jax.plan import StepPlan, StepResult
from ryzanstein_jax.sampling import SampleResult
from ryzanstein_jax.step import Params, StepPrograms


class Runner:
    """One rank's share of an executor: compiled programs, weights, cache, and the steps in flight.

    Args:
        programs: compiled for every bucket.
        params: in the order of `programs.param_paths`.
        max_model_len: longest sequence, in tokens.
    """

    def __init__(self, programs: StepPrograms, params: Params, *, max_model_len: int):
        self._programs, self._params = programs, params
        self._metrics = programs.metrics
        shapes = programs.shapes
        self._cache = programs.make_cache()
        self._previous: jax.Array | np.ndarray = np.zeros(shapes.max_rows, np.int32)
        self._layouts: dict[Bucket, StepLayout] = {bucket: shapes.layout(bucket) for bucket in shapes.buckets}
        rows = {bucket.sampled_rows for bucket in shapes.buckets}
        self._row_layouts: dict[int, RowLayout] = {count: RowLayout(count) for count in rows}
        self._full_layouts: dict[int, FullRowLayout] = {count: shapes.full_layout(count) for count in rows}
        self._allow_all = {
            count: programs.replicate(np.full((count, programs.mask_words), 0xFFFFFFFF, np.uint32)) for count in rows
        }
        self._in_flight: deque[tuple[StepPlan, jax.Array, SampleResult | None, jax.Array]] = deque()
        #: How often each program ran, by its table and size.
        self.runs: Counter[tuple[str, object]] = Counter()
        self.limits = ExecutorLimits(
            num_pages=shapes.num_pages,
            page_size=shapes.page_size,
            max_model_len=max_model_len,
            max_num_seqs=max(bucket.decodes for bucket in shapes.buckets),
            max_prefill_tokens=max(bucket.prefill_tokens for bucket in shapes.buckets),
            max_prefills=max(bucket.prefills for bucket in shapes.buckets),
            max_rows=shapes.max_rows,
            vocab_size=programs.spec.vocab_size,
        )

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, plan: StepPlan) -> None:
        """Dispatches a step and returns while it runs."""
        programs = self._programs
        bucket = programs.bucket_of(plan)
        with self._metrics.span("step_pack_seconds"):
            flat = self._layouts[bucket].pack(plan)
        with self._metrics.span("step_dispatch_seconds"):
            logits, self._cache, pooled = programs.forwards[bucket](self._params, self._cache, flat, self._previous)
            result = None
            if plan.full:
                rows = self._full_layouts[bucket.sampled_rows].pack(plan)
                tokens, result = programs.full_samplers[bucket.sampled_rows](
                    logits, rows, self._cache.tokens, self._mask(plan, bucket.sampled_rows)
                )
            else:
                tokens = programs.samplers[bucket.sampled_rows](
                    logits, self._row_layouts[bucket.sampled_rows].pack(plan)
                )
            for array in (tokens, *(result or ()), *([pooled] if len(plan.pools) else [])):
                array.copy_to_host_async()
        self._previous = tokens
        self._in_flight.append((plan, tokens, result, pooled))
        self.runs["forwards", bucket] += 1
        self.runs["full_samplers" if plan.full else "samplers", bucket.sampled_rows] += 1
        self._metrics.count("steps")
        self._metrics.count("step_tokens", len(plan.token_ids))
        self._metrics.count("step_tokens_padded", bucket.tokens)

    def collect(self) -> StepResult:
        """Waits for the oldest step in flight.

        Raises:
            EngineClosedError: no step is in flight.
        """
        if not self._in_flight:
            raise EngineClosedError("no step is in flight")
        plan, tokens, result, pooled = self._in_flight[0]
        with self._metrics.span("step_fetch_seconds"):
            count = len(plan.rows)
            sums = {"pooled": np.asarray(pooled)[: len(plan.pools)]} if len(plan.pools) else {}
            step_result = StepResult(plan.step, np.asarray(tokens)[:count], **sums)
            if result is not None and plan.num_logprobs >= 0:
                wanted = plan.num_logprobs
                step_result = StepResult(
                    plan.step,
                    np.asarray(result.tokens)[:count],
                    np.asarray(result.logprobs)[:count],
                    np.asarray(result.ranks)[:count],
                    np.ascontiguousarray(np.asarray(result.top_tokens)[:count, :wanted]),
                    np.ascontiguousarray(np.asarray(result.top_logprobs)[:count, :wanted]),
                    **sums,
                )
        self._in_flight.popleft()
        return step_result

    def _mask(self, plan: StepPlan, rows: int) -> jax.Array | np.ndarray:
        if not len(plan.mask):
            return self._allow_all[rows]
        mask = np.full((rows, self._programs.mask_words), 0xFFFFFFFF, np.uint32)
        mask[: len(plan.mask)] = plan.mask
        return mask

    def arrays(self) -> list[jax.Array]:
        """Weights and cache; steps put other arrays in the place of the cache's, in the same memory."""
        return jax.tree.leaves((self._cache, self._params))

    def close(self) -> None:
        """Waits for what is in flight and lets go of the devices' memory."""
        jax.block_until_ready([tokens for _, tokens, *_ in self._in_flight])
        self._in_flight.clear()
        for array in self.arrays():
            if not array.is_deleted():
                array.delete()
        self._params = ()
