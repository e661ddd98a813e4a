"""The state machine: what may follow what."""

import itertools

import pytest

from ryzanstein_jax.errors import RyzansteinError
from ryzanstein_jax.orchestrator.states import SERVING, State, check_transition

ALLOWED = {
    "created": "starting draining",
    "starting": "ready degraded recovering failed draining",
    "ready": "recovering failed draining",
    "recovering": "ready degraded recovering failed draining",
    "degraded": "recovering failed draining",
    "draining": "closed",
    "failed": "draining",
    "closed": "",
}


@pytest.mark.parametrize("before", State)
def test_what_may_follow(before):
    for after in State:
        if after in ALLOWED[before].split():
            check_transition(before, after)
        else:
            with pytest.raises(RyzansteinError, match=f"from {before} to {after}"):
                check_transition(before, after)


def test_every_state_is_reached_and_all_but_the_last_can_be_left():
    pairs = [(a, b) for a, b in itertools.product(State, State) if b in ALLOWED[a].split()]
    assert {after for _, after in pairs} == set(State) - {State.CREATED}
    assert {before for before, _ in pairs} == set(State) - {State.CLOSED}


def test_whatever_happens_it_can_be_closed():
    for state in set(State) - {State.CLOSED, State.DRAINING}:
        check_transition(state, State.DRAINING)
    check_transition(State.DRAINING, State.CLOSED)


def test_steps_run_only_where_devices_serve():
    assert {State.READY, State.DEGRADED} == SERVING
