import pytest

from ryzanstein_jax.engine.sequence import drawn_seed, sampling_key
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.request import RequestOutput, SamplingParams
from tests.engine.drive import EOS, LETTERS, engine, finish_all, letter_tokenizer
from tests.engine.fake_executor import FakeExecutor, ScriptedExecutor, limits, logprob, reference, top_tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return letter_tokenizer()


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def script(text: str, tokenizer: Tokenizer | None = None, eos: bool = False, **params) -> RequestOutput:
    """The output of a request whose tokens are the letters of a text."""
    tokens = ids(text) + [EOS] * eos
    one = engine(ScriptedExecutor(limits(), tokens), tokenizer=tokenizer)
    one.add("r", [1, 2], SamplingParams(**{"max_tokens": len(tokens), **params}))
    return finish_all(one)["r"]


def test_the_next_step_is_handed_over_before_the_last_one_is_read():
    executor = FakeExecutor(limits())
    one = engine(executor)
    one.add("r", [1, 2, 3], SamplingParams(max_tokens=3))
    assert one.step() == [], "nothing to read yet"
    assert len(executor.plans) == 1
    (output,) = one.step()
    assert len(executor.plans) == 2
    assert len(output.outputs[0].token_ids) == 1
    (again,) = one.step()
    assert again is output
    assert len(output.outputs[0].token_ids) == 2
    assert not output.finished
    one.step()
    assert output.finished
    assert len(executor.plans) == 3
    assert not one.has_unfinished()


def test_outputs_are_those_of_each_request_alone():
    one = engine()
    prompts = {f"r{i}": [i, 5, 6, 7, 8, 9][: i + 1] for i in range(6)}
    params = SamplingParams(max_tokens=7, seed=3)
    for name, prompt in prompts.items():
        one.add(name, prompt, params)
    outputs = finish_all(one)
    for name, prompt in prompts.items():
        tokens, reason, _ = reference(prompt, params, sampling_key(3), eos=(EOS,))
        completion = outputs[name].outputs[0]
        assert (completion.token_ids, completion.finish_reason) == (tokens, reason)


def test_requests_without_a_seed_draw_one_each_from_the_engines():
    params = SamplingParams(max_tokens=4)
    outputs = []
    for seed in (0, 0, 1):
        one = engine(seed=seed)
        one.add("a", [1], params)
        one.add("b", [1], params)
        outputs.append([output.outputs[0].token_ids for output in finish_all(one).values()])
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0] == [
        reference([1], params, sampling_key(drawn_seed(0, number)), eos=(EOS,))[0] for number in (0, 1)
    ]


def test_n_completions_share_the_prompt_and_differ():
    executor = FakeExecutor(limits(max_prefill_tokens=64))
    one = engine(executor)
    params = SamplingParams(n=3, seed=5, max_tokens=4)
    one.add("r", list(range(17)), params)
    completions = finish_all(one)["r"].outputs
    expected = [reference(list(range(17)), params, sampling_key(5, i), eos=(EOS,))[0] for i in range(3)]
    assert [c.token_ids for c in completions] == expected
    assert expected[0] != expected[1]
    assert [c.index for c in completions] == [0, 1, 2]
    assert one.stats().num_prefix_hits == 32, "two siblings found 16 tokens each"
    single = engine()
    single.add("r", list(range(17)), SamplingParams(seed=5, max_tokens=4))
    assert finish_all(single)["r"].outputs[0].token_ids == expected[0], "n does not change the first"


def test_text_grows_and_ends_with_the_length(tokenizer):
    output = script("hello", tokenizer)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("hello", "length")


def test_without_detokenize_there_is_no_text(tokenizer):
    output = script("hello", tokenizer, detokenize=False)
    assert output.outputs[0].text == ""
    assert output.outputs[0].token_ids == ids("hello")


@pytest.mark.parametrize(("include", "text"), [(False, "he"), (True, "hello")])
def test_a_stop_string_cuts_the_text(tokenizer, include, text):
    completion = script("hellozzz", tokenizer, stop=["llo", "q"], include_stop_str_in_output=include).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", "llo")
    assert completion.token_ids == ids("hello")


def test_a_stop_string_at_the_very_end_is_a_stop(tokenizer):
    completion = script("hello", tokenizer, stop="llo").outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("he", "stop", "llo")


def test_half_a_stop_string_at_the_end_is_text(tokenizer):
    completion = script("hell", tokenizer, stop="llo").outputs[0]
    assert (completion.text, completion.finish_reason) == ("hell", "length")


def test_min_tokens_defers_stop_strings(tokenizer):
    completion = script("ababcababab", tokenizer, stop="ab", min_tokens=4).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ababc", "stop", "ab")
    assert completion.token_ids == ids("ababcab")


def test_a_stop_string_frees_the_pages_at_once(tokenizer):
    executor = ScriptedExecutor(limits(), ids("abcdefgh"))
    one = engine(executor, tokenizer=tokenizer)
    one.add("r", [1], SamplingParams(stop="b", max_tokens=8))
    while not any(output.finished for output in one.step()):
        pass
    assert one.stats().num_pages_used == one.stats().num_running == 0
    assert one.has_unfinished(), "a step with a token too many is still out"
    assert one.step() == []
    assert not one.has_unfinished()
    assert len(executor.plans) == 3


@pytest.mark.parametrize(
    ("params", "text", "reason"),
    [
        ({}, "hi", None),
        ({"skip_special_tokens": False}, "hi</s>", None),
        ({"stop_token_ids": [8]}, "h", 8),
        ({"stop_token_ids": [8], "include_stop_str_in_output": True}, "hi", 8),
    ],
)
def test_the_token_that_ends_it_is_in_the_ids_but_not_in_the_text(tokenizer, params, text, reason):
    completion = script("hi", tokenizer, eos=True, max_tokens=9, **params).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", reason)
    assert completion.token_ids == ([*ids("hi"), EOS] if reason is None else ids("hi"))


def test_logprobs_hold_the_chosen_token_and_the_top(tokenizer):
    one = engine(tokenizer=tokenizer)
    prompt = [1, 2, 3]
    one.add("r", prompt, SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, seed=0))
    one.add("plain", [4], SamplingParams(max_tokens=3))
    outputs = finish_all(one)
    assert outputs["plain"].outputs[0].logprobs is None
    assert outputs["plain"].prompt_logprobs is None
    completion, context = outputs["r"].outputs[0], list(prompt)
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(entry)) == token
        assert entry[token].logprob == logprob(context, token)
        assert set(entry) == {token, *top_tokens(context, 40, 2)}
        for rank, other in enumerate(top_tokens(context, 40, 2), start=1):
            if other != token:
                assert entry[other].rank == rank
                assert entry[other].decoded_token == tokenizer.decode([other], False)
        context.append(token)
    assert completion.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    )
    first, *rest = outputs["r"].prompt_logprobs
    assert first is None
    for position, entry in enumerate(rest, start=1):
        assert entry[prompt[position]].logprob == logprob(prompt[:position], prompt[position])
        assert entry[prompt[position]].rank == 7
        assert len(entry) in (1, 2)


def test_timings_and_cached_tokens():
    one = engine()
    for name in ("cold", "warm"):
        one.add(name, list(range(9)), SamplingParams(max_tokens=2))
        output = finish_all(one)[name]
        assert output.num_cached_tokens == (0 if name == "cold" else 8)
        t = output.timings
        assert t.arrived <= t.first_scheduled <= t.first_token <= t.finished
        assert t.time_to_first_token >= 0


@pytest.mark.parametrize(
    ("prompt", "params", "field", "remedy"),
    [
        ([], {}, "prompt_token_ids", "at least one token"),
        ("abc", {}, "prompt_token_ids", "list of token ids"),
        (7, {}, "prompt_token_ids", "list of token ids"),
        ([1, 40], {}, "prompt_token_ids", "token 1 is outside the vocabulary: use ids from 0 to 39"),
        ([-1], {}, "prompt_token_ids", "outside the vocabulary"),
        ([1 << 80], {}, "prompt_token_ids", "whole numbers"),
        ([1.5], {}, "prompt_token_ids", "whole numbers"),
        ([[1], [2, 3]], {}, "prompt_token_ids", "whole numbers"),
        ([[1, 2]], {}, "prompt_token_ids", "whole numbers"),
        ([1] * 64, {}, "prompt_token_ids", "use at most 63"),
        ([1], {"logprobs": 6}, "logprobs", r"at most 5 \(max_logprobs\)"),
        ([1], {"prompt_logprobs": 6}, "prompt_logprobs", "at most 5"),
        ([1], {"logit_bias": {40: 1.0}}, "logit_bias", "below 40"),
        ([1], {"logit_bias": {1: 1, 2: 1, 3: 1}}, "logit_bias", r"at most 2 \(max_logit_bias\)"),
        ([1], {"stop_token_ids": [40]}, "stop_token_ids", "below 40"),
        ([1], {"stop": "x"}, "stop", "no tokenizer"),
    ],
)
def test_a_bad_request_is_refused_before_anything_changes(prompt, params, field, remedy):
    one = engine(max_logprobs=5, max_logit_bias=2)
    with pytest.raises(RequestError, match=remedy) as caught:
        one.add("r", prompt, SamplingParams(**params))
    assert caught.value.field == field
    assert not one.has_unfinished()
    assert one.stats().num_waiting == 0


def test_ids_and_types_are_checked():
    one = engine()
    one.add("r", [1], SamplingParams(max_tokens=1))
    with pytest.raises(RequestError, match=r"request_id='r' .* in use"):
        one.add("r", [1], SamplingParams())
    for name, params, priority in (("", SamplingParams(), 0), (3, SamplingParams(), 0), ("x", {}, 0)):
        with pytest.raises(RequestError):
            one.add(name, [1], params, priority=priority)
    with pytest.raises(RequestError, match="priority"):
        one.add("x", [1], SamplingParams(), priority="high")
    finish_all(one)
    one.add("r", [1], SamplingParams(max_tokens=1))
    assert finish_all(one)["r"].finished, "an id is free again once its request has finished"
