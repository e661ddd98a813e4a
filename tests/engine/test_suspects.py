"""Strikes: who gets one, who loses them, who runs alone and in which order, and who is convicted."""

import pytest

from ryzanstein_jax.engine.scheduler import Scheduler
from ryzanstein_jax.engine.suspects import Suspects, conviction
from ryzanstein_jax.errors import PoisonRequestError
from tests.engine.drive import result, run, sequence
from tests.engine.fake_executor import limits


def grow(suspects: Suspects, one, tokens: int) -> None:
    for _ in range(tokens):
        one.token_ids.append(9)
        suspects.clear_if_past(one)


def test_each_loss_is_one_strike_however_often_a_sequence_was_on_the_devices():
    suspects, one, other = Suspects(), sequence([1]), sequence([2])
    suspects.blame([one, other, one])
    assert (one.num_strikes, other.num_strikes) == (1, 1)
    suspects.blame([one])
    assert (one.num_strikes, other.num_strikes) == (2, 1)
    suspects.blame([])
    assert one.num_strikes == 2


def test_who_has_ended_is_left_in_peace():
    suspects, one = Suspects(), sequence([1])
    one.finish_reason = "abort"
    suspects.blame([one])
    assert one.num_strikes == 0


@pytest.mark.parametrize("strikes", [1, 2, 3])
def test_strikes_are_lost_by_getting_past_all_that_was_in_flight(strikes):
    """Two tokens may have been sampled without the scheduler's knowing; the third one is new."""
    suspects, one = Suspects(), sequence([1, 2, 3])
    for _ in range(strikes):
        suspects.blame([one])
    grow(suspects, one, 2)
    assert one.num_strikes == strikes
    grow(suspects, one, 1)
    assert one.num_strikes == 0 and suspects.alone() is None


def test_with_two_strikes_it_runs_alone_the_first_in_order_first():
    suspects = Suspects()
    later, low, first = sequence([1]), sequence([2], priority=1), sequence([3])
    later.order, first.order = (0, 8, 0), (0, 7, 0)
    suspects.blame([low, later, first])
    assert suspects.alone() is None, "one strike is nothing"
    suspects.blame([low, later, first])
    assert suspects.alone() is first
    suspects.blame([first])
    assert suspects.alone() is first, "it is listed once"
    grow(suspects, first, 3)
    assert suspects.alone() is later
    later.finish_reason = "abort"
    assert suspects.alone() is low
    grow(suspects, low, 3)
    assert suspects.alone() is None


def test_who_was_cleared_may_be_suspected_again():
    suspects, one = Suspects(), sequence([1])
    for _ in range(3):
        suspects.blame([one])
        assert suspects.alone() is None
        suspects.blame([one])
        assert suspects.alone() is one
        grow(suspects, one, 3)
        assert suspects.alone() is None


def test_the_fourth_strike_convicts():
    suspects, one = Suspects(), sequence([1])
    for strikes in range(4):
        assert one.num_strikes == strikes and conviction(one) is None
        suspects.blame([one])
    error = conviction(one)
    assert isinstance(error, PoisonRequestError) and "'r'" in str(error) and "4 times in a row" in str(error)


# -- In the scheduler


def lose(scheduler: Scheduler) -> list:
    """The devices are lost with the next steps on them."""
    for _ in range(2 - scheduler.num_in_flight):
        scheduler.schedule()
    scheduler.blame()
    return scheduler.reset()


def test_only_who_was_on_the_devices_is_blamed():
    scheduler = Scheduler(limits(max_num_seqs=2))
    sequences = [sequence([number], max_tokens=20) for number in range(3)]
    for one in sequences:
        scheduler.add(one)
    assert lose(scheduler) == []
    assert [one.num_strikes for one in sequences] == [1, 1, 0], "the third one waited"


def test_a_chunk_without_a_row_counts_too():
    scheduler = Scheduler(limits(max_prefill_tokens=4))
    one = sequence(range(30))
    scheduler.add(one)
    lose(scheduler)
    assert one.num_strikes == 1


def test_a_suspect_gets_the_pages_of_all():
    """One that was cleared just now holds most of the cache when the next one's turn comes, and gives it back."""
    scheduler = Scheduler(limits(num_pages=9, page_size=4, max_prefill_tokens=64))
    first, second = sequence(range(20), max_tokens=9), sequence(range(20, 40), max_tokens=9)
    for _ in range(2):
        scheduler._suspects.blame([first, second])
    scheduler.add(first)
    scheduler.add(second)
    for number in range(3):
        assert first.num_strikes == 2, number
        assert len(run(scheduler).query_lens) == 1 and first.is_running and not second.is_running
    assert first.num_strikes == 0 and second.num_strikes == 2
    for number in range(3):
        assert second.num_strikes == 2, number
        assert len(run(scheduler).query_lens) == 1 and second.is_running and not first.is_running
    assert second.num_strikes == 0
    assert [len(one.token_ids) for one in (first, second)] == [23, 23], "what it had is kept"
    while scheduler.has_unfinished:
        assert run(scheduler) is not None
    assert [len(one.token_ids) for one in (first, second)] == [29, 29]


def test_the_next_suspect_waits_until_the_last_step_of_the_one_before_is_done():
    scheduler = Scheduler(limits())
    first, second = sequence([1], max_tokens=9), sequence([2], max_tokens=9)
    for _ in range(2):
        scheduler._suspects.blame([first, second])
    scheduler.add(first)
    scheduler.add(second)
    flying = [scheduler.schedule(), scheduler.schedule()]
    while first.num_strikes:
        scheduler.commit(result(flying.pop(0)))
        if first.num_strikes:
            flying.append(scheduler.schedule())
    assert len(flying) == 1 and scheduler.schedule() is None, "else both would be blamed for the next loss"
    scheduler.commit(result(flying.pop()))
    assert len(scheduler.schedule().query_lens) == 1 and second.is_running and not first.is_running


def test_the_convicted_leaves_and_its_error_is_its_own():
    scheduler = Scheduler(limits())
    guilty, other = sequence([1] * 9), sequence([2])
    scheduler.add(guilty)
    for _ in range(3):
        assert lose(scheduler) == []
    scheduler.add(other)
    assert lose(scheduler) == [guilty]
    assert guilty.finish_reason == "error" and isinstance(guilty.error, PoisonRequestError)
    assert not other.finished and other.error is None and other.num_strikes == 0
    while scheduler.has_unfinished:
        assert run(scheduler) is not None
    assert other.finish_reason == "length"


def test_steps_in_flight_end_before_a_suspect_s_turn():
    scheduler = Scheduler(limits())
    suspect = sequence([1] * 3, max_tokens=20)
    scheduler.add(suspect)
    lose(scheduler)
    lose(scheduler)
    plan = scheduler.schedule()
    other = sequence([2], priority=-1, max_tokens=20)
    scheduler.add(other)
    second = scheduler.schedule()
    assert len(second.query_lens) == 1 and suspect.is_running, "who is alone runs ahead as always"
    scheduler.commit(result(plan))
    scheduler.commit(result(second))
    scheduler.check()
    assert not other.is_running
