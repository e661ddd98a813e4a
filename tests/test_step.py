"""The compiled step: tokens that stay on the device, its programs, and history counted page by page."""

import jax
import numpy as np
import pytest

from ryzanstein_jax.batch import Bucket, bucket_ladder
from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.history import history_counts
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.plan import ROW, StepPlan
from ryzanstein_jax.sharding import PaddedSizes, make_mesh
from ryzanstein_jax.step import StepPrograms, StepShapes
from tests.support import (
    GOLDEN,
    QUICK,
    golden_expected,
    golden_spec,
    load,
    make_plan,
    make_programs,
    quick_compiles,
)

BUCKET = Bucket(decodes=2, prefill_tokens=40, prefills=2, rows=4)


def last_row_only(plan: StepPlan) -> StepPlan:
    return StepPlan(
        plan.step, plan.num_decodes, plan.token_ids, plan.positions, plan.query_lens, plan.page_tables, plan.rows[-1:]
    )


def test_tokens_stay_on_the_device():
    """Steps that name the tokens of the step before are submitted without reading them, and give the golden tokens."""
    tokens, _, prompt = golden_expected("qwen2")
    programs = make_programs(golden_spec("qwen2"), 2, BUCKET)
    programs.forwards[BUCKET] = programs.lower_forward(BUCKET).compile(compiler_options=QUICK)
    programs.samplers[BUCKET.rows] = programs.lower_sample(BUCKET.rows).compile(compiler_options=QUICK)
    runner = Runner(programs, load(programs, GOLDEN / "qwen2"), max_model_len=64)
    pages = list(range(1, 15))
    runner.submit(last_row_only(make_plan([], [(prompt, pages, 0, 40)])))
    unknown = np.full(64, -1)  # row 0 of the step before
    for position in range(40, 55):
        runner.submit(make_plan([(unknown, pages, position)], step=position - 39))
    results = [runner.collect() for _ in range(16)]
    assert [result.step for result in results] == list(range(16))
    assert [int(result.tokens[0]) for result in results] == tokens[40:].tolist()
    # The ids that the device resolved are what the pages hold for the penalties.
    history = np.asarray(runner._cache.tokens)[pages].reshape(-1)[:55]
    assert history.tolist() == tokens[:55].tolist()
    counters = programs.metrics.snapshot()["counters"]
    assert counters == {"steps": 16, "step_tokens": 55, "step_tokens_padded": 16 * 42}
    runner.close()


def test_all_programs_are_compiled_and_counted():
    spec, metrics = golden_spec("smollm2"), Metrics()
    spec = spec.replace(layers=spec.layers[:1])
    shapes = StepShapes(tuple(bucket_ladder(1, 16)), 8, 4, 8, num_logprobs=2, max_bias=8)
    programs = StepPrograms(spec, PaddedSizes.of(spec, 1), "float32", make_mesh(1), shapes, metrics=metrics)
    seen = []
    with quick_compiles():
        programs.compile_all(lambda done, total: seen.append((done, total)))
    assert set(programs.forwards) == set(shapes.buckets)
    assert set(programs.samplers) == set(programs.full_samplers) == {b.sampled_rows for b in shapes.buckets}
    total = len(programs.forwards) + 2 * len(programs.samplers)
    assert metrics.counter("compiles") == total
    assert seen == [(done, total) for done in range(total + 1)]


def test_the_cheapest_bucket_is_taken():
    programs = make_programs(golden_spec("llama"), 1, *bucket_ladder(4, 32))
    tokens, pages = np.zeros(64, np.int32), list(range(16))
    assert programs.bucket_of(make_plan([(tokens, pages, 3)] * 3)).decodes == 4
    assert programs.bucket_of(make_plan([(tokens, pages, 3)])) == Bucket(1, 0, 0, 1)
    assert programs.bucket_of(make_plan([(tokens, pages, 3)], [(tokens, pages, 0, 2)])).prefill_tokens == 32
    with pytest.raises(ValueError, match="no bucket holds 5 decodes, 0 prompt tokens"):
        programs.bucket_of(make_plan([(tokens, pages, 3)] * 5))


def test_of_quick_buckets_one_is_taken_whatever_this_process_has_loaded():
    programs = make_programs(golden_spec("llama"), 1, *bucket_ladder(4, 32))
    tokens, pages = np.zeros(64, np.int32), list(range(16))
    plans = make_plan([(tokens, pages, 3)]), make_plan([(tokens, pages, 3)], [(tokens, pages, 0, 2)])
    exact = [programs.bucket_of(plan) for plan in plans]
    full = next(bucket for bucket in programs.shapes.buckets if (bucket.decodes, bucket.prefill_tokens) == (4, 0))
    programs.quick = frozenset({full})
    assert [programs.bucket_of(plan) for plan in plans] == [full, exact[1]]
    programs.forwards[exact[0]] = "loaded here, and perhaps nowhere else"
    assert programs.bucket_of(plans[0]) == full
    programs.quick = frozenset()
    assert [programs.bucket_of(plan) for plan in plans] == exact


def test_history_is_counted_through_the_pages():
    rng = np.random.default_rng(0)
    page_size, width, vocab = 4, 6, 9
    history = rng.integers(0, vocab, (40, page_size)).astype(np.int32)
    tables = rng.permutation(np.arange(1, 40))[:24].reshape(4, width).astype(np.int32)
    rows = np.zeros(4, ROW)
    rows["position"], rows["prompt_len"] = [23, 7, 4, 20], [10, 7, 1, 20]
    rows["repetition_penalty"] = [1.2, 1.0, 1.0, 1.0]
    rows["presence_penalty"], rows["frequency_penalty"] = [0, 0.5, 0, 0], [0, 0, 0.5, 0]
    fields = {name: rows[name] for name in ROW.names} | {"tables": tables}
    counts = jax.jit(lambda f, h: history_counts(f, h, vocab))(fields, history)
    for row in range(3):  # the last row has no penalty: what is counted for it is never looked at
        tokens = history[tables[row]].ravel()[: rows["position"][row]]
        output = tokens[rows["prompt_len"][row] :]
        assert np.asarray(counts.output)[row].tolist() == np.bincount(output, minlength=vocab).tolist()
        assert np.flatnonzero(counts.seen[row]).tolist() == np.unique(tokens).tolist()
