"""Stages of `bench.gpu` that look closer: right results, attention alone, shards, and a trace."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu_cases import LLAMA, PAGE_SIZE, Sizes, shard_config, shard_jobs, speed_jobs
from bench.gpu_programs import (
    ForwardLoop,
    decode_plan,
    in_order,
    noise,
    open_programs,
    plan_of,
    prefill_plan,
    sampler_loop,
    seconds_each,
)
from bench.gpu_trace import kernels_of
from bench.shards import predicted_speedups
from ryzanstein_jax import attention, paged_attention
from ryzanstein_jax.batch import Bucket, StepLayout, attention_plan
from ryzanstein_jax.checkpoint.assemble import load_params
from ryzanstein_jax.checkpoint.dummy import dummy_params
from ryzanstein_jax.checkpoint.files import open_source, resolve_model
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.planner.compile_gpu import bucket_of
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.sharding import PaddedSizes, make_mesh
from ryzanstein_jax.step import StepPrograms, StepShapes

Emit = Callable[[str, Any], None]
_TESTS = Path(__file__).resolve().parent.parent / "tests"
#: A model whose heads the kernel knows, computed by the processor too.
_SMALL = LLAMA | {
    "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


class WrongResultError(AssertionError):
    """A device computes something else than it should."""


# --- right results


def correct(request: Any, emit: Emit) -> None:
    """Logits of tiny models, and greedy tokens: those of transformers, and those of this machine's processor."""
    for family in request.sizes.families:
        emit(f"logits.{family}", {"largest_error": _largest_error(family)})
    ours, theirs = (_small_tokens(devices) for devices in (jax.devices()[:1], jax.devices("cpu")[:1]))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    emit("tokens_as_on_cpu", {"equal": same, "of": len(ours)})
    if same < len(ours):
        raise WrongResultError(f"only {same} of {len(ours)} completions are those of the processor")
    if request.model is None:
        emit("default_model", "left out: its file is not here")
        return
    reference = json.loads((_TESTS / "data" / "smollm2_greedy.json").read_text())
    files = resolve_model(request.model)
    found = _tokens(
        spec_from_config(files.config),
        lambda programs: load_params(
            open_source(files), programs.spec, programs.sizes, programs.param_specs, programs.mesh
        )[0],
        [entry["prompt_token_ids"] for entry in reference],
        len(reference[0]["token_ids"]),
        jax.devices()[:1],
    )
    same = sum(tokens == entry["token_ids"] for tokens, entry in zip(found, reference, strict=True))
    emit("default_model", {"equal": same, "of": len(reference)})
    if same < len(reference):
        raise WrongResultError(f"only {same} of {len(reference)} completions are those of transformers")


def _tokens(
    spec: ModelSpec, load: Callable[[StepPrograms], Any], prompts: list[list[int]], count: int, devices: list[Any]
) -> list[list[int]]:
    """Greedy completions of the engine in float32, all requests at once."""
    longest = max(map(len, prompts)) + count
    width = -(-longest // PAGE_SIZE)
    bucket = Bucket(len(prompts), 64, 8, len(prompts) + 8)
    shapes = StepShapes((bucket,), len(prompts) * width + 1, PAGE_SIZE, width, 0, 0)
    mesh = make_mesh(1, devices)
    programs = StepPrograms(spec, PaddedSizes.of(spec, 1), jnp.dtype("float32"), mesh, shapes)
    programs.forwards[bucket] = programs.lower_forward(bucket).compile()
    programs.samplers[bucket.sampled_rows] = programs.lower_sample(bucket.sampled_rows).compile()
    runner = Runner(programs, in_order(programs, load(programs)), max_model_len=longest)
    engine = Engine(runner, config=EngineConfig("none"))
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, params)
    found: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.error is not None:
                raise output.error
            found[output.request_id] = list(output.outputs[0].token_ids)
    engine.close()
    return [found[str(number)] for number in range(len(prompts))]


def _small_tokens(devices: list[Any]) -> list[list[int]]:
    spec = spec_from_config(_SMALL)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, spec.vocab_size, length).tolist() for length in (5, 40, 100, 17)]

    def draw(programs: StepPrograms) -> dict[str, jax.Array]:
        return dummy_params(programs.spec, programs.sizes, programs.param_specs, programs.mesh)

    return _tokens(spec, draw, prompts, 24, devices)


def _largest_error(family: str) -> float:
    """Of the logits of a golden prompt, computed in one chunk.

    Raises:
        WrongResultError: it is over 1e-3, ten times what the tests allow on a processor.
    """
    folder = _TESTS / "golden" / family
    files = resolve_model(str(folder))
    spec = spec_from_config(files.config, max_model_len=64)
    with np.load(folder / "expected.npz") as stored:
        prompt, wanted = stored["prompt"], stored["logits"]
    count = len(prompt)
    bucket = Bucket(0, count, 1, count)
    shapes = StepShapes((bucket,), 1 + -(-count // PAGE_SIZE), PAGE_SIZE, -(-count // PAGE_SIZE), 0, 0)
    programs = StepPrograms(spec, PaddedSizes.of(spec, 1), jnp.dtype("float32"), make_mesh(1), shapes)
    programs.forwards[bucket] = programs.lower_forward(bucket).compile()
    values, _ = load_params(open_source(files), spec, programs.sizes, programs.param_specs, programs.mesh)
    plan = prefill_plan(1, count, spec.vocab_size, PAGE_SIZE)
    rows = np.repeat(plan.rows, count)
    rows["token"] = np.arange(count)
    plan = replace(plan, token_ids=prompt.astype(np.int32), rows=rows)
    logits = ForwardLoop(programs, bucket, plan, in_order(programs, values)).run(1)
    error = float(np.abs(np.asarray(logits)[:count, : wanted.shape[1]] - wanted).max())
    if not error < 1e-3:
        raise WrongResultError(f"{family}: a logit is {error} off")
    return error


# --- attention alone


#: Layers of a measurement: each has keys and values of its own, so that none is still in the caches when its turn
#: comes, and few bytes take many layers, so that the host is quicker than the device.
_LAYERS = (4, 32)
_BYTES = 1 << 30
#: Other schedules of the kernel, by what is changed.
_SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "block_32": lambda s: replace(s, block=32),
    "block_128": lambda s: replace(s, block=128),
    "warps_8": lambda s: replace(s, warps=8),
    "warps_4": lambda s: replace(s, warps=4),
    "stages_2": lambda s: replace(s, stages=2),
    "stages_4": lambda s: replace(s, stages=4),
    "half_splits": lambda s: replace(s, splits=max(1, s.splits // 2)),
    "twice_splits": lambda s: replace(s, splits=s.splits * 2 if s.splits > 1 else 1),
}


def attention_alone(request: Any, emit: Emit) -> None:
    """The kernel beside the portable path at the sizes of real layers: how far apart, and how long each takes."""
    sizes: Sizes = request.sizes
    cases = []
    for case in sizes.attention:
        name = "x".join(map(str, case))
        run, operands, moved = _attention_case(case, sizes.dtype)
        wanted, portable = _timed(jax.jit(partial(run, by_kernel=False)), operands)
        found, seconds = _timed(jax.jit(partial(run, by_kernel=True)), operands)
        error = float(jnp.linalg.norm((found - wanted).ravel()) / jnp.linalg.norm(wanted.ravel()))
        result = {"error": error, "portable_seconds": portable, "kernel_seconds": seconds, "bytes": moved}
        if limit := request.limit("bytes_per_s"):
            result["share_of_bandwidth"] = moved / seconds / limit
        emit(name, result)
        if not error < (2e-2 if sizes.dtype == "bfloat16" else 1e-4):
            raise WrongResultError(f"{name}: the kernel's results are {error} of their size off")
        cases.append((name, run, operands))
    original = paged_attention.Schedule.of
    for change, other in _SCHEDULES.items() if sizes.schedules else ():
        for name, run, operands in cases:
            paged_attention.Schedule.of = lambda *a, other=other, **k: other(original(*a, **k))  # type: ignore[assignment]
            try:
                # A function of its own: what was traced before is not traced again.
                _, seconds = _timed(jax.jit(lambda *o, run=run: run(*o, by_kernel=True)), operands)
                emit(f"{name}.{change}", {"kernel_seconds": seconds})
            except Exception as error:  # noqa: BLE001 - too much shared memory, say: the others still count
                emit(f"{name}.{change}", {"error": str(error)[:200]})
            finally:
                paged_attention.Schedule.of = original  # type: ignore[method-assign]


def _attention_case(
    case: tuple[int, int, int, int, int, int], dtype: str
) -> tuple[Callable[..., jax.Array], tuple[Any, ...], float]:
    """A function of some attentions one after the other, its operands, and the bytes that one has to move."""
    count, slots, queries, head_dim, context, prompt = case
    vocab = 100
    if prompt:
        bucket, plan = Bucket(0, count * prompt, count, count), prefill_plan(count, prompt, vocab, PAGE_SIZE)
    else:
        bucket, plan = Bucket(count, 0, 0, count), decode_plan(count, context, vocab, PAGE_SIZE)
    layout = StepLayout(bucket, PAGE_SIZE, -(-max(context, prompt) // PAGE_SIZE))
    shape = (plan.page_tables.max() + 1, slots, PAGE_SIZE, head_dim)
    interpret = jax.devices()[0].platform == "cpu"
    itemsize = jnp.dtype(dtype).itemsize
    moved = itemsize * count * slots * head_dim * (2 * max(context, prompt) + 2 * queries * max(prompt, 1))
    layers = 1 if interpret else max(_LAYERS[0], min(_LAYERS[1], _BYTES // moved))
    keys = jax.random.split(jax.random.key(2), 2 * layers + 1)
    pages = [jax.random.normal(key, shape).astype(dtype) for key in keys[1:]]
    q = jax.random.normal(keys[0], (bucket.tokens, slots, queries, head_dim)).astype(dtype)
    settings: dict[str, Any] = {"scale": head_dim**-0.5, "window": None, "softcap": None}

    def run(q: jax.Array, flat: jax.Array, *pages: jax.Array, by_kernel: bool) -> jax.Array:
        plan = attention_plan(layout.unpack(flat))
        compute = partial(attention.attend_by_kernel, interpret=interpret) if by_kernel else attention.attend_by_loops
        layer = jax.jit(lambda q, keys, values, plan: compute(q, keys, values, plan, **settings))
        out = jnp.zeros_like(q)
        for keys, values in zip(pages[::2], pages[1::2], strict=True):
            # Each waits for the one before it; what is attended to alone would be too small to tell positions apart.
            out = layer(q + out, keys, values, plan)
        return out.astype(jnp.float32)

    return run, (q, jax.device_put(layout.pack(plan)), *pages), float(moved)


def _timed(run: Callable[..., jax.Array], operands: Sequence[Any]) -> tuple[jax.Array, float]:
    """What it gives, and seconds of one layer."""
    found = run(*operands)
    seconds = seconds_each(lambda steps: jax.block_until_ready([run(*operands) for _ in range(steps)][-1]), 5)
    return found, seconds / ((len(operands) - 2) // 2)


# --- shards


def shards(request: Any, emit: Emit) -> None:
    """One shard's decode at each width beside the whole model's, and the speedups that follow from it."""
    sizes: Sizes = request.sizes
    jobs = shard_jobs(sizes, "h100")
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # before JAX counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    for name, (config, layer_counts) in sizes.shard.items():
        times: dict[int, dict[int, dict[int, float]]] = {}
        for width in sizes.shard_widths:
            weights: dict[str, jax.Array] = {}
            for layers in sorted(layer_counts, reverse=True):
                part = shard_config(config, width, layers)
                programs = open_programs(part, jobs)
                weights = weights or noise(programs)
                params = in_order(programs, weights)
                for job in jobs:
                    plan = plan_of(job, part["vocab_size"], context=sizes.shard_context)
                    loop = ForwardLoop(programs, bucket_of(job), plan, params)
                    loop.check()
                    steps = sizes.steps if job.decodes < 32 else max(2, sizes.steps // 4)
                    seconds = seconds_each(lambda steps, loop=loop: loop.run(steps), steps)
                    loop.close()
                    times.setdefault(job.decodes, {}).setdefault(width, {})[layers] = seconds
                if width == 1 and layers == max(layer_counts):
                    samplers = {
                        job.decodes: seconds_each(sampler_loop(programs, job.decodes), sizes.steps) for job in jobs
                    }
            emit(
                f"{name}.width_{width}", {str(b): {str(n): s for n, s in by[width].items()} for b, by in times.items()}
            )
        emit(f"{name}.samplers", {str(batch): seconds for batch, seconds in samplers.items()})
        kind = jax.devices()[0].device_kind
        emit(f"{name}.predicted", predicted_speedups(config, times, samplers, kind, sizes.dtype))


# --- a trace


def profile(request: Any, emit: Emit) -> None:
    """The largest kernels of the last model's decodes, and how much of the time no kernel ran."""
    name, jobs = list(speed_jobs(request.sizes, "h100").items())[-1]
    config = request.sizes.speed[name]
    programs = open_programs(config, jobs[:2])
    params = in_order(programs, noise(programs))
    for job in jobs[:2]:
        plan = plan_of(job, config["vocab_size"], context=request.sizes.context)
        loop = ForwardLoop(programs, bucket_of(job), plan, params)
        loop.run(3)
        seconds = seconds_each(lambda steps, loop=loop: loop.run(steps), request.sizes.steps)
        steps = 5
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                loop.run(steps)
            (file,) = Path(folder).glob("**/*.xplane.pb")
            found = kernels_of(jax.profiler.ProfileData.from_file(str(file)), steps)
        loop.close()
        emit(f"{name}.decode_{job.decodes}", {"forward_seconds": seconds, **found})


STAGES: dict[str, Callable[[Any, Emit], None]] = {
    "correct": correct, "attention": attention_alone, "shards": shards, "profile": profile, "profile_kernels": profile,
}  # fmt: skip
