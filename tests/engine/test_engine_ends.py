"""Aborts, failures, recovery and closing: every request ends, and only those that must."""

import pytest

from ryzanstein_jax.engine.sequence import sampling_key
from ryzanstein_jax.errors import ConfigError, EngineClosedError, RequestError
from ryzanstein_jax.request import SamplingParams
from tests.engine.drive import EOS, LETTERS, engine, finish_all
from tests.engine.fake_executor import FakeExecutor, ScriptedExecutor, limits, reference


def test_abort_answers_whoever_waits():
    one = engine()
    one.add("waiting", [1], SamplingParams(max_tokens=5), priority=1)
    one.add("running", [2], SamplingParams(max_tokens=5, n=2))
    one.step()
    one.step()
    assert one.abort("running")
    assert one.abort("waiting")
    assert not one.abort("running")
    assert not one.abort("never heard of")
    outputs = finish_all(one)
    assert {c.finish_reason for output in outputs.values() for c in output.outputs} == {"abort"}
    assert outputs["running"].outputs[0].token_ids
    assert outputs["running"].error is None
    assert outputs["running"].timings.finished is not None
    assert one.stats().num_pages_used == 0


class BrokenTokenizer:
    """Fails on one token."""

    vocab_size, special_token_ids = 40, frozenset()

    def __init__(self, bad: int):
        self.backend, self.bad = self, bad

    def decode(self, tokens, skip_special_tokens=True):
        if self.bad in tokens:
            raise UnicodeError("broken")
        return "".join(LETTERS[token] for token in tokens)


def test_what_fails_for_one_request_ends_only_that_one():
    class Two(ScriptedExecutor):
        def choose(self, context, key, settings, banned):
            return 25 if context[0] == 1 and len(context) == 3 else 2

    one = engine(Two(limits(), []), tokenizer=BrokenTokenizer(25))
    one.add("bad", [1], SamplingParams(max_tokens=6, n=2))
    one.add("good", [2], SamplingParams(max_tokens=6))
    outputs = finish_all(one)
    assert [c.finish_reason for c in outputs["bad"].outputs] == ["error", "error"]
    assert isinstance(outputs["bad"].error, UnicodeError)
    assert outputs["good"].outputs[0].text == "cccccc"
    assert outputs["good"].error is None


def test_a_stop_string_that_only_the_end_completes_is_a_stop():
    class Bytes(BrokenTokenizer):
        def decode(self, tokens, skip_special_tokens=True):
            return "".join("\ufffd" if token == 25 else LETTERS[token] for token in tokens)

    one = engine(ScriptedExecutor(limits(), [1, 25]), tokenizer=Bytes(-1))
    one.add("r", [1], SamplingParams(max_tokens=2, stop="\ufffd"))
    completion = finish_all(one)["r"].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("b", "stop", "\ufffd")


def test_a_token_that_does_not_exist_ends_its_request():
    class Wild(ScriptedExecutor):
        def choose(self, context, key, settings, banned):
            return 1000 if context[0] == 1 else 2

    one = engine(Wild(limits(), []))
    one.add("bad", [1], SamplingParams(max_tokens=6))
    one.add("good", [2], SamplingParams(max_tokens=6))
    outputs = {}
    while not outputs.get("bad"):
        outputs |= {output.request_id: output for output in one.step() if output.finished}
    assert outputs["bad"].outputs[0].finish_reason == "error"
    assert "1000" in str(outputs["bad"].error)
    one.abort("good")


@pytest.mark.parametrize("where", ["fail_submit", "fail_collect"])
def test_recover_continues_each_request_where_it_was(where):
    executor = FakeExecutor(limits())
    one = engine(executor)
    requests = {"a": ([1, 2, 3], SamplingParams(max_tokens=12, seed=1, logprobs=0)), "b": ([4], SamplingParams(seed=2))}
    for name, (prompt, params) in requests.items():
        one.add(name, prompt, params)
    for _ in range(5):
        one.step()
    setattr(executor, where, True)
    with pytest.raises(ConnectionError):
        one.step()
    with pytest.raises(EngineClosedError, match="the devices are gone"):
        one.step()
    assert one.has_unfinished()
    one.add("late", [5], SamplingParams(seed=3))
    one.recover(FakeExecutor(limits(num_pages=12, max_num_seqs=2, max_rows=4)))
    outputs = finish_all(one)
    for name, (prompt, params) in {**requests, "late": ([5], SamplingParams(seed=3))}.items():
        expected = reference(prompt, params, sampling_key(params.seed), eos=(EOS,))
        completion = outputs[name].outputs[0]
        assert (completion.token_ids, completion.finish_reason) == expected[:2]
    assert len(outputs["a"].outputs[0].logprobs) == len(outputs["a"].outputs[0].token_ids)


def test_recover_with_less_room_ends_what_does_not_fit():
    one = engine()
    one.add("long", list(range(20)), SamplingParams())
    one.add("short", [1], SamplingParams(max_tokens=2))
    one.recover(FakeExecutor(limits(num_pages=3)))
    outputs = finish_all(one)
    assert isinstance(outputs["long"].error, RequestError)
    assert outputs["long"].outputs[0].finish_reason == "error"
    assert outputs["short"].outputs[0].finish_reason == "length"
    with pytest.raises(ConfigError, match="same model"):
        one.recover(FakeExecutor(limits(vocab_size=41)))


def test_an_interrupt_while_waiting_loses_nothing():
    class Interrupted(FakeExecutor):
        interrupt = False

        def collect(self):
            if self.interrupt:
                self.interrupt = False
                raise KeyboardInterrupt
            return super().collect()

    executor = Interrupted(limits())
    one = engine(executor)
    params = SamplingParams(max_tokens=6, seed=0)
    one.add("r", [1], params)
    one.step()
    executor.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        one.step()
    assert finish_all(one)["r"].outputs[0].token_ids == reference([1], params, sampling_key(0), eos=(EOS,))[0]


def test_close_answers_every_request():
    executor = FakeExecutor(limits())
    one = engine(executor)
    one.add("a", [1], SamplingParams(max_tokens=9))
    one.add("b", [2], SamplingParams(max_tokens=9, n=2))
    one.step()
    one.step()
    outputs = {output.request_id: output for output in one.close()}
    assert outputs.keys() == {"a", "b"}
    assert executor.closed
    for output in outputs.values():
        assert isinstance(output.error, EngineClosedError)
        assert [c.finish_reason for c in output.outputs] == ["abort"] * len(output.outputs)
    assert one.close() == []
    assert not one.has_unfinished()
    for call in (one.step, one.recover, lambda: one.add("c", [1], SamplingParams())):
        with pytest.raises(EngineClosedError):
            call()
