"""Requests: what a user may ask for, each refusal by name, and what the answers say of themselves."""

import dataclasses
import math
from typing import Any

import pytest

from ryzanstein_jax.errors import RequestError, RyzansteinError
from ryzanstein_jax.request import (
    FINISH_REASONS,
    MAX_N,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    CompletionOutput,
    RequestOutput,
    RequestTimings,
    SamplingParams,
)

INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, MAX_N),
    "top_k": (-1, 1 << 30),
    "seed": (-(1 << 63), (1 << 64) - 1),
    "max_tokens": (1, 1 << 30),
    "logprobs": (0, 1 << 20),
    "prompt_logprobs": (0, 1 << 20),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


def make(**settings: Any) -> SamplingParams:
    return SamplingParams(**settings)


def test_defaults() -> None:
    params = make()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), {})
    assert not params.greedy and make(temperature=0).greedy


@pytest.mark.parametrize("field", [*INTEGERS, *NUMBERS])
def test_the_limits_of_a_number_are_inside(field: str) -> None:
    for value in (INTEGERS | NUMBERS)[field]:
        assert getattr(make(**{field: value}), field) == value
    if field in OPTIONAL:
        assert getattr(make(**{field: None}), field) is None


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("wrong", ["below", "above", 1.5, "1", True, [1], math.nan])
def test_other_whole_numbers_are_refused(field: str, wrong: Any) -> None:
    low, high = INTEGERS[field]
    value = {"below": low - 1, "above": high + 1}.get(wrong, wrong) if isinstance(wrong, str) else wrong
    with pytest.raises(
        RequestError, match=f"^{field}=.* is invalid: use a whole number from {low} to {high}$"
    ) as caught:
        make(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("field", [*NUMBERS, "top_p"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, "1", True, None, [0.5], 1j, 1000, -3])
def test_other_numbers_are_refused(field: str, wrong: Any) -> None:
    with pytest.raises(RequestError, match=f"^{field}="):
        make(**{field: wrong})


@pytest.mark.parametrize("value", [1e-6, 0.5, 1, 1.0])
def test_top_p(value: float) -> None:
    assert make(top_p=value).top_p == value


def test_top_p_of_zero_keeps_no_token_and_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p=0.0 is invalid: use a number above 0"):
        make(top_p=0.0)


def test_numbers_too_large_for_a_float_are_refused_like_others() -> None:
    with pytest.raises(RequestError, match="temperature"):
        make(temperature=10**400)


def test_min_tokens_stay_within_max_tokens() -> None:
    assert make(min_tokens=16).min_tokens == 16
    assert make(min_tokens=1 << 30, max_tokens=None).min_tokens == 1 << 30
    with pytest.raises(RequestError, match="min_tokens=17 is invalid: use at most max_tokens=16"):
        make(min_tokens=17)
    for wrong in (-1, 1.0, None, True):
        with pytest.raises(RequestError, match="min_tokens"):
            make(min_tokens=wrong)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("END", ("END",)),
        (["a", "b"], ("a", "b")),
        ((), ()),
        (None, ()),
        ("x" * MAX_STOP_LENGTH, ("x" * MAX_STOP_LENGTH,)),
    ],
)
def test_stop_strings(given: Any, kept: tuple[str, ...]) -> None:
    assert make(stop=given).stop == kept


@pytest.mark.parametrize(
    "wrong",
    ["", [""], ["x" * (MAX_STOP_LENGTH + 1)], ["x"] * (MAX_STOPS + 1), [1], [None], 5, {"a"}, {"a": 1}, [b"x"]],
)
def test_other_stop_strings_are_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="^stop="):
        make(stop=wrong)


def test_stop_strings_need_text() -> None:
    assert make(stop_token_ids=[1], detokenize=False).stop_token_ids == (1,)
    with pytest.raises(RequestError, match="detokenize=True"):
        make(stop="END", detokenize=False)


@pytest.mark.parametrize("wrong", [[-1], [1.0], ["1"], [True], [None], "1", 7, [0] * (MAX_STOPS + 1), [2**40]])
def test_other_stop_tokens_are_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="^stop_token_ids="):
        make(stop_token_ids=wrong)


def test_logit_bias() -> None:
    assert make(logit_bias={0: -100, 7: 1.5}).logit_bias == {0: -100, 7: 1.5}
    assert make(logit_bias=None).logit_bias == {}


@pytest.mark.parametrize(
    "wrong",
    [{"7": 1.0}, {-1: 1.0}, {7: 101}, {7: math.nan}, {7: "1"}, {7: None}, {True: 1.0}, {1.0: 1.0}, [1], "ab", 5],
)
def test_other_logit_bias_is_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="^logit_bias="):
        make(logit_bias=wrong)


def test_what_was_given_can_change_without_changing_the_request() -> None:
    bias, stop = {1: 1.0}, ["a"]
    params = make(logit_bias=bias, stop=stop)
    bias[2], stop[0] = 2.0, "b"
    assert (params.logit_bias, params.stop) == ({1: 1.0}, ("a",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


def test_a_refusal_does_not_repeat_a_huge_value() -> None:
    with pytest.raises(RequestError) as caught:
        make(stop=["x" * 10**6])
    assert len(str(caught.value)) < 300
    assert isinstance(caught.value, RyzansteinError | ValueError)


def test_unknown_settings_are_known_by_name() -> None:
    assert {"n", "top_p", "detokenize"} <= SamplingParams.field_names()
    assert "best_of" not in SamplingParams.field_names()
    with pytest.raises(TypeError, match="best_of"):
        make(best_of=2)


def test_every_setting_is_described() -> None:
    text = SamplingParams.__doc__ or ""
    assert [name for name in SamplingParams.field_names() if f"    {name}: " not in text] == []


def test_a_request_is_finished_when_all_its_completions_are() -> None:
    outputs = [CompletionOutput(0), CompletionOutput(1)]
    answer = RequestOutput("r", "hi", [1, 2], outputs, RequestTimings(arrived=10.0))
    assert not answer.finished
    outputs[0].finish_reason = "stop"
    assert outputs[0].finished and not answer.finished
    outputs[1].finish_reason = "length"
    assert answer.finished
    assert {output.finish_reason for output in outputs} <= set(FINISH_REASONS)


def test_completions_do_not_share_their_lists() -> None:
    one, other = CompletionOutput(0), CompletionOutput(1)
    one.token_ids.append(5)
    assert other.token_ids == []


def test_time_to_first_token() -> None:
    timings = RequestTimings(arrived=10.0)
    assert timings.time_to_first_token is None
    timings.first_token = 10.25
    assert timings.time_to_first_token == 0.25
