"""The joined engine on tiny models: nothing compiles while requests run, and a request's tokens are its own affair."""

import dataclasses
import itertools
import mmap
from pathlib import Path

import jax
import numpy as np
import pytest

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine import local
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.local import LocalExecutor
from ryzanstein_jax.engine.open import open_model
from ryzanstein_jax.errors import ConfigError, EngineClosedError, MemoryBudgetError
from ryzanstein_jax.host_memory import memory_ranges, use_huge_pages
from ryzanstein_jax.memory import weight_bytes
from ryzanstein_jax.plan import StepPlan, StepResult
from ryzanstein_jax.request import SamplingParams
from tests.support import (
    GOLDEN,
    counted_compiles,
    golden_expected,
    open_engine,
    quick_compiles,
    serve,
    tokens_of,
)

MODEL = GOLDEN / "smollm2"
VOCAB = 131
CONFIG = EngineConfig(
    str(MODEL), max_num_seqs=3, max_num_batched_tokens=16, page_size=4, max_logprobs=VOCAB, compilation_cache_dir=""
)
TOKENS, LOGITS, PROMPT = golden_expected("smollm2")


class Limited:
    """An executor that tells of fewer pages than it has, so that one set of programs serves many tests."""

    def __init__(self, executor: LocalExecutor, **limits: int):
        self._executor = executor
        self.limits = dataclasses.replace(executor.limits, **limits)

    def submit(self, plan: StepPlan) -> None:
        self._executor.submit(plan)

    def collect(self) -> StepResult:
        return self._executor.collect()

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compiles():
        yield


@pytest.fixture(scope="module")
def executor():
    engine, executor = open_engine(MODEL, **{k: v for k, v in vars(CONFIG).items() if k != "model"})
    yield executor
    engine.close()


def engine_on(executor: LocalExecutor, *, caching: bool = True, **limits: int) -> Engine:
    return Engine(Limited(executor, **limits), config=CONFIG.replace(enable_prefix_caching=caching))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, rng.integers(1, 45)).tolist() for _ in range(count)]


def of_all_kinds() -> dict[str, tuple[list[int], SamplingParams]]:
    """Requests that between them use all that the samplers know."""
    kinds: dict[str, dict] = {
        "greedy": dict(temperature=0),
        "seeded": dict(seed=5),
        "filtered": dict(temperature=1.4, top_k=20, top_p=0.8, min_p=0.01, seed=6),
        "penalties": dict(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7, seed=7),
        "bias": dict(logit_bias={5: 4.0, 9: -100.0}, seed=8),
        "logprobs": dict(logprobs=4, seed=9),
        "prompt logprobs": dict(prompt_logprobs=2, temperature=0),
        "several": dict(n=2, seed=10),
        "min tokens": dict(min_tokens=6, stop_token_ids=(7, 8), seed=11),
    }
    return {
        name: (prompt, SamplingParams(max_tokens=10, ignore_eos=True, **settings))
        for (name, settings), prompt in zip(kinds.items(), prompts(len(kinds)), strict=True)
    }


def test_golden_tokens(executor):
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    assert tokens_of(serve(engine_on(executor), {"r": (PROMPT.tolist(), params)})) == {"r": [TOKENS[40:].tolist()]}


def test_nothing_compiles_while_requests_run(executor):
    before = executor.metrics.counter("compiles")
    assert before == executor.report.num_programs > 0
    requests = of_all_kinds()
    with counted_compiles() as compiles:
        serve(engine_on(executor), requests)
        for name, request in requests.items():  # alone they meet the smaller buckets
            serve(engine_on(executor), {name: request})
        assert compiles() == 0
        jax.jit(lambda x: x + 17)(np.zeros(3))
        assert compiles() > 0, "the count would see one"
    assert executor.metrics.counter("compiles") == before


def test_tokens_do_not_depend_on_the_others(executor):
    requests = of_all_kinds()
    together = serve(engine_on(executor), requests)
    for name, request in requests.items():
        alone = serve(engine_on(executor, caching=False), {name: request})
        assert tokens_of(alone)[name] == tokens_of(together)[name], name
    assert len({tuple(c.token_ids) for c in together["several"].outputs}) == 2


def test_tokens_do_not_depend_on_the_width_and_closing_frees_it(executor):
    engine, wide_executor = open_engine(MODEL, tensor_parallel_size=4, page_size=8, max_num_seqs=2)
    requests = of_all_kinds()
    wide = serve(engine, requests)
    narrow = serve(engine_on(executor), requests)
    assert tokens_of(wide) == tokens_of(narrow)
    completions = [outputs["logprobs"].outputs[0] for outputs in (wide, narrow)]
    np.testing.assert_allclose(*(completion.cumulative_logprob for completion in completions), atol=1e-3)
    found = wide_executor.collectives()
    assert len(found) >= 4 and all(found.values())

    leaves = jax.tree.leaves((wide_executor._runner._cache, wide_executor._runner._params))
    engine.close()
    assert leaves and all(leaf.is_deleted() for leaf in leaves), "closing frees the devices' memory"
    with pytest.raises(EngineClosedError, match="no step"):
        wide_executor.collect()


def test_seeds(executor):
    prompt = PROMPT[:9].tolist()

    def run(seed, caching=True):
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=12, ignore_eos=True)
        return tokens_of(serve(engine_on(executor, caching=caching), {"r": (prompt, params)}))["r"]

    assert run(1) == run(1) == run(1, caching=False)
    assert len({str(run(seed)) for seed in (1, 2, 3, -1, 1 << 40)}) == 5


def test_prompt_logprobs_are_the_models(executor):
    logprobs = LOGITS.astype(np.float64)
    logprobs -= np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
    params = SamplingParams(temperature=0, prompt_logprobs=3, max_tokens=1, ignore_eos=True)
    for _ in range(2):
        scored = serve(engine_on(executor), {"r": (PROMPT.tolist(), params)})["r"].prompt_logprobs
        assert scored[0] is None and len(scored) == 40
        for position, entry in enumerate(scored[1:], start=1):
            best = np.argsort(-logprobs[position - 1])
            assert set(entry) == {*best[:3].tolist(), int(PROMPT[position])}
            for token, found in entry.items():
                assert found.logprob == pytest.approx(logprobs[position - 1, token], abs=1e-4)
                assert found.rank == best.tolist().index(token) + 1


PENALIZED = SamplingParams(
    temperature=0, presence_penalty=0.9, frequency_penalty=1.1, max_tokens=20, ignore_eos=True, logprobs=VOCAB
)


def penalized_by_hand(outputs) -> list[int]:
    """What greedy choice with penalties gives, from the whole distributions that the engine returned."""
    history, chosen = np.zeros(VOCAB), []
    for entry in outputs.logprobs:
        scores = np.array([entry[token].logprob for token in range(VOCAB)])
        chosen.append(int(np.argmax(scores - 1.1 * history - 0.9 * (history > 0))))
        history[chosen[-1]] += 1
    return chosen


def test_penalties_count_the_completion_in_its_pages(executor):
    """Also where the pages were found in the prefix cache, or were lost to another request and filled again."""
    engine = engine_on(executor)
    prompt = PROMPT[:30].tolist()
    first = serve(engine, {"r": (prompt, PENALIZED)})["r"]
    assert first.outputs[0].token_ids == penalized_by_hand(first.outputs[0])
    plain = dataclasses.replace(PENALIZED, presence_penalty=0.0, frequency_penalty=0.0)
    unpenalized = serve(engine, {"r": (prompt, plain)})["r"]
    assert unpenalized.outputs[0].token_ids != first.outputs[0].token_ids
    again = serve(engine, {"r": (prompt, PENALIZED)})["r"]
    assert again.num_cached_tokens == 28
    assert again.outputs[0].token_ids == first.outputs[0].token_ids

    crowd = {"r": (prompt, PENALIZED)} | {f"x{i}": (p, PENALIZED) for i, p in enumerate(prompts(4, seed=3))}
    tight = engine_on(executor, num_pages=18)
    crowded = serve(tight, crowd)
    assert tight.stats().num_preemptions > 0
    assert crowded["r"].outputs[0].token_ids == first.outputs[0].token_ids


@pytest.mark.parametrize("caching", [True, False])
def test_preemption_changes_no_token(executor, caching):
    requests = of_all_kinds()
    expected = serve(engine_on(executor, caching=False), requests)
    tight = engine_on(executor, caching=caching, num_pages=15)
    got = serve(tight, requests)
    assert tight.stats().num_preemptions > 0 and tight.stats().num_pages_used == 0
    assert tokens_of(got) == tokens_of(expected)
    assert got["prompt logprobs"].prompt_logprobs is not None
    assert len(got["prompt logprobs"].prompt_logprobs) == len(requests["prompt logprobs"][0])


def test_memory_is_what_the_plan_says(executor):
    memory, runner = executor.report.memory, executor._runner
    device = executor.mesh.devices.flat[0]

    def held(arrays):
        return sum(s.data.nbytes for a in jax.tree.leaves(arrays) for s in a.addressable_shards if s.device == device)

    assert held(runner._cache) == memory.kv_cache
    assert held(runner._params) == memory.weights == weight_bytes(executor._programs.param_shapes)
    programs = executor._programs

    def temporaries(table):
        return max(program.memory_analysis().temp_size_in_bytes for program in table.values())

    assert temporaries(programs.forwards) <= memory.temporaries
    # A sampler runs when the forward's temporaries are free again.
    for table in (programs.samplers, programs.full_samplers):
        assert temporaries(table) <= memory.temporaries + memory.logits
    assert memory.weights + memory.temporaries + memory.logits + memory.kv_cache <= memory.budget <= memory.total
    # As many pages as all sequences can fill, with the scratch page; a tiny model has memory left over.
    assert memory.num_pages == executor.limits.num_pages == 3 * 128 // 4 + 1
    assert str(memory.num_pages) in str(executor.report)


def test_collectives_are_told_by_program(executor):
    found = executor.collectives()
    assert len(found) >= 4 and not any(found.values()), "one device has nobody to exchange with"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(tensor_parallel_size=9), ConfigError, "there are 8 cpu devices; use at most that many"),
        (dict(memory_fraction=1e-6), MemoryBudgetError, "does not fit: .*weights .*budget.* Use "),
        (dict(num_pages=10**9), MemoryBudgetError, "num_pages=1000000000 takes .*GiB.* Use num_pages=[1-9]"),
        (dict(num_pages=5, page_size=16, max_model_len=100), MemoryBudgetError, "Use max_model_len=64, or less"),
        (dict(max_model_len=129), ConfigError, "max_model_len=129 .*limit is 128"),
    ],
)
def test_what_cannot_fit_is_refused_before_loading(monkeypatch, settings, error, message):
    def load(*arguments):
        raise AssertionError("loads")

    monkeypatch.setattr(local, "_load", load)
    monkeypatch.setattr(local.StepPrograms, "compile_all", load)
    config = EngineConfig(str(MODEL), max_num_seqs=1, max_num_batched_tokens=16, compilation_cache_dir="", **settings)

    def start():
        opened = open_model(config)
        LocalExecutor(config, opened.files, opened.spec)

    with pytest.raises(error, match=message):
        start()


def test_one_step_starts_many_short_prompts(monkeypatch):
    """A step is no shorter than the longest sequence only because that one is short."""
    asked = []

    def compile_all(programs: local.StepPrograms, *arguments, **settings):
        asked.append(programs.shapes)
        raise InterruptedError

    monkeypatch.setattr(local.StepPrograms, "compile_all", compile_all)
    config = EngineConfig(str(MODEL), max_num_seqs=8, max_model_len=20, num_pages=50, compilation_cache_dir="")
    opened = open_model(config)
    with pytest.raises(InterruptedError):
        LocalExecutor(config, opened.files, opened.spec)
    (shapes,) = asked
    assert max(bucket.prefill_tokens for bucket in shapes.buckets) == 8 * 20


def test_huge_pages_change_nothing_but_where_arrays_lie():
    arrays = [jax.device_put(np.full((1 << 20) + 1, index, np.float32)) for index in range(4)]
    places = [array.unsafe_buffer_pointer() for array in arrays]
    ranges = memory_ranges(reversed(arrays))
    assert all(any(begin <= place < end for begin, end in ranges) for place in places)
    assert all(before[1] + (2 << 20) <= after[0] for before, after in itertools.pairwise(ranges))
    moved = use_huge_pages(ranges)
    mapped = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if mapped.exists() and "[never]" not in mapped.read_text():
        assert 0 < moved <= sum(array.nbytes for array in arrays)
    assert [array.unsafe_buffer_pointer() for array in arrays] == places
    assert all((np.asarray(array) == index).all() for index, array in enumerate(arrays))


def test_memory_that_cannot_be_moved_keeps_none_from_moving():
    """A part that nobody has written to yet has nothing to move."""
    page = 2 << 20
    area = mmap.mmap(-1, 8 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = np.frombuffer(area, np.uint8)
    begin = -(-numbers.ctypes.data // page) * page
    first = begin - numbers.ctypes.data
    numbers[first + page : first + 4 * page] = 7
    moved = use_huge_pages([(begin, begin + 4 * page)])
    mapped = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if mapped.exists() and "[never]" not in mapped.read_text():
        assert moved == 3 * page
    assert (numbers[first + page : first + 4 * page] == 7).all() and not numbers[first : first + page].any()
