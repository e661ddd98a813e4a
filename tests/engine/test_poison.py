"""A request that kills the devices ends alone; one that was merely there when they died never does."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ryzanstein_jax.config import OrchestratorConfig
from ryzanstein_jax.errors import PoisonRequestError
from tests.engine.drive import EOS, engine
from tests.engine.fake_executor import limits
from tests.engine.restarting import Client, Poisoned, Restarting
from tests.engine.test_properties import machines, params, prompts

#: Nobody else's prompt begins so.
POISON = [13, 13, 13]
#: One request must not use up the restarts of all.
HANDFUL = OrchestratorConfig().max_restart_attempts - 1


def at_length(length: int):
    """Breaks the devices with the poison's token of this number, counted from 0."""
    return lambda seen: seen[:3] == POISON[: len(seen)] and len(seen) > max(length, 2)


def crowd(executor: Restarting, *, eos=(EOS,), **config) -> Client:
    one = Client(engine(executor, eos=eos, **config), eos)
    one.add("a", [1, 2, 3])
    one.add("twins", list(range(20)), n=2, max_tokens=10)
    one.add("b", [4] * 30, logprobs=1, prompt_logprobs=1)
    return one


def verify_convicted(one: Client, executor: Restarting, *guilty: str) -> None:
    one.verify(*guilty)
    for name in guilty:
        output = one.finished[name]
        assert isinstance(output.error, PoisonRequestError) and repr(name) in str(output.error)
        assert all(completion.finished for completion in output.outputs)
        for completion in output.outputs:
            if completion.finish_reason == "error":
                assert completion.token_ids == one.expected(name, completion.index)[0][: len(completion.token_ids)]


@pytest.mark.parametrize("length", [0, 3, 10, 24, 25, 26, 31], ids=lambda length: f"token {length}")
@pytest.mark.parametrize("machine", [{}, {"max_num_seqs": 32, "max_rows": 64, "max_prefill_tokens": 200}])
@pytest.mark.parametrize("caching", [True, False])
def test_a_request_that_kills_in_its_prompt_or_later_ends_alone(length, machine, caching):
    executor = Poisoned(at_length(length), limits(max_prefills=4, num_pages=65, **machine))
    one = crowd(executor, eos=(), enable_prefix_caching=caching)
    one.add("poison", POISON + list(range(22)), max_tokens=20)
    for number in range(4):
        one.add(f"later {number}", [number, number, 6])
    one.run()
    verify_convicted(one, executor, "poison")
    assert len(one.finished["poison"].outputs[0].token_ids) == max(0, length - 25)
    assert 2 < executor.num_deaths <= HANDFUL


def test_alone_it_is_convicted_too():
    executor = Poisoned(at_length(0))
    one = Client(engine(executor))
    one.add("poison", POISON)
    one.run()
    verify_convicted(one, executor, "poison")
    assert executor.num_deaths <= HANDFUL
    one.add("next", [1])
    one.run()
    one.verify("poison")


def test_all_completions_of_a_request_share_its_end():
    executor = Poisoned(at_length(5))
    one = crowd(executor)
    one.add("poison", POISON, n=3, ignore_eos=True)
    one.run()
    verify_convicted(one, executor, "poison")
    assert executor.num_deaths <= HANDFUL


def test_the_same_again_is_convicted_again():
    """A client that tries again is no reason to forgive."""
    executor = Poisoned(at_length(4))
    one = crowd(executor, eos=())
    for number in range(3):
        name = f"poison {number}"
        one.add(name, POISON)
        one.run()
        assert executor.num_deaths <= HANDFUL * (number + 1)
    verify_convicted(one, executor, "poison 0", "poison 1", "poison 2")


def test_two_at_once_are_both_found():
    executor = Poisoned(at_length(4))
    one = crowd(executor, eos=())
    one.add("first", POISON)
    one.add("second", [*POISON, 7])
    one.run()
    verify_convicted(one, executor, "first", "second")
    assert executor.num_deaths <= 2 * HANDFUL


def test_who_is_aborted_is_not_convicted():
    executor = Poisoned(at_length(0))
    one = crowd(executor)
    one.add("poison", POISON)
    while executor.num_deaths < 2:
        one.step()
    one.engine.abort("poison")
    one.run()
    one.verify("poison")
    assert one.finished["poison"].error is None
    assert executor.num_deaths == 2


def test_suspects_run_alone_until_they_are_cleared():
    """While a suspect runs, nobody else is on the devices: else they would be blamed together again."""
    crowds = []

    class Watched(Poisoned):
        def submit(self, plan):
            deaths = self.num_deaths
            super().submit(plan)
            if deaths == 2:
                crowds.append(len(plan.query_lens))

    executor = Watched(at_length(2), limits(max_prefills=4, max_num_seqs=8, max_rows=16, num_pages=65))
    one = Client(engine(executor, eos=()), ())
    for number in range(3):
        one.add(f"r{number}", [number])
    one.add("poison", POISON)
    one.run()
    verify_convicted(one, executor, "poison")
    assert set(crowds) == {1} and len(crowds) >= 4, "three innocents were cleared, then it was its turn"


def test_the_innocent_run_together_again_once_they_are_cleared():
    executor = Poisoned(at_length(2), limits(max_prefills=4, max_num_seqs=8, max_rows=16, num_pages=65))
    one = Client(engine(executor, eos=()), ())
    for number in range(3):
        one.add(f"r{number}", [number], max_tokens=40)
    one.add("poison", POISON)
    while "poison" not in one.finished:
        one.step()
    before = executor.num_steps
    one.run()
    one.verify("poison")
    assert executor.num_steps - before < 60, "forty steps for all of them, not for each"


def test_a_long_run_with_rare_deaths_convicts_nobody():
    """Far more deaths than convict, but something is done between them."""
    executor = Restarting(deaths=range(25, 2000, 25))
    one = Client(engine(executor, eos=()), ())
    for number in range(12):
        one.add(f"r{number}", [number, 1, 2], max_tokens=50)
    one.run()
    one.verify()
    assert executor.num_deaths > 10


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    machines,
    st.lists(st.tuples(prompts, params, st.integers(0, 2)), min_size=1, max_size=6),
    st.lists(st.integers(0, 40), max_size=3),
    st.integers(0, 2),
    st.booleans(),
)
def test_up_to_three_deaths_at_any_time_convict_nobody_and_lose_nothing(machine, requests, deaths, not_ready, caching):
    executor = Restarting(machine, deaths=deaths, not_ready=not_ready)
    one = Client(engine(executor, eos=(3,), enable_prefix_caching=caching), (3,))
    one.max_length = one.engine._scheduler.max_length
    for number, (prompt, wanted, priority) in enumerate(requests):
        if len(prompt) < one.max_length:
            name = f"r{number}"
            one.engine.add(name, prompt, wanted, priority=priority)
            one.asked[name], one.streams[name] = (prompt, wanted), [[] for _ in range(wanted.n)]
    one.run(20_000)
    one.verify()
    for name, (prompt, wanted) in one.asked.items():
        output = one.finished[name]
        assert output.prompt_logprobs is None or len(output.prompt_logprobs) == len(prompt)
        for completion in output.outputs:
            assert wanted.logprobs is None or len(completion.logprobs) == len(completion.token_ids)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    machines,
    st.lists(st.tuples(prompts, params), min_size=1, max_size=5),
    st.integers(0, 12),
    st.integers(0, 5),
)
def test_whatever_runs_beside_it_the_poison_is_found_and_nobody_else(machine, requests, length, where):
    poison = [11, 0, 11]
    executor = Poisoned(lambda seen: seen[:3] == poison[: len(seen)] and len(seen) > max(length, 2), machine)
    one = Client(engine(executor, eos=(3,)), (3,))
    one.max_length = one.engine._scheduler.max_length
    requests.insert(min(where, len(requests)), None)
    for number, entry in enumerate(requests):
        if entry is None:
            if one.max_length > 4:
                one.add("poison", poison, ignore_eos=True, max_tokens=max(1, length - 1))
        elif len(entry[0]) < one.max_length and entry[0][:1] != [11]:
            one.engine.add(f"r{number}", *entry)
            one.asked[f"r{number}"], one.streams[f"r{number}"] = entry, [[] for _ in range(entry[1].n)]
    one.run(20_000)
    if executor.num_deaths:
        verify_convicted(one, executor, "poison")
        assert executor.num_deaths <= HANDFUL
    else:
        one.verify()
