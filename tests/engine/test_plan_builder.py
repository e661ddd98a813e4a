import numpy as np
import pytest

from ryzanstein_jax.engine.scheduler import Scheduler
from tests.engine.drive import run, sequence, shape
from tests.engine.fake_executor import limits


def test_rows_carry_the_sampling_settings():
    scheduler = Scheduler(limits())
    settings = {"temperature": 0.5, "top_k": -1, "top_p": 0.25, "min_p": 0.125}
    scheduler.add(sequence([1, 2, 3], key=(5, 6), **settings))
    row = run(scheduler).rows[0]
    assert row["key"].tolist() == [5, 6]
    assert row["top_k"] == 0
    assert row["target"] == -1
    assert [row[name].item() for name in ("temperature", "top_p", "min_p")] == [0.5, 0.25, 0.125]
    assert row["position"] == 3
    assert row["prompt_len"] == 3


def test_min_tokens_bans_every_stop_until_it_is_reached():
    scheduler = Scheduler(limits())
    scheduler.add(sequence([1, 2], eos=(7,), stop_token_ids=[5], min_tokens=2))
    plans = [run(scheduler) for _ in range(3)]
    assert [plan.bias.tolist() for plan in plans] == [[(0, 5, -np.inf), (0, 7, -np.inf)]] * 2 + [[]]
    assert [plan.full for plan in plans] == [True, True, False]


def test_prompt_logprobs_take_a_row_for_each_token_within_the_limit():
    scheduler = Scheduler(limits(max_rows=4))
    one = sequence(range(10, 20), prompt_logprobs=0)
    scheduler.add(one)
    plans = [run(scheduler) for _ in range(3)]
    assert [shape(plan) for plan in plans] == [(0, [4]), (0, [4]), (0, [2])]
    assert np.concatenate([plan.rows["target"] for plan in plans]).tolist() == [*range(11, 20), -1]
    assert plans[1].rows["token"].tolist() == [0, 1, 2, 3]


def test_page_tables_are_padded_with_zeros_after_a_longer_owner_of_the_slot():
    scheduler = Scheduler(limits(), enable_prefix_caching=False)
    scheduler.add(sequence(range(9), max_tokens=1))
    run(scheduler)
    scheduler.add(sequence([1]))
    scheduler.add(sequence(range(20, 29)))
    tables = run(scheduler).page_tables
    assert tables.shape == (2, 3)
    assert (tables[1] > 0).all()
    assert tables[0, 0] > 0
    assert tables[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("params", "full", "num_logprobs"),
    [
        ({}, False, -1),
        ({"repetition_penalty": 1.5}, True, -1),
        ({"presence_penalty": 0.5}, True, -1),
        ({"frequency_penalty": 0.5}, True, -1),
        ({"logit_bias": {3: 1.5}}, True, -1),
        ({"logprobs": 0}, True, 0),
        ({"logprobs": 3}, True, 3),
        ({"prompt_logprobs": 2}, True, 2),
    ],
)
def test_the_full_sampler_runs_only_where_it_is_needed(params, full, num_logprobs):
    scheduler = Scheduler(limits())
    scheduler.add(sequence([1, 2]))
    scheduler.add(sequence([3, 4], **params))
    plan = run(scheduler)
    assert plan.full is full
    assert plan.num_logprobs == num_logprobs
    assert plan.bias.tolist() == [(1, 3, 1.5)] * bool(params.get("logit_bias"))
