"""What `bench.gpu` runs in a process of its own for each stage: a request on stdin, a JSON line for each result.

{"stage": "card", "sizes": "full", "known": {...}, "hf_python": null, "model": null}
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu_cases import SMOKE, Sizes, decode_bytes, on_cpu, prefill_operations, speed_jobs
from bench.protocol import Worker

Emit = Callable[[str, Any], None]


@dataclass(frozen=True)
class Request:
    """What a stage is asked for.

    Attributes:
        device: "gpu" or "cpu".
        sizes: of what it computes.
        known: results of the stages before it, by stage.
        hf_python: interpreter with torch and transformers.
        model: path of the embedded default model, if it is there.
    """

    device: str
    sizes: Sizes
    known: dict[str, Any]
    hf_python: str | None
    model: str | None

    def limit(self, name: str) -> float | None:
        """What the stage `card` measured, if it did."""
        value = self.known.get("card", {}).get(name)
        return float(value) if value else None


def card(request: Request, emit: Emit) -> None:
    """Memory bandwidth and rate of large products of this device: what all shares are of."""
    import jax
    import jax.numpy as jnp

    from bench.gpu_programs import seconds_each

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    emit("device", {"kind": device.device_kind, "platform": device.platform, "bytes": stats.get("bytes_limit")})
    emit("versions", {"jax": jax.__version__, "platform": device.client.platform_version})
    numbers = jax.random.normal(jax.random.key(0), (int(request.sizes.gibibytes * 2**28),), jnp.float32)
    copy, read = jax.jit(lambda x: x + 1), jax.jit(jnp.max)

    def repeat(run: Callable[..., jax.Array], *operands: jax.Array) -> Callable[[int], object]:
        return lambda steps: jax.block_until_ready([run(*operands) for _ in range(steps)][-1])

    # One result at a time: five copies of such a buffer do not fit everywhere.
    moved = 2 * numbers.nbytes / min(seconds_each(repeat(copy, numbers), 1) for _ in range(3))
    emit("copy_bytes_per_s", moved)
    emit("read_bytes_per_s", numbers.nbytes / seconds_each(repeat(read, numbers), 10))
    emit("bytes_per_s", max(moved, numbers.nbytes / seconds_each(repeat(read, numbers), 10)))
    del numbers
    side = request.sizes.square
    a, b = (jax.random.normal(jax.random.key(i), (side, side)).astype(request.sizes.dtype) for i in (1, 2))
    emit("operations_per_s", 2 * side**3 / seconds_each(repeat(jax.jit(jnp.dot), a, b), 10))


def speed(request: Request, emit: Emit) -> None:
    """Decode of one and of many sequences, prefill, and first token, of each model."""
    import jax

    from bench.gpu_programs import ForwardLoop, in_order, noise, open_programs, plan_of, runner_loop, seconds_each
    from ryzanstein_jax.engine.runner import Runner
    from ryzanstein_jax.planner.compile_gpu import bucket_of

    sizes = request.sizes
    bandwidth, rate = request.limit("bytes_per_s"), request.limit("operations_per_s")
    for name, jobs in speed_jobs(sizes, "h100").items():
        config = sizes.speed[name]
        began = time.perf_counter()
        programs = open_programs(config, jobs)
        emit(f"{name}.compile_seconds", time.perf_counter() - began)
        params = in_order(programs, noise(programs))
        vocab, itemsize = config["vocab_size"], programs.dtype.itemsize
        one, few, many, long, short = jobs
        alone = plan_of(one, vocab, context=sizes.context)
        for what, job, plan in (
            ("decode_1", one, alone),
            (f"decode_1_in_{sizes.few}", few, alone),
            (f"decode_{sizes.batch}", many, plan_of(many, vocab, context=sizes.context)),
        ):
            loop = ForwardLoop(programs, bucket_of(job), plan, params)
            loop.check()
            device = seconds_each(lambda steps, loop=loop: loop.run(steps), sizes.steps)
            loop.close()
            runner = Runner(programs, params, max_model_len=job.context)
            step = seconds_each(runner_loop(runner, plan), sizes.steps) if job is not few else device
            least = decode_bytes(config, plan.num_decodes, sizes.context, itemsize)
            emit(
                f"{name}.{what}",
                {
                    "forward_seconds": device,
                    "step_seconds": step,
                    "tokens_per_s": plan.num_decodes / step,
                    "bytes": least,
                }
                | ({"share_of_bandwidth": least / step / bandwidth} if bandwidth else {}),
            )
        plan = plan_of(long, vocab, prompts=sizes.prompts)
        loop = ForwardLoop(programs, bucket_of(long), plan, params)
        loop.check()
        device = seconds_each(lambda steps, loop=loop: loop.run(steps), 2)
        loop.close()
        needed = prefill_operations(config, sizes.prompts, sizes.prompt)
        emit(
            f"{name}.prefill",
            {"forward_seconds": device, "tokens_per_s": long.prefill / device, "operations": needed}
            | ({"share_of_matmul_rate": needed / device / rate} if rate else {}),
        )
        runner = Runner(programs, params, max_model_len=long.context)
        first = runner_loop(runner, plan_of(short, vocab))
        emit(f"{name}.first_token", {"step_seconds": seconds_each(lambda steps, first=first: first(1), 1)})
        del params, runner, programs, first
        jax.clear_caches()


def transformers(request: Request, emit: Emit) -> None:
    """The same with transformers, its static cache and `torch.compile`, on its own noise."""
    sizes = request.sizes
    if request.hf_python is None:
        emit("left_out", "no interpreter with torch and transformers was named or found")
        return
    for name, config in sizes.speed.items():
        worker = Worker(request.hf_python, "bench.hf_compiled_worker")
        try:
            device = "cuda" if request.device == "gpu" else "cpu"
            worker.call("start", config=config, dtype=sizes.dtype, device=device)
            emit("versions", worker.call("describe"))
            # Of the cheap first: what takes long to compile comes last.
            emit(f"{name}.prefill", worker.call("prefill", prompts=sizes.prompts, length=sizes.prompt))
            for count in (1, sizes.batch):
                found = worker.call("decode", count=count, context=sizes.context, steps=sizes.steps)
                emit(f"{name}.decode_{count}", found)
            emit(f"{name}.first_token", worker.call("first_token", length=sizes.first))
        finally:
            worker.close()


def check_gpu() -> None:
    """Raises RuntimeError: JAX has no GPU here. It would go on with the processor, which has neither time nor room."""
    import jax

    if (platform := jax.devices()[0].platform) != "gpu":
        raise RuntimeError(f"JAX computes on {platform} here; --device cpu measures that")


def main() -> None:
    asked = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def emit(key: str, value: Any) -> None:
        print(json.dumps({"key": key, "value": value}), file=answers, flush=True)

    from bench import gpu_study

    stages = {"card": card, "speed": speed, "transformers": transformers} | gpu_study.STAGES
    sizes = {"full": Sizes, "smoke": lambda: SMOKE, "cpu": on_cpu}[asked["sizes"]]()
    try:
        # A process of JAX's own would take the GPU's memory from that of transformers.
        if asked["device"] == "gpu" and asked["stage"] != "transformers":
            check_gpu()
        request = Request(asked["device"], sizes, asked["known"], asked["hf_python"], asked["model"])
        stages[asked["stage"]](request, emit)
    except Exception:  # noqa: BLE001 - whatever it is, it is recorded
        print(json.dumps({"error": traceback.format_exc()}), file=answers, flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
