"""The default model, SmolLM2-135M-Instruct: transformers' tokens at every width, long and many requests.

The reference tokens of `data/smollm2_greedy.json` are transformers' (see `data/make_smollm2_greedy.py`): their first
choice leads by 0.02 or more at each of the 32 steps, far over what the order of a float32 sum can change.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.open import open_model
from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.step import StepPrograms
from tests.support import GOLDEN, load, make_programs, open_engine, quick_compiles, serve, tokens_of

REFERENCE = json.loads((Path(__file__).parent / "data" / "smollm2_greedy.json").read_text())
BUCKET = Bucket(decodes=10, prefill_tokens=64, prefills=8, rows=18)
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def real_engine(path: Path, width: int, *buckets: Bucket, max_model_len: int = 128) -> Engine:
    """An engine with one bucket or few: a ladder takes long to compile for 30 layers, and is tested elsewhere."""
    opened = open_model(EngineConfig(str(path)))
    table_width = -(-max_model_len // 16)
    buckets = buckets or (BUCKET,)
    pages = max(bucket.decodes for bucket in buckets) * table_width + 1
    programs = make_programs(opened.spec, width, *buckets, page_size=16, num_pages=pages, table_width=table_width)
    compile_plain(programs)
    return Engine(Runner(programs, load(programs, path), max_model_len=max_model_len), config=EngineConfig("none"))


def compile_plain(programs: StepPrograms) -> None:
    """Only what greedy requests without log-probabilities run."""
    for bucket in programs.shapes.buckets:
        programs.forwards[bucket] = programs.lower_forward(bucket).compile()
        programs.samplers[bucket.sampled_rows] = programs.lower_sample(bucket.sampled_rows).compile()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_greedy_tokens_are_those_of_transformers(smollm2_path: Path, width: int) -> None:
    engine = real_engine(smollm2_path, width)
    outputs = serve(engine, {entry["prompt"]: (entry["prompt_token_ids"], GREEDY) for entry in REFERENCE})
    for entry in REFERENCE:
        assert outputs[entry["prompt"]].outputs[0].token_ids == entry["token_ids"], entry["prompt"]
    engine.close()


def test_reference_is_what_our_tokenizer_makes_of_the_prompts(smollm2_path: Path) -> None:
    tokenizer = open_model(EngineConfig(str(smollm2_path))).tokenizer
    assert tokenizer is not None and len(REFERENCE) == 10
    for entry in REFERENCE:
        assert tokenizer.encode(entry["prompt"]) == entry["prompt_token_ids"]
        assert len(entry["token_ids"]) == 32 and entry["margin"] >= 0.02


@pytest.mark.parametrize("length", [600, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_long_request(smollm2_path: Path, length: int) -> None:
    """Over many pages and blocks, to the model length that was set; it begins as in the reference."""
    entry = REFERENCE[0]
    longest = len(entry["prompt_token_ids"]) + length
    buckets = Bucket(1, 0, 0, 1, sampled_rows=2), Bucket(1, 16, 1, 2)  # a prompt of 16 tokens at most, then one by one
    engine = real_engine(smollm2_path, 1, *buckets, max_model_len=longest)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    completion = serve(engine, {"long": (entry["prompt_token_ids"], params)})["long"].outputs[0]
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == length and completion.token_ids[:32] == entry["token_ids"]
    engine.close()


def mixed_requests(count: int, vocab_size: int, *, longest: int) -> dict[str, tuple[list[int], SamplingParams]]:
    """Short requests of all kinds: greedy and sampled, with shared beginnings and without."""
    rng = np.random.default_rng(11)
    shared = rng.integers(3, vocab_size, longest // 2).tolist()
    found = {}
    for number in range(count):
        prompt = shared * int(rng.integers(2)) + rng.integers(3, vocab_size, rng.integers(1, longest // 2)).tolist()
        temperature = float(rng.choice([0.0, 0.7, 1.5]))
        found[f"r{number}"] = (
            prompt,
            SamplingParams(
                temperature=temperature,
                top_k=int(rng.choice([0, 5])),
                top_p=float(rng.choice([1.0, 0.9])),
                max_tokens=int(rng.integers(1, 9)),
                seed=number,
                ignore_eos=True,
            ),
        )
    return found


def check_many(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> None:
    """All at once, then some of them alone: the same tokens."""
    together = tokens_of(serve(engine, requests))
    assert together.keys() == requests.keys()
    for name, (_, params) in requests.items():
        assert len(together[name][0]) == params.max_tokens
    for name in list(requests)[:: max(1, len(requests) // 20)]:
        assert tokens_of(serve(engine, {name: requests[name]}))[name] == together[name], name


def test_five_hundred_requests_on_a_tiny_model() -> None:
    with quick_compiles():
        engine, executor = open_engine(GOLDEN / "smollm2", max_num_seqs=4, max_num_batched_tokens=32, num_pages=24)
    check_many(engine, mixed_requests(500, executor.limits.vocab_size, longest=40))
    stats = engine.stats()
    assert stats.num_pages_used == 0 and stats.num_prefix_hits > 0
    engine.close()


@pytest.mark.slow
def test_five_hundred_requests_on_the_real_model(smollm2_path: Path) -> None:
    engine = real_engine(smollm2_path, 1)
    check_many(engine, mixed_requests(500, 49152, longest=64))
    engine.close()
