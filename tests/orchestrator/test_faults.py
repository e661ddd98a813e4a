"""Faults made on purpose: read strictly, and only for whom they are meant."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator import faults
from ryzanstein_jax.orchestrator.faults import KINDS, FaultPlan, InjectedFault
from ryzanstein_jax.orchestrator.status import FAULT_VARIABLE


@pytest.mark.parametrize(
    ("text", "rank", "generation", "expected"),
    [
        ("", 0, 1, ()),
        ("exception:0:1:5", 0, 1, (("exception", 5),)),
        ("exception:0:1:5", 1, 1, ()),
        ("exception:0:1:5", 0, 2, ()),
        ("oom:2:-1:7", 2, 9, (("oom", 7),)),
        ("stuck:1:1:3,probe:1:1:0,start:0:1:0", 1, 1, (("stuck", 3), ("probe", 0))),
        ("stuck:1:1:3,,", 1, 1, (("stuck", 3),)),
    ],
)
def test_each_rank_and_generation_gets_its_own(text, rank, generation, expected):
    assert FaultPlan.parse(text, rank, generation) == FaultPlan(expected)


@pytest.mark.parametrize(
    "text",
    ["boom:0:1:5", "exception", "exception:0:1", "exception:0:1:5:6", "exception:x:1:5", ":0:1:5", "oom:0:1:5;", "a"],
)
@pytest.mark.parametrize("rank", [0, 7])
def test_what_is_no_list_of_faults_is_refused_by_every_rank(text, rank):
    with pytest.raises(ConfigError, match=FAULT_VARIABLE) as caught:
        FaultPlan.parse(f"probe:0:1:0,{text}", rank, 1)
    assert all(kind in str(caught.value) for kind in (*KINDS, "kind:rank:generation:step"))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text("exception:,0123456789-é\0 ", max_size=30))
def test_any_text_is_a_plan_or_a_config_error(text):
    try:
        FaultPlan.parse(text, 0, 1)
    except ConfigError:
        pass


def test_has():
    plan = FaultPlan.parse("probe:0:1:0,start:1:1:0", 0, 1)
    assert plan.has("probe") and not plan.has("start") and not FaultPlan().has("probe")


def test_it_strikes_in_its_step_only():
    plan = FaultPlan.parse("exception:0:-1:5,probe:0:-1:3", 0, 4)
    for step in (*range(5), 6, 7):
        plan.strike(step)
    with pytest.raises(InjectedFault, match="in step 5"):
        plan.strike(5)


def test_poison_is_a_token_in_whatever_step():
    plan = FaultPlan.parse("poison:0:-1:7", 0, 4)
    plan.strike(7, np.array([7, 7, -7, 7], np.int32))
    with pytest.raises(InjectedFault, match="token 7"):
        plan.strike(3, np.array([1, 7, 7, 7], np.int32))


def test_stuck_waits_for_ever(monkeypatch):
    waited = []
    monkeypatch.setattr(faults.time, "sleep", waited.append)
    FaultPlan.parse("stuck:0:1:2", 0, 1).strike(2)
    assert waited and waited[0] > 1e5
