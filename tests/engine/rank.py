"""One rank of a job of several real processes; `test_processes` starts them. Prints what it got as one line of JSON.

python rank.py PORT RANK COUNT MODEL SETTINGS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax

from ryzanstein_jax.engine.local import LocalExecutor
from ryzanstein_jax.request import SamplingParams
from tests.support import counted_compiles, golden_expected, open_engine, quick_compiles, serve, tokens_of


def requests(model: str) -> dict[str, tuple[list[int], SamplingParams]]:
    """Plain and full samplers, prompts longer than a chunk, and more requests than decode at once."""
    prompt = golden_expected(Path(model).name)[2].tolist()
    return {
        "greedy": (prompt, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)),
        "seeded": (prompt[:7], SamplingParams(seed=5, max_tokens=9, ignore_eos=True)),
        "full": (prompt[:20], SamplingParams(seed=6, logprobs=5, presence_penalty=0.5, max_tokens=9, ignore_eos=True)),
    }


def run(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine on all devices of the job and serves the requests."""
    with quick_compiles():
        engine, executor = open_engine(model, **settings)
        before = cache_pointers(executor)
        with counted_compiles() as compiles:
            outputs = serve(engine, requests(model))
            compiled_later = compiles()
        result = {
            "tokens": tokens_of(outputs),
            "logprobs": outputs["full"].outputs[0].cumulative_logprob,
            "counters": executor.metrics.snapshot()["counters"],
            "pages": executor.limits.num_pages,
            "compiled_later": compiled_later,
            "cache_moved": before != cache_pointers(executor),
            "collectives": {name: [vars(c) for c in found] for name, found in executor.collectives().items()},
            "read": executor.report.load.get("bytes_read", 0),
            "devices": [jax.local_device_count(), jax.device_count()],
            "processes": jax.process_count(),
        }
        engine.close()
    return result


def cache_pointers(executor: LocalExecutor) -> list[int]:
    leaves = jax.tree.leaves(executor._runner._cache)
    return [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in leaves]


if __name__ == "__main__":
    port, rank, count, model, settings = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(rank))
    print(json.dumps(run(model, json.loads(settings))), flush=True)
