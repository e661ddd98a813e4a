"""The engine's own programs on the devices of this process, with noise for weights, and how long their steps take."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import num_cores
from ryzanstein_jax.batch import Bucket, RowLayout
from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.plan import ROW, StepPlan
from ryzanstein_jax.planner.compile_gpu import bucket_of, step_programs
from ryzanstein_jax.planner.compiled import Job
from ryzanstein_jax.planner.usage import pages
from ryzanstein_jax.program_table import ProgramTable
from ryzanstein_jax.sharding import make_mesh
from ryzanstein_jax.step import Params, StepPrograms

#: Measurements of one thing; their median counts.
ROUNDS = 3


def open_programs(config: dict[str, Any], jobs: Sequence[Job]) -> StepPrograms:
    """Compiles what greedy requests run on one device."""
    programs = step_programs(spec_from_config(config), jobs, make_mesh(1))
    buckets = dict.fromkeys(bucket_of(job) for job in jobs)
    lowered: list[tuple[ProgramTable, Any, jax.stages.Lowered]] = []
    lowered += [(programs.forwards, bucket, programs.lower_forward(bucket)) for bucket in buckets]
    for rows in {bucket.sampled_rows for bucket in buckets}:
        lowered.append((programs.samplers, rows, programs.lower_sample(rows)))
    with ThreadPoolExecutor(num_cores()) as pool:
        for (table, size, _), compiled in zip(lowered, pool.map(lambda one: one[2].compile(), lowered), strict=True):
            table[size] = compiled
    return programs


def noise(programs: StepPrograms) -> dict[str, jax.Array]:
    """Random weights by path: parts of one long array, so that there is next to nothing to compile.

    They compute nothing meaningful, but no zeros either, which a GPU multiplies faster than other numbers.
    """
    longest = max(math.prod(shape.shape) for shape in programs.param_shapes)
    values = 0.02 * jax.random.normal(jax.random.key(0), (longest,), programs.dtype)
    found = {}
    for path, shape in zip(programs.param_paths, programs.param_shapes, strict=True):
        part = jax.lax.slice(values, (0,), (math.prod(shape.shape),)).reshape(shape.shape).astype(shape.dtype)
        # A copy of its own: what shares memory would be read from the caches.
        found[path] = jax.device_put(part + 1 if path.endswith("norm.scale") else part + 0, shape.sharding)
    jax.block_until_ready(found)
    return found


def in_order(programs: StepPrograms, values: dict[str, jax.Array]) -> Params:
    """Of these arrays those that the programs take, in their order: a model of fewer layers takes fewer."""
    return tuple(values[path] for path in programs.param_paths)


def _rows(tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    rows = np.zeros(len(tokens), ROW)
    rows["token"], rows["seq"], rows["position"] = tokens, np.arange(len(tokens)), positions
    rows["top_p"] = rows["repetition_penalty"] = 1.0
    rows["target"] = -1
    return rows


def _tables(count: int, length: int, page_size: int) -> np.ndarray:
    """Pages of the sequences, in no order, as in an engine that has run for a while."""
    each = pages(length, page_size)
    return np.random.default_rng(0).permutation(np.arange(1, 1 + count * each)).reshape(count, each).astype(np.int32)


def decode_plan(count: int, context: int, vocab: int, page_size: int) -> StepPlan:
    """A step in which so many sequences get the token after `context` - 1 others."""
    tokens = np.random.default_rng(1).integers(0, vocab, count).astype(np.int32)
    positions = np.full(count, context - 1, np.int32)
    rows = _rows(range(count), [context] * count)
    return StepPlan(0, count, tokens, positions, np.ones(count, np.int32), _tables(count, context, page_size), rows)


def prefill_plan(count: int, length: int, vocab: int, page_size: int) -> StepPlan:
    """A step with so many whole prompts of that length."""
    tokens = np.random.default_rng(1).integers(0, vocab, count * length).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), count)
    rows = _rows([length * (i + 1) - 1 for i in range(count)], [length] * count)
    lens = np.full(count, length, np.int32)
    return StepPlan(0, 0, tokens, positions, lens, _tables(count, length, page_size), rows)


def plan_of(job: Job, vocab: int, *, context: int = 0, prompts: int = 1) -> StepPlan:
    """A plan that fills a job: decodes at this context, or that many prompts of equal length."""
    if job.decodes:
        return decode_plan(job.decodes, context, vocab, job.page_size)
    return prefill_plan(prompts, job.prefill // prompts, vocab, job.page_size)


class ForwardLoop:
    """One compiled forward, again and again on the same plan: the device's time, with the host out of the way."""

    def __init__(self, programs: StepPrograms, bucket: Bucket, plan: StepPlan, params: Params):
        self._forward, self._params = programs.forwards[bucket], params
        self._flat = jax.device_put(programs.shapes.layout(bucket).pack(plan), programs.replicated)
        self._previous = jax.device_put(np.zeros(programs.shapes.max_rows, np.int32), programs.replicated)
        self._cache = programs.make_cache()

    def run(self, steps: int) -> jax.Array:
        """Logits of the last of so many steps, which are waited for."""
        for _ in range(steps):
            logits, self._cache, _ = self._forward(self._params, self._cache, self._flat, self._previous)
        return jax.block_until_ready(logits)

    def check(self) -> None:
        """Raises ValueError: the logits are not all finite."""
        if not bool(jnp.isfinite(self.run(1)).all()):
            raise ValueError("a logit is no number")

    def close(self) -> None:
        """Gives the cache's memory back."""
        for array in jax.tree.leaves(self._cache):
            array.delete()


def sampler_loop(programs: StepPrograms, rows: int) -> Callable[[int], object]:
    """The greedy sampler of so many rows, again and again on the same random logits."""
    shape = jax.ShapeDtypeStruct((rows, programs.sizes.vocab), jnp.float32)
    logits = jax.device_put(jax.random.normal(jax.random.key(1), shape.shape), programs.replicated)
    flat = jax.device_put(RowLayout(rows).empty()[0], programs.replicated)
    sampler = programs.samplers[rows]

    def run(steps: int) -> object:
        return jax.block_until_ready([sampler(logits, flat) for _ in range(steps)][-1])

    return run


def runner_loop(runner: Runner, plan: StepPlan) -> Callable[[int], object]:
    """Steps as the engine takes them, each dispatched before the tokens of the last are read."""

    def run(steps: int) -> object:
        waiting: deque[None] = deque()
        result = None
        for _ in range(steps):
            runner.submit(plan)
            waiting.append(None)
            if len(waiting) > 1:
                waiting.popleft()
                result = runner.collect()
        while waiting:
            waiting.popleft()
            result = runner.collect()
        return result

    return run


def seconds_each(run: Callable[[int], object], steps: int) -> float:
    """Of one of so many steps: the median of `ROUNDS`, after one that does not count."""
    run(min(steps, 3))
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run(steps)
        taken.append((time.perf_counter() - began) / steps)
    return statistics.median(taken)
