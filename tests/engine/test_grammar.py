"""Grammars: what they allow, what they refuse, and that a constrained sequence runs beside others."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzanstein_jax.engine.grammar import Grammars
from ryzanstein_jax.engine.scheduler import Scheduler
from ryzanstein_jax.engine.sequence import sampling_key
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, StructuredOutputsParams
from tests.engine.drive import EOS, LETTERS, engine, finish_all, letter_tokenizer, result, sequence, shape
from tests.engine.fake_executor import FakeExecutor, ScriptedExecutor, forbidden, limits, reference

VOCAB = 40


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(letter_tokenizer(), VOCAB, (EOS,))


def params(**form) -> SamplingParams:
    return SamplingParams(max_tokens=30, structured_outputs=StructuredOutputsParams(**form))


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def allowed(matcher, banned=()) -> str:
    """The letters that may come next; a full stop for the end."""
    tokens = set(range(VOCAB)) - forbidden(matcher.mask(banned), VOCAB)
    return "".join("." if token == EOS else LETTERS[token] for token in sorted(tokens))


def test_a_matcher_walks_its_grammar(grammars):
    grammar = grammars.compile(StructuredOutputsParams(regex="a(b|cd)*e?"))
    one, other = grammar.matcher(), grammar.matcher()
    assert allowed(one) == "a"
    one.accept(0)
    assert allowed(one) == "bce." and not one.ended
    assert allowed(one, [EOS]) == "bce"
    one.accept(LETTERS.index("e"))
    assert one.ended and allowed(one) == "."
    assert allowed(one, [EOS]) == ".", "nothing else is left, so the end may come early"
    assert allowed(other) == "a" and not other.ended, "each walks alone"
    with pytest.raises(RequestError, match="structured_outputs"):
        other.accept(5)


def test_compiled_grammars_are_kept(grammars):
    wanted = StructuredOutputsParams(choice=["yes", "no"])
    assert grammars.compile(wanted) is grammars.compile(StructuredOutputsParams(choice=("yes", "no")))
    for number in range(70):
        grammars.compile(StructuredOutputsParams(regex=f"a{{{number}}}b"))
    assert len(grammars._kept) == 64, "and no more than so many"


@pytest.mark.parametrize(
    "form",
    [
        {}, {"regex": "a", "json_object": True}, {"json_object": False}, {"json_object": 1}, {"regex": ""},
        {"regex": 5}, {"choice": []}, {"choice": "yes"}, {"choice": ["a", 5]}, {"choice": [""]},
        {"choice": ["a"] * (MAX_CHOICES + 1)}, {"json": "{"}, {"json": "[]"}, {"json": {"a": {1}}}, {"json": 5},
        {"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, {"grammar": "\ud800"}, {"json": {"title": "x" * MAX_GRAMMAR_BYTES}},
        {"regex": "a", "disable_any_whitespace": "yes"},
    ],
)  # fmt: skip
def test_parameters_that_are_none(form):
    with pytest.raises(RequestError, match="structured_outputs"):
        StructuredOutputsParams(**form)
    with pytest.raises(RequestError, match="structured_outputs"):
        SamplingParams(structured_outputs=form or {"regex": "a"})


def wide(count: int) -> dict:
    """A schema that has to be multiplied out."""

    def one(name: str, value: int) -> dict:
        return {"type": "object", "properties": {name: {"const": value}}, "required": [name]}

    return {"allOf": [{"anyOf": [one(f"p{i}", j) for j in range(4)]} for i in range(count)]}


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE = {
    "unbalanced": {"regex": "("},
    "many brackets": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "repeated repeats": {"regex": "((a{1000}){1000}){1000}"},
    "intersections": {"grammar": "start: T\nT: " + " & ".join(f"/(.|\\n)*{letter}(.|\\n)*/" for letter in LETTERS)},
    "doubling terminals": {
        "grammar": "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "a"'
    },
    "nested rules": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "no way out": {"grammar": "start: start"},
    "an unknown rule": {"grammar": "start: nothing"},
    "no rules": {"grammar": "::= ::="},
    "slow to convert": {"grammar": "\n" * 100_000 + "::="},
    "brackets to convert": {"grammar": "root ::= " + "(" * 8000},
    "a schema of itself": {"json": {"$ref": "#"}},
    "a schema elsewhere": {"json": {"$ref": "http://127.0.0.1:9/schema"}},
    "a schema in a file": {"json": {"$ref": "file:///etc/hostname"}},
    "an unknown type": {"json": {"type": "number of things"}},
    "an unknown keyword": {"json": {"type": "array", "uniqueItems": True}},
    "impossible bounds": {"json": {"type": "integer", "minimum": 5, "maximum": 4}},
    "a deep schema": {"json": nested(400)},
    "a product": {"json": wide(6)},
    "a larger product": {"json": wide(20)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused(grammars, name):
    with pytest.raises(RequestError, match="structured_outputs") as raised:
        grammars.compile(StructuredOutputsParams(**HOSTILE[name]))
    assert len(str(raised.value)) < 500 and "backtrace" not in str(raised.value)
    assert grammars.compile(StructuredOutputsParams(regex="still there")).matcher() is not None


@pytest.mark.parametrize("regex", ["(a+)+b", "(a|a)*b", "(.*a.{20})+", "([a-z]+)*[0-9]", "(x+x+)+y"])
def test_regular_expressions_that_make_others_backtrack(grammars, regex):
    matcher = grammars.compile(StructuredOutputsParams(regex=regex)).matcher()
    for _ in range(200):
        if matcher.ended:
            break
        tokens = sorted(set(range(VOCAB)) - forbidden(matcher.mask(), VOCAB))
        matcher.accept(tokens[0])


def test_a_grammar_that_grows_too_complex_ends_its_own_request_only(grammars, monkeypatch):
    """Whatever bound it hits, and whenever: the library then calls the matcher broken for good."""
    running = engine(tokenizer=letter_tokenizer())
    running.add("bad", [1, 2], params(regex="[a-z]{20}"))
    running.add("good", [1, 2], params(regex="[a-z]{4}"))
    running.step()
    matcher = running._requests["bad"].sequences[0].matcher
    with pytest.raises(RequestError):
        matcher.accept(EOS)  # which breaks it
    outputs = finish_all(running)
    assert isinstance(outputs["bad"].error, RequestError) and outputs["bad"].outputs[0].finish_reason == "error"
    assert outputs["good"].error is None and len(outputs["good"].outputs[0].text) == 4
    assert running.stats().num_pages_used == 0


def test_a_tokenizer_that_it_can_t_read_is_named():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(RequestError, match="tokenizer"):
        Grammars(Tokenizer(backend), 2, (1,)).compile(StructuredOutputsParams(regex="a"))
    with pytest.raises(RequestError, match="tokenizer"):
        engine().add("r", [1], params(regex="a"))


def test_a_vocabulary_may_have_more_tokens_than_the_model_or_fewer():
    for size in (30, 70):
        matcher = Grammars(letter_tokenizer(), size, (EOS,)).compile(StructuredOutputsParams(regex="[a-z]+")).matcher()
        assert len(matcher.mask()) == -(-max(size, 40) // 32)
        assert set(range(size)) - forbidden(matcher.mask(), min(size, 40)) >= set(range(26))


def test_a_constrained_sequence_sits_out_the_step_ahead_and_others_do_not(grammars):
    scheduler = Scheduler(limits())
    free, bound = sequence([1, 2], max_tokens=9), sequence([3, 4], max_tokens=9)
    bound.matcher = grammars.compile(StructuredOutputsParams(regex="[a-j]{9}")).matcher()
    scheduler.add(free)
    scheduler.add(bound)
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert [shape(plan) for plan in plans] == [(0, [2, 2]), (1, [1])], "its second token needs the first one"
    assert plans[0].mask.shape == (2, 2) and plans[1].mask.shape == (0, 0)
    assert forbidden(plans[0].mask[0], VOCAB) == set(), "the free one may write anything"
    assert forbidden(plans[0].mask[1], VOCAB) == set(range(10, 40))
    scheduler.commit(result(plans[0]))
    plans.append(scheduler.schedule())
    assert shape(plans[2]) == (2, [1, 1])
    scheduler.commit(result(plans[1]))
    scheduler.commit(result(plans[2]))
    assert free.token_ids[2:] == [9, 9, 9] and bound.token_ids[2:] == [9, 9]


def test_constrained_sequences_alone_wait_for_their_tokens(grammars):
    scheduler = Scheduler(limits())
    bound = sequence([3, 4], max_tokens=9)
    bound.matcher = grammars.compile(StructuredOutputsParams(regex="[a-j]{3}")).matcher()
    scheduler.add(bound)
    for _ in range(3):
        plan = scheduler.schedule()
        assert scheduler.schedule() is None
        scheduler.commit(result(plan))
    assert (bound.finish_reason, bound.stop_reason) == ("stop", None)
    assert not scheduler.has_unfinished and scheduler.pool.num_used == 0


def test_what_ends_a_completion():
    tokens = [*ids("ab"), EOS]
    for form, script, more, text, reason in [
        ({"regex": "ab"}, ids("ab"), {}, "ab", "stop"),  # whole: nothing could follow
        ({"regex": "ab+"}, tokens, {}, "ab", "stop"),  # the end-of-sequence token, where it is allowed
        ({"regex": "ab+"}, ids("abbb"), {"max_tokens": 3}, "abb", "length"),
        ({"regex": "ab+"}, ids("abbb"), {"stop": ("bb",)}, "a", "stop"),
        ({"regex": "ab"}, tokens, {"min_tokens": 9}, "ab", "stop"),  # the grammar knows better
        ({"regex": "(ab)?"}, [EOS], {}, "", "stop"),
        ({"regex": "ab+"}, tokens, {"ignore_eos": True}, "ab", "stop"),
    ]:
        executor = ScriptedExecutor(limits(), script)
        running = engine(executor, tokenizer=letter_tokenizer())
        asked = SamplingParams(**{"max_tokens": 9, **more, "structured_outputs": StructuredOutputsParams(**form)})
        running.add("r", [1, 2], asked)
        (completion,) = finish_all(running)["r"].outputs
        assert (completion.text, completion.finish_reason) == (text, reason), (form, more)


def test_min_tokens_keeps_the_end_away_while_there_is_a_choice():
    running = engine(tokenizer=letter_tokenizer())
    asked = SamplingParams(max_tokens=20, min_tokens=12, structured_outputs=StructuredOutputsParams(regex="[a-c]*"))
    running.add("r", [1], asked)
    assert len(finish_all(running)["r"].outputs[0].text) >= 12


FORMS = ["[a-f]{2,9}", "(ab|c)*d?", "a{12}", "(a|b)+c", "[a-z]+"]
scripts = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9), st.sampled_from([None, *FORMS]), st.integers(1, 2)),
        st.tuples(st.just("step"), st.integers(1, 5), st.none(), st.none()),
        st.tuples(st.just("recover"), st.none(), st.none(), st.none()),
    ),
    min_size=3,
    max_size=14,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(scripts, st.integers(4, 20))
def test_each_gets_its_own_tokens_whatever_is_preempted_or_lost(script, pages):
    """Free and constrained requests on a cache that is often too small, on devices that are lost now and then."""
    machine = limits(num_pages=pages, max_model_len=24)
    grammars, running = Grammars(letter_tokenizer(), VOCAB, (EOS,)), engine(
        FakeExecutor(machine), tokenizer=letter_tokenizer()
    )  # fmt: skip
    asked, outputs = {}, {}

    def step() -> None:
        outputs.update({output.request_id: output for output in running.step()})

    for action, first, form, n in script:
        if action == "add":
            chosen = {} if form is None else {"structured_outputs": StructuredOutputsParams(regex=form)}
            prompt = [(first * 7 + place) % 26 for place in range(1 + first)]
            wanted = SamplingParams(n=n, seed=first, max_tokens=12, logprobs=first % 2 or None, **chosen)
            name = str(len(asked))
            try:
                running.add(name, prompt, wanted)
            except RequestError:
                continue  # the cache is too small for it
            asked[name] = prompt, wanted
        elif action == "step":
            for _ in range(first):
                step()
        else:
            running.recover(FakeExecutor(machine))
    for _ in range(5000):
        if not running.has_unfinished():
            break
        step()
    assert outputs.keys() == asked.keys()
    for name, (prompt, wanted) in asked.items():
        form = wanted.structured_outputs
        for completion in outputs[name].outputs:
            matcher = None if form is None else grammars.compile(form).matcher()
            key = sampling_key(wanted.seed, completion.index)
            longest = running._scheduler.max_length
            tokens, reason, _ = reference(prompt, wanted, key, eos=(EOS,), max_length=longest, matcher=matcher)
            assert (completion.token_ids, completion.finish_reason) == (tokens, reason)
    assert running.stats().num_pages_used == 0


def test_a_mask_crosses_as_bytes():
    running = engine(executor := FakeExecutor(limits()), tokenizer=letter_tokenizer())
    running.add("r", [1], params(regex="[a-z]{3}"))
    running.step()
    plan = executor.plans[0]
    assert plan.full and plan.mask.dtype == np.uint32 and plan.mask.shape == (1, 2)
    assert len(plan.to_bytes()) < 400


def test_json_text_and_object_are_one(grammars):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert StructuredOutputsParams(json=schema) == StructuredOutputsParams(json=json.dumps(schema))


def test_the_leader_s_side_needs_no_jax():
    code = "import sys, ryzanstein_jax.engine.grammar; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
