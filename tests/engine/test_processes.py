"""An executor over a mesh of real processes, and what a second start of the same job finds done."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank import requests

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.process import prepare_process
from tests.support import GOLDEN, open_engine, quick_compiles, serve, tokens_of

MODEL = str(GOLDEN / "smollm2")
RANK = Path(__file__).parent / "rank.py"


def start_job(count: int, model: str, **settings: Any) -> list[dict[str, Any]]:
    """Runs that many processes as one job to their end, and returns what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    given = json.dumps({"tensor_parallel_size": count, **settings})
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), port, str(rank), str(count), model, given],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        ends = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, ends, strict=True):
        assert rank.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ends]


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Any], float]:
    """What one process gives."""
    with quick_compiles():
        engine, _ = open_engine(MODEL)
        outputs = serve(engine, requests(MODEL))
        engine.close()
    return tokens_of(outputs), outputs["full"].outputs[0].cumulative_logprob


def test_two_processes_give_the_tokens_of_one_and_start_again_without_compiling(alone, tmp_path):
    settings = dict(compilation_cache_dir=str(tmp_path))
    first = start_job(2, MODEL, **settings)
    second = start_job(2, MODEL, **settings)
    for job in (first, second):
        for rank in job:
            assert rank["tokens"] == alone[0]
            assert rank["logprobs"] == pytest.approx(alone[1], abs=1e-3)
            assert (rank["processes"], rank["devices"]) == (2, [1, 2])
            assert rank["compiled_later"] == 0 and not rank["cache_moved"]
            assert rank["pages"] == job[0]["pages"]
    for before, after in zip(first, second, strict=True):
        programs = before["counters"]["compiles"]
        assert before["counters"].get("executables_loaded", 0) == 0
        assert after["counters"]["compiles"] == programs
        # The cache and the agreement on its size have programs of their own.
        assert after["counters"]["executables_loaded"] == programs + 2
        assert after["tokens"] == before["tokens"] and after["logprobs"] == before["logprobs"]
        assert after["collectives"] == before["collectives"]
        assert all(found for found in after["collectives"].values())


def test_each_process_reads_its_share_of_the_weights():
    narrow, wide = (start_job(count, str(GOLDEN / "llama"))[0]["read"] for count in (1, 2))
    assert wide < 0.7 * narrow


def test_dummy_weights_and_a_given_number_of_pages(alone):
    ranks = start_job(2, MODEL, load_format="dummy", num_pages=40, seed=3)
    assert ranks[0]["tokens"] == ranks[1]["tokens"] != alone[0]
    with quick_compiles():
        engine, _ = open_engine(MODEL, load_format="dummy", num_pages=40, seed=3)
        assert tokens_of(serve(engine, requests(MODEL))) == ranks[0]["tokens"]
        engine.close()


def test_a_rank_keeps_the_number_of_devices_that_it_was_given(monkeypatch):
    made = []
    monkeypatch.setattr("jax.config.update", lambda name, value: made.append(name))
    config = EngineConfig(MODEL, tensor_parallel_size=64, compilation_cache_dir="")
    prepare_process(config)
    assert made == ["jax_num_cpu_devices"]
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    prepare_process(config)
    assert made == ["jax_num_cpu_devices"]
