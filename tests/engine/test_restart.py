"""Devices die and come back: every request goes on with the tokens that it would have got, each exactly once."""

import numpy as np
import pytest

from ryzanstein_jax.errors import EngineClosedError, RecoveryExhaustedError, RequestError
from ryzanstein_jax.request import PoolingParams, SamplingParams
from tests.engine.drive import EOS, engine, finish_all, letter_tokenizer
from tests.engine.fake_executor import FakeExecutor, embedding, limits, logprob
from tests.engine.restarting import Client, Restarting


def client(executor: Restarting, *, eos=(EOS,), **config) -> Client:
    return Client(engine(executor, eos=eos, **config), eos)


def crowd(executor: Restarting) -> Client:
    """More requests than run at once, of all kinds."""
    one = client(executor)
    one.add("short", [1])
    one.add("long", list(range(30)), max_tokens=20)
    one.add("twins", [7, 8, 9], n=3, max_tokens=9)
    one.add("scored", list(range(3, 22)), logprobs=2, prompt_logprobs=1)
    one.add("patient", [5, 6], min_tokens=10, stop_token_ids=(3, 4, 5, 6, 7, 8, 9, 10))
    one.add("stopped", [6, 6], stop_token_ids=tuple(range(20)), max_tokens=None)
    one.add("penalized", [4] * 9, presence_penalty=0.5, temperature=0.0, ignore_eos=True)
    return one


def verify_logprobs(one: Client, name: str) -> None:
    prompt, _ = one.asked[name]
    output = one.finished[name]
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
        assert entry[prompt[position]].logprob == logprob(prompt[:position], prompt[position])
    (completion,) = output.outputs
    context = list(prompt)
    assert len(completion.logprobs) == len(completion.token_ids)
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].logprob == logprob(context, token)
        context.append(token)
    total = sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def num_calls_undisturbed() -> int:
    executor = Restarting()
    one = crowd(executor)
    one.run()
    one.verify()
    assert executor.num_deaths == 0
    return executor.num_calls


CALLS = num_calls_undisturbed()


@pytest.mark.parametrize("death", range(0, CALLS, 1 if CALLS < 80 else 2))
@pytest.mark.parametrize("not_ready", [0, 3])
def test_whenever_devices_die_every_request_gets_its_tokens(death, not_ready):
    executor = Restarting(deaths=[death], not_ready=not_ready)
    one = crowd(executor)
    one.run()
    one.verify()
    verify_logprobs(one, "scored")
    assert executor.num_deaths == 1 and len(executor.replayed) == 1


@pytest.mark.parametrize("first", range(3, CALLS, 5))
@pytest.mark.parametrize("gap", [1, 2, 3, 7])
def test_a_second_death_soon_after_the_first_changes_nothing(first, gap):
    """At the first call of the new devices, while they replay, or just after."""
    executor = Restarting(deaths=[first, first + gap])
    one = crowd(executor)
    one.run()
    one.verify()
    verify_logprobs(one, "scored")
    assert executor.num_deaths == 2


def test_the_executor_is_told_how_many_requests_are_replayed():
    executor = Restarting(deaths=[4], not_ready=2)
    one = client(executor)
    for name in "abc":
        one.add(name, [1, 2], n=2)
    one.run()
    assert executor.replayed == [3]


def test_nobody_waits_long_for_devices_that_do_not_come():
    executor = Restarting(deaths=[3], not_ready=5)
    one = client(executor)
    one.add("r", [1])
    for _ in range(3):
        one.step()
    assert executor.dead
    steps = 0
    while executor.dead:
        assert one.engine.step() == [], "the caller gets a turn, and nothing is made up"
        assert one.engine.has_unfinished()
        steps += 1
    assert steps == 6
    one.run()
    one.verify()


def test_a_token_is_handed_out_at_once_though_devices_die_in_the_same_step():
    """The step that hands them over fails, after others were read."""
    executor = Restarting()
    one = client(executor)
    one.add("r", [1])
    one.step()
    one.step()
    before = list(one.streams["r"][0])
    executor.die()
    one.run()
    one.verify()
    assert len(before) == 1 and executor.num_steps > 2


@pytest.mark.parametrize("include", [True, False])
def test_stop_strings_are_found_across_a_death(include):
    """Half a stop string was seen before it, and held back."""

    def run(stop: str | None, *deaths: int) -> list[tuple]:
        one = client(Restarting(deaths=deaths), eos=(), tokenizer=letter_tokenizer())
        params = dict(stop=stop, include_stop_str_in_output=include) if stop else {}
        one.add("r", [1, 2], max_tokens=20, n=2, **params, min_tokens=3)
        one.run()
        return [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in one.finished["r"].outputs]

    text = run(None)[0][0]
    stop = text[8:16]
    undisturbed = run(stop)
    assert undisturbed[0][2:] == ("stop", stop) and undisturbed[0][0] == text[: 16 if include else 8]
    for death in range(30):
        assert run(stop, death) == undisturbed
        assert run(stop, death, death + 2) == undisturbed


# -- While nothing runs


def lost(one: Client, executor: Restarting, steps: int = 4) -> None:
    for _ in range(steps):
        one.step()
    executor.die()
    one.step()
    assert not executor.replayed


def test_aborts_work_while_devices_are_gone():
    executor = Restarting(not_ready=3)
    one = client(executor)
    for name in ("kept", "running", "waiting"):
        one.add(name, [1, 2, 3], n=2 if name == "running" else 1)
    lost(one, executor)
    for name in ("running", "waiting"):
        assert one.engine.abort(name)
    one.step()
    assert set(one.finished) == {"running", "waiting"}, "nobody waits for devices to be told that it is over"
    one.run()
    one.verify("running", "waiting")
    for name in ("running", "waiting"):
        output = one.finished[name]
        assert output.error is None and {c.finish_reason for c in output.outputs} == {"abort"}
        for completion in output.outputs:
            assert completion.token_ids == one.expected(name, completion.index)[0][: len(completion.token_ids)]
    assert executor.replayed == [1]


def test_with_everything_aborted_nothing_is_left_to_do():
    executor = Restarting(not_ready=100)
    one = client(executor)
    one.add("r", [1])
    lost(one, executor)
    one.engine.abort("r")
    one.step()
    assert not one.engine.has_unfinished(), "nobody needs devices"
    one.add("later", [2])
    executor._waits = 0
    one.run()
    one.verify("r")


def test_new_requests_may_come_while_devices_are_gone():
    executor = Restarting(not_ready=3)
    one = client(executor)
    one.add("old", [1, 2, 3])
    lost(one, executor)
    one.add("new", [4] * 20, logprobs=0, prompt_logprobs=0)
    with pytest.raises(RequestError):
        one.engine.add("bad", [99], SamplingParams())
    one.run()
    one.verify()
    verify_logprobs(one, "new")
    assert executor.replayed == [2]


def test_devices_that_die_while_idle_are_noticed_by_the_next_request():
    executor = Restarting(not_ready=2)
    one = client(executor)
    one.add("before", [1])
    one.run()
    executor.die()
    assert not one.engine.has_unfinished()
    assert one.engine.step() == [] and executor.dead, "an idle engine asks nothing of them"
    one.add("after", [2])
    one.run()
    one.verify()
    assert executor.num_deaths == 1


def test_devices_that_die_with_the_last_step_leave_nothing_to_wait_for():
    """A request has ended, a step with a token too many is still out."""
    executor = Restarting()
    one = client(executor, eos=range(40))
    one.add("r", [1])
    while "r" not in one.finished:
        one.step()
    assert one.engine.has_unfinished()
    executor.die()
    one.run()
    one.verify()
    one.add("next", [2])
    one.run()
    one.verify()


def test_closing_while_devices_are_gone_answers_everybody():
    executor = Restarting(not_ready=100)
    one = client(executor)
    one.add("r", [1])
    lost(one, executor)
    (output,) = one.engine.close()
    assert isinstance(output.error, EngineClosedError) and executor.closed


# -- Limits that shrink


def test_a_smaller_batch_goes_on():
    small = limits(max_num_seqs=2, max_prefill_tokens=5, max_prefills=1, max_rows=3)
    for death in range(1, 40, 4):
        executor = Restarting(deaths=[death], next_limits=[small])
        one = crowd(executor)
        one.run()
        one.verify()
        verify_logprobs(one, "scored")


def test_a_smaller_cache_ends_what_does_not_fit_and_cuts_what_would_outgrow_it():
    executor = Restarting(deaths=[7], next_limits=[limits(num_pages=6)])  # 20 tokens, 21 with the last one
    one = client(executor, eos=())
    one.add("fits", [1], max_tokens=8)
    one.add("grows", list(range(12)), max_tokens=30)
    one.add("had some", list(range(20)), max_tokens=30)
    one.add("had none", list(range(30)), max_tokens=30)
    one.add("waits", [3], max_tokens=8)
    one.run()
    one.verify("grows", "had some", "had none")
    for name, reason in (("grows", "length"), ("had some", "length"), ("had none", "error")):
        completion = one.finished[name].outputs[0]
        assert completion.finish_reason == reason, name
        assert completion.token_ids == one.expected(name)[0][: len(completion.token_ids)]
        assert isinstance(one.finished[name].error, RequestError) == (reason == "error")
    assert len(one.finished["grows"].outputs[0].token_ids) == 9
    assert 1 <= len(one.finished["had some"].outputs[0].token_ids) < 10
    with pytest.raises(RequestError, match="use at most 20"):
        one.add("too long", list(range(21)))


def test_limits_may_grow_again():
    small = limits(num_pages=20, max_num_seqs=1, max_prefills=1, max_rows=2)
    executor = Restarting(deaths=[9, 20], next_limits=[small, limits()])
    one = client(executor)
    for number in range(5):
        one.add(f"r{number}", [number, 5, 6])
    one.run()
    one.verify()
    assert executor.num_deaths == 2
    one.add("long", list(range(40)))
    one.run()
    one.verify()


# -- Devices that do not come back


@pytest.mark.parametrize("restarts", [0, 2])
def test_when_there_are_no_more_devices_every_request_is_told(restarts):
    deaths = [5, 12, 19]
    executor = Restarting(deaths=deaths, restarts=restarts, not_ready=1)
    one = client(executor, eos=())
    one.add("running", [1, 2], n=2, max_tokens=40)
    one.add("other", [3], max_tokens=40)
    for number in range(4):
        one.add(f"waiting {number}", [4, number], max_tokens=40)
    one.run()
    assert one.finished.keys() == one.asked.keys()
    for name, output in one.finished.items():
        assert isinstance(output.error, RecoveryExhaustedError)
        assert {completion.finish_reason for completion in output.outputs} == {"error"}
        for completion in output.outputs:
            assert completion.token_ids == one.expected(name, completion.index)[0][: len(completion.token_ids)]
    assert one.streams["running"][0], "what it had is kept"
    assert executor.num_calls == deaths[restarts] + 1, "the dead are left in peace"
    with pytest.raises(RecoveryExhaustedError, match="gave up"):
        one.engine.add("later", [1], SamplingParams())
    for _ in range(50):
        with pytest.raises(RecoveryExhaustedError) as caught:
            one.engine.add("later", [1], SamplingParams())
    assert len(caught.traceback) < 10, "the error does not grow with each request that is turned away"
    assert not one.engine.has_unfinished() and one.engine.step() == []
    assert one.engine.close() == [] and executor.closed


def test_other_devices_may_still_be_given_to_it():
    executor = Restarting(deaths=[3], restarts=0)
    one = client(executor)
    one.add("lost", [1])
    one.run()
    one.engine.recover(FakeExecutor(limits()))
    one.add("later", [2])
    one.run()
    one.verify("lost")


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_those_of_an_undisturbed_run(pooling):
    """Whichever call the devices are lost at: between chunks, with the last one in flight, before any."""
    prompts = {f"{count}": [count % 7 + place % 11 for place in range(count)] for count in (1, 15, 16, 17, 45)}
    for death in range(16):
        executor = Restarting(deaths={death, death + 3})
        made = engine(executor)
        for name, prompt in prompts.items():
            made.add(name, prompt, PoolingParams(pooling=pooling))
        found = finish_all(made)
        assert executor.num_deaths or death > 8
        for name, prompt in prompts.items():
            np.testing.assert_array_equal(found[name].embedding, embedding(prompt, pooling))
            assert found[name].error is None
        assert made.stats().num_pages_used == 0


def test_a_pause_lasts_from_the_loss_to_the_next_token_of_each_request():
    one = client(Restarting(deaths=(8,), not_ready=3))
    one.add("before", [1, 2], max_tokens=2, ignore_eos=True)
    one.add("during", [3, 4], max_tokens=12, ignore_eos=True)
    one.run()
    assert one.engine.add("after", [5], SamplingParams(max_tokens=2)) is None
    after = finish_all(one.engine)["after"]
    timings = {name: output.timings for name, output in one.finished.items()}
    assert timings["before"].pauses == after.timings.pauses == []
    ((lost, resumed),) = timings["during"].pauses
    assert timings["during"].first_token < lost < resumed < timings["during"].finished
    gone = client(Restarting(deaths=(4, 5), restarts=0))  # it ends without a token
    gone.add("failed", [1, 2, 3])
    gone.run()
    ((lost, resumed),) = gone.finished["failed"].timings.pauses
    assert resumed == gone.finished["failed"].timings.finished
