"""Which replica gets a request: by load, by prefix, and by who is there."""

from hypothesis import given
from hypothesis import strategies as st

from ryzanstein_jax.engine.router import Router

PROMPT = list(range(100, 140))


def router(num_replicas: int = 3, num_pages: int = 64) -> Router:
    return Router(num_replicas, 4, num_pages)


def test_the_least_loaded_one_gets_it_and_equals_take_turns():
    made, everyone = router(), [0, 1, 2]
    assert [made.take([], 1, everyone) for _ in range(3)] == [0, 1, 2]
    assert made.loads == [1, 1, 1]
    made.leave(1, 1)
    assert made.take([], 5, everyone) == 1
    assert [made.take([], 1, everyone) for _ in range(4)] == [0, 2, 0, 2]
    assert made.loads == [3, 5, 3]
    for number, load in enumerate([3, 5, 3]):
        made.leave(number, load)
    # Nothing runs: who was chosen longest ago, so that a lonely client's prefixes spread.
    assert [made.take([], 1, everyone) for _ in range(3)] == [1, 0, 2]


def test_only_candidates_are_chosen():
    made = router()
    assert [made.take([], 1, [2]) for _ in range(5)] == [2] * 5
    assert made.take([], 1, [1, 2]) == 1


def test_a_prefix_goes_where_it_was_served_unless_that_one_is_clearly_more_loaded():
    made, everyone = Router(3, 16, 200), [0, 1, 2]
    keys = made.keys([*range(1000)])
    assert made.take(keys, 1, everyone) == 0
    assert [made.take(keys, 1, everyone) for _ in range(4)] == [0] * 4
    assert made.loads == [5, 0, 0]
    other = made.take(keys, 1, everyone)
    assert other == 1, "more than four more than the least loaded: another one computes it too"
    # Two have it now: the less loaded of them gets the next, though the third has nothing to do at all.
    assert made.take(keys, 1, everyone) == other
    made.leave(0, 5)
    assert made.take(keys, 1, everyone) == 0, "of two that have it, the less loaded one"


def test_a_prefix_counts_by_its_length():
    made, everyone = router(num_pages=200), [0, 1, 2]
    short, long = made.keys([1] * 41), made.keys([2] * 130)
    assert len(short) == 10, "40 tokens"
    assert [made.take(short, 1, everyone) for _ in range(4)] == [0, 1, 2, 0], "not worth one sequence more"
    made.leave(0, 2)
    assert made.take(long, 1, everyone) == 0
    assert [made.take(long, 1, everyone) for _ in range(3)] == [0, 0, 1], "128 tokens: two more"
    equal = router()
    equal.leave(equal.take(short, 1, [1]), 1)
    assert equal.take(short, 1, everyone) == 1, "among equals it decides"


def test_keys_are_those_of_pages_that_can_be_found():
    made = router()
    keys = made.keys(PROMPT)
    assert len(keys) == 9, "the page that holds the last token is always computed"
    assert made.keys([*PROMPT, *range(50)])[:9] == keys != made.keys([7, *PROMPT])[:9]


def test_the_longest_known_prefix_wins():
    made = router()
    made.take(made.keys(PROMPT[:12] + [1] * 20), 1, [0])
    made.take(made.keys(PROMPT[:24] + [2] * 20), 1, [1])
    assert made.take(made.keys(PROMPT), 1, [0, 1]) == 1
    assert made.take(made.keys([7, *PROMPT]), 1, [0, 1, 2]) == 2, "pages count from the beginning"


def test_a_replica_that_is_down_gets_nothing_and_comes_back_without_its_prefixes():
    made = router(2)
    keys = made.keys(PROMPT)
    assert made.take(keys, 1, [0, 1]) == 0
    made.forget(0)
    assert made.take(keys, 1, [1]) == 1
    assert made.take(keys, 1, [0, 1]) == 1, "the other one has it now"
    made.leave(1, 2)
    assert made.take(made.keys([9] * 30), 1, [0, 1]) == 1


def test_memory_is_bounded_and_a_prefix_outlives_what_follows_it():
    made = router(1, num_pages=6)
    made.take(made.keys(PROMPT), 1, [0])
    assert len(made._served[0]) == 6
    assert made._num_known(made.keys(PROMPT), 0) == 6
    made.take(made.keys([9] * 13), 1, [0])
    assert made._num_known(made.keys(PROMPT), 0) == 3
    assert len(made.keys(list(range(100_000)))) == 64


def test_keys_are_of_this_router_and_nonsense_has_none():
    assert router().keys(PROMPT) != router().keys(PROMPT)
    for nonsense in ([], [1], None, "text" * 9, [None] * 9, [1 << 70] * 9, 7):
        assert router().keys(nonsense) == []  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5), st.booleans()), max_size=60))
def test_no_replica_is_ever_far_ahead(requests: list[tuple[int, int, bool]]):
    """Whatever prompts come: whoever gets a request had at most so many sequences more than the least loaded one."""
    made, running = router(), list[tuple[int, int]]()
    for size, prompt, ends in requests:
        before = made.loads.copy()
        chosen = made.take(made.keys([prompt] * 20), size, [0, 1, 2])
        assert before[chosen] <= min(before) + max(4, min(before) // 2)
        running.append((chosen, size))
        if ends:
            made.leave(*running.pop(0))
    for one in running:
        made.leave(*one)
    assert made.loads == [0, 0, 0]
