"""What `compiled.compile_jobs` runs: compiles for GPUs by their description. Reads a request, prints what it found."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.memory import memory_analysis, weight_bytes
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.planner.compiled import Job
from ryzanstein_jax.sharding import collectives, make_mesh
from ryzanstein_jax.step import StepPrograms, StepShapes

#: Steps of a program as XLA lists them: "012: kCustomKernel [...] name".
_THUNK = re.compile(r"^\s*\d+: k(\w+)", re.MULTILINE)
#: The same in versions of XLA that make graphs of parts of the program's text.
_GRAPH = re.compile(r"\bcall\(.*to_apply=%?command_buffer")
_KERNELS = (
    "CustomKernel",
    "Kernel",
    "Gemm",
    "CublasLtMatmul",
    "CollectiveKernel",
    "Copy",
    "Memset32BitValue",
    "Memzero",
)


def step_programs(spec: ModelSpec, jobs: Sequence[Job], mesh: Mesh) -> StepPrograms:
    """The engine's programs for these jobs, which are alike but for decodes and prompt tokens; none is compiled."""
    buckets = tuple(sorted(map(bucket_of, jobs), key=lambda bucket: bucket.tokens))
    pages, longest = max(job.num_pages for job in jobs), max(job.context for job in jobs)
    ((page_size, dtype, sharding, kv_dtype),) = {
        (job.page_size, job.dtype, job.sharding, job.kv_cache_dtype) for job in jobs
    }
    shapes = StepShapes(buckets, pages, page_size, -(-longest // page_size), 0, 0, kv_dtype)
    return StepPrograms(spec, PaddedSizes.of(spec, mesh.size, sharding), jnp.dtype(dtype), mesh, shapes)


def bucket_of(job: Job) -> Bucket:
    """The sizes of its program."""
    return Bucket(job.decodes, job.prefill, job.prompts, job.rows)


def compile_one(config: dict[str, Any], job: Job, target: str) -> dict[str, Any]:
    """Compiles the forward of a step, and the sampler if asked to; the fields of `Compiled`, but for the job."""
    # A power of two: XLA describes whole machines.
    size = 1 << max(0, math.ceil(math.log2(job.width)))
    topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{size}", target_config=target)
    mesh = make_mesh(job.width, list(topology.devices))
    programs, bucket = step_programs(spec_from_config(config), [job], mesh), bucket_of(job)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        forward = programs.lower_forward(bucket).compile(compiler_options={"xla_dump_to": folder})
        thunks = _thunks(Path(folder))
    samplers = [programs.lower_sample(job.rows).compile()] if job.sampler else []
    account = memory_analysis(forward)
    steps = _THUNK.findall(thunks)
    return {
        "arguments": account.argument_size_in_bytes,
        "outputs": account.output_size_in_bytes,
        "aliased": account.alias_size_in_bytes,
        "temporaries": account.temp_size_in_bytes,
        "cache": weight_bytes(jax.tree.leaves(programs.cache_shapes)),
        "collectives": [asdict(one) for program in (forward, *samplers) for one in collectives(program)],
        "graphs": steps.count("CommandBuffer") or len(_GRAPH.findall(forward.as_text() or "")),
        "kernels": sum(step in _KERNELS for step in steps),
        "loops": steps.count("While"),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _thunks(folder: Path) -> str:
    """XLA's list of what a program starts, after it has made graphs."""
    for pattern in ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt"):
        for path in folder.glob(pattern):
            return path.read_text()
    return ""


def main() -> None:
    request = json.load(sys.stdin)
    jobs = [Job(**job) for job in request["jobs"]]
    with ThreadPoolExecutor(max_workers=min(len(jobs), os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda job: compile_one(request["config"], job, request["targets"][job.device]), jobs))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
