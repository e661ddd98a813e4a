"""Drives the joined engine in tests: golden models, a forward fed by hand, small executors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from ryzanstein_jax import attention, batch, native
from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.checkpoint.assemble import load_params
from ryzanstein_jax.checkpoint.files import open_source, resolve_model
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.local import LocalExecutor
from ryzanstein_jax.engine.open import open_model
from ryzanstein_jax.kv_cache import KVCache
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.plan import ROW, StepPlan
from ryzanstein_jax.request import RequestOutput, SamplingParams
from ryzanstein_jax.sharding import PaddedSizes, make_mesh
from ryzanstein_jax.step import Params, StepPrograms, StepShapes

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").is_file())
WIDTHS = (1, 2, 3, 4, 8)


def golden_spec(family: str) -> ModelSpec:
    """For sequences of at most 64 tokens: what Phi-3's longrope goes by, and no golden sequence is longer."""
    return spec_from_config(resolve_model(str(GOLDEN / family)).config, max_model_len=64)


def golden_expected(family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32 [56] of prompt and completion, logits float32 [55, V] at all but the last, prompt int32 [40]."""
    with np.load(GOLDEN / family / "expected.npz") as stored:
        tokens = np.concatenate([stored["prompt"], stored["generated"]])
        return tokens, np.concatenate([stored["logits"], stored["decode_logits"][1:]]), stored["prompt"]


def is_running(process: psutil.Process) -> bool:
    """Not so a zombie: it holds nothing but its number, until the system's first process gets round to asking."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def kernels(setting: str) -> Iterator[None]:
    """With `$RYZANSTEIN_KERNELS` set so; layers that were traced otherwise are traced again."""
    jax.clear_caches()
    with patch.dict(os.environ, {native.KERNELS_VARIABLE: setting}):
        yield
    jax.clear_caches()


@contextmanager
def small_blocks(tile: int, block: int) -> Iterator[None]:
    """Tiles and blocks so small that short sequences have several; programs keep what they were traced with."""
    before = attention.TILE, attention.BLOCK
    attention.TILE, attention.BLOCK, batch.TILE = tile, block, tile
    try:
        yield
    finally:
        (attention.TILE, attention.BLOCK), batch.TILE = before, before[0]


def make_programs(
    spec: ModelSpec,
    width: int,
    *buckets: Bucket,
    num_pages: int = 64,
    page_size: int = 4,
    table_width: int = 16,
    dtype: str = "float32",
    sharding: str = "megatron",
    kv_cache_dtype: str = "auto",
) -> StepPrograms:
    shapes = StepShapes(
        buckets, num_pages, page_size, table_width, num_logprobs=5, max_bias=64, kv_cache_dtype=kv_cache_dtype
    )
    return StepPrograms(spec, PaddedSizes.of(spec, width, sharding), jnp.dtype(dtype), make_mesh(width), shapes)


def load(programs: StepPrograms, model: Path) -> Params:
    """The model's weights, in the order that the programs take them."""
    source = open_source(resolve_model(str(model)))
    arrays, _ = load_params(source, programs.spec, programs.sizes, programs.param_specs, programs.mesh)
    return tuple(arrays[path] for path in programs.param_paths)


def make_plan(
    decodes: Sequence[tuple[np.ndarray, Sequence[int], int]],
    prefills: Sequence[tuple[np.ndarray, Sequence[int], int, int]] = (),
    *,
    step: int = 0,
) -> StepPlan:
    """A plan whose rows are all its tokens, in order.

    Args:
        decodes: (tokens of a sequence, its pages, position) each.
        prefills: (tokens of a sequence, its pages, first position, end) each.
    """
    parts = [(tokens, pages, position, position + 1) for tokens, pages, position in decodes] + list(prefills)
    lens = np.array([end - begin for _, _, begin, end in parts], np.int32)
    tables = np.zeros((len(parts), max(len(pages) for _, pages, _, _ in parts)), np.int32)
    for row, (_, pages, _, _) in enumerate(parts):
        tables[row, : len(pages)] = pages
    rows = np.zeros(int(lens.sum()), ROW)
    rows["token"] = np.arange(len(rows))
    rows["seq"] = np.repeat(np.arange(len(parts)), lens)
    rows["top_p"] = rows["repetition_penalty"] = 1.0
    rows["target"] = -1
    positions = np.concatenate([np.arange(begin, end) for _, _, begin, end in parts]).astype(np.int32)
    rows["position"] = positions + 1
    return StepPlan(
        step=step,
        num_decodes=len(decodes),
        token_ids=np.concatenate([tokens[begin:end] for tokens, _, begin, end in parts]).astype(np.int32),
        positions=positions,
        query_lens=lens,
        page_tables=tables,
        rows=rows,
    )


#: The same program and half the time to compile: LLVM leaves out optimizations that tiny models do not need.
QUICK = {"xla_backend_optimization_level": 0}


class Forward:
    """One compiled bucket, its weights and its cache: plans in, logits out."""

    def __init__(self, programs: StepPrograms, params: Params):
        (self.bucket,) = programs.shapes.buckets
        self.layout = programs.shapes.layout(self.bucket)
        if self.bucket not in programs.forwards:
            programs.forwards[self.bucket] = programs.lower_forward(self.bucket).compile(compiler_options=QUICK)
        self.compiled = programs.forwards[self.bucket]
        self.params, self.vocab_size = params, programs.spec.vocab_size
        self.cache = KVCache.zeros(programs.cache_shapes)
        self.previous = np.zeros(programs.shapes.max_rows, np.int32)

    def __call__(self, plan: StepPlan) -> np.ndarray:
        """Logits float32 [R, V] of the plan's rows."""
        assert self.bucket.holds(plan)
        logits, self.cache, _ = self.compiled(self.params, self.cache, self.layout.pack(plan), self.previous)
        return np.asarray(logits)[: len(plan.rows), : self.vocab_size]


def golden_logits(programs: StepPrograms, family: str, chunks: Sequence[int] = (40,)) -> np.ndarray:
    """Of the golden prompt, whose 40 tokens come in such chunks, and of the next token: float32 [41, V]."""
    tokens, _, _ = golden_expected(family)
    forward, pages = Forward(programs, load(programs, GOLDEN / family)), list(range(1, 15))
    ends = np.cumsum(chunks)
    plans = [make_plan([], [(tokens, pages, end - size, end)]) for end, size in zip(ends, chunks, strict=True)]
    return np.concatenate([forward(plan) for plan in (*plans, make_plan([(tokens, pages, 40)]))])


def open_engine(model: str | Path, **settings: Any) -> tuple[Engine, LocalExecutor]:
    """An engine without a tokenizer on an executor with the smallest ladder, unless the settings say more."""
    defaults: dict[str, Any] = dict(max_num_seqs=2, max_num_batched_tokens=16, compilation_cache_dir="")
    config = EngineConfig(str(model), **{**defaults, **settings})
    opened = open_model(config)
    executor = LocalExecutor(config, opened.files, opened.spec)
    return Engine(executor, eos_token_ids=opened.eos_token_ids, config=config), executor


def serve(engine: Engine, requests: dict[str, tuple[Sequence[int], SamplingParams]]) -> dict[str, RequestOutput]:
    """Runs requests to their ends, all added at once; raises what a request ended with."""
    for name, (prompt, params) in requests.items():
        engine.add(name, prompt, params)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.error is not None:
                raise output.error
            outputs[output.request_id] = output
    return outputs


def tokens_of(outputs: dict[str, RequestOutput]) -> dict[str, list[list[int]]]:
    return {name: [completion.token_ids for completion in output.outputs] for name, output in outputs.items()}


@contextmanager
def quick_compiles() -> Iterator[None]:
    """As `QUICK`, for all that is compiled inside the block, in whatever thread."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextmanager
def counted_compiles() -> Iterator[Callable[[], int]]:
    """Counts what JAX traces or compiles inside the block, whoever asks for it."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **more: str | int) -> None:
        if "/compile/" in event or "trace_duration" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(events)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
