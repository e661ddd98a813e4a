"""Programs compiled for GPUs that are not here, by a process of its own; held against the plan. No JAX here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.errors import ConfigError, RyzansteinError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.plan import MAX_PREFILLS
from ryzanstein_jax.planner.gpu_targets import target_config
from ryzanstein_jax.planner.roofline import Step, cached_itemsize, sampler_collectives, step_collectives
from ryzanstein_jax.planner.usage import pages, temporaries

#: Where the compiler of GPU programs is; what it needs besides is in `nvidia`.
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class CompileError(RyzansteinError):
    """XLA could not compile a program for an absent GPU; the message holds what it said last."""


@dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
        device, width: a device with a `GpuTarget`, and how many of it.
        decodes, prefill: sequences that decode, and prompt tokens beside them.
        context: tokens of the longest sequence.
        num_pages: of the KV cache.
        page_size: tokens in a page.
        dtype: "bfloat16", "float16" or "float32".
        sampler: compile the sampler of its rows too.
        sharding: the way to shard.
        kv_cache_dtype: of `config.KV_CACHE_DTYPES`.
    """

    device: str
    width: int
    decodes: int
    prefill: int
    context: int
    num_pages: int
    page_size: int = 16
    dtype: str = "bfloat16"
    sampler: bool = False
    sharding: str = "megatron"
    kv_cache_dtype: str = "auto"

    @property
    def rows(self) -> int:
        """Rows of logits: of each decode, and of each prompt that a step may hold."""
        return self.decodes + self.prompts

    @property
    def prompts(self) -> int:
        """Prompts that its tokens may be of."""
        return min(MAX_PREFILLS, self.prefill)

    @property
    def name(self) -> str:
        parts = [f"{self.decodes} decodes"] if self.decodes else []
        return " + ".join([*parts, *([f"{self.prefill} prompt tokens"] if self.prefill else [])])


@dataclass(frozen=True)
class Compiled:
    """What a compiled program shows, bytes on one device.

    Attributes:
        job: what was compiled.
        arguments, outputs, aliased, temporaries: XLA's account. Aliased outputs lie where arguments lay.
        cache: of the KV cache, which is an argument and an output.
        collectives: of the forward, and of the sampler where it was compiled.
        graphs: CUDA graphs (command buffers) of the forward, those in loops counted once.
        kernels: kernels of the forward, those in loops counted once.
        loops: loops of which each turn waits for the host, because their length depends on the context.
        seconds: that compiling the two programs took.
    """

    job: Job
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    cache: int
    collectives: tuple[Collective, ...]
    graphs: int
    kernels: int
    loops: int
    seconds: float

    @property
    def total(self) -> int:
        """All that the forward needs on a device."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def cache_in_place(self) -> bool:
        """The whole cache is written where it lies, and nothing of its size is made beside it."""
        return self.aliased == self.cache


@dataclass(frozen=True)
class Expected:
    """What the planner computes of the same program.

    Attributes:
        total: bytes of arguments, results and temporaries on a device.
        collectives: of forward and sampler.
    """

    total: int
    collectives: tuple[Collective, ...]


def expected(spec: ModelSpec, job: Job) -> Expected:
    """The planner's sum for a program that is compiled."""
    itemsize = 4 if job.dtype == "float32" else 2
    sizes = PaddedSizes.of(spec, job.width, job.sharding)
    step = Step(decodes=job.decodes, context=job.context, prefill=job.prefill)
    weights = sizes.weight_bytes_per_device(spec, itemsize)
    cache = job.num_pages * sizes.page_bytes(spec, job.page_size, cached_itemsize(job.kv_cache_dtype, itemsize))
    logits = 4 * job.rows * sizes.vocab // job.width
    spare = temporaries(spec, sizes, job.decodes, job.prefill, itemsize)
    found = step_collectives(spec, sizes, step, itemsize)
    if job.sampler:
        found += sampler_collectives(sizes, job.rows)
    return Expected(weights + cache + logits + spare, tuple(found))


def engine_jobs(
    device: str,
    width: int,
    batch: int,
    *,
    context: int,
    prefill: int,
    page_size: int = 16,
    dtype: str = "bfloat16",
    sharding: str = "megatron",
    kv_cache_dtype: str = "auto",
) -> list[Job]:
    """The decode (with its sampler) and the prefill program of an engine with `batch` sequences of `context` tokens."""
    held = batch * pages(context, page_size) + 1
    shared: dict[str, Any] = {"context": context, "num_pages": held, "page_size": page_size, "dtype": dtype}
    shared |= {"sharding": sharding, "kv_cache_dtype": kv_cache_dtype}
    return [Job(device, width, batch, 0, sampler=True, **shared), Job(device, width, 0, prefill, **shared)]


def compile_jobs(config: dict[str, Any], jobs: Sequence[Job], *, timeout: float = 1800.0) -> list[Compiled]:
    """Compiles the engine's programs for GPUs, in a process that sees none.

    Args:
        config: `config.json` of the model.
        jobs: what to compile.
        timeout: most seconds for all of them.

    Raises:
        ConfigError: the compiler isn't installed, or there is no description of the GPU.
        CompileError: it failed, or took too long.
    """
    if all(_missing(name) for name in _PLUGINS) or _missing("nvidia"):
        raise ConfigError("compile", True, "the compiler for GPUs is missing: pip install 'ryzanstein-jax[plan]'")
    spec_from_config(config)  # what is wrong with the model is better said from here
    request = {"config": config, "jobs": [asdict(job) for job in jobs]}
    request["targets"] = {job.device: target_config(job.device) for job in jobs}
    command = [sys.executable, "-m", "ryzanstein_jax.planner.compile_gpu"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout, env=environment,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"compiling took more than {timeout:g} seconds") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise CompileError(f"compiling for {jobs[0].device} failed: {said[-1] if said else done.returncode}")
    return [_compiled(job, facts) for job, facts in zip(jobs, json.loads(done.stdout), strict=True)]


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


def _compiled(job: Job, facts: dict[str, Any]) -> Compiled:
    found = tuple(Collective(**one) for one in facts.pop("collectives"))
    return Compiled(job=job, collectives=found, **facts)
