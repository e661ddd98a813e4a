"""What crosses to a rank and back: it survives the trip, and anything else is a FrameError."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ryzanstein_jax.orchestrator.frames import FrameError, parse_json
from ryzanstein_jax.orchestrator.status import Heartbeat, Phase, RankSpec

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
GOOD = {
    "rank": 1, "num_processes": 2, "generation": 3, "slot": 5, "local_index": 1, "local_count": 2, "width": 2,
    "address": "127.0.0.1:80", "hosted": True, "heartbeat_interval_sec": 0.1, "environment": {"A": "b"}, "fault": "",
}  # fmt: skip
NUMBERS = ("rank", "num_processes", "generation", "slot", "local_index", "local_count", "width")


@unhurried
@given(st.sampled_from(Phase), *[st.integers(0, (1 << 63) - 1)] * 3, st.booleans())
def test_a_heartbeat_survives_the_trip(phase, received, dispatched, done, has_loaded):
    beat = Heartbeat(phase, received, dispatched, done, has_loaded=has_loaded)
    assert Heartbeat.from_bytes(beat.to_bytes()) == beat


@unhurried
@given(st.binary(max_size=60))
def test_any_bytes_are_a_heartbeat_or_refused(data):
    try:
        beat = Heartbeat.from_bytes(data)
    except FrameError:
        return
    assert beat.to_bytes() == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        Heartbeat().to_bytes()[:-1],
        Heartbeat().to_bytes() + b"\0",
        b"\xff" + Heartbeat().to_bytes()[1:],
        Heartbeat(Phase.SERVING, 1, -1, 0).to_bytes(),
        Heartbeat().to_bytes()[:1] + b"\2" + Heartbeat().to_bytes()[2:],
    ],
    ids=["nothing", "short", "long", "phase", "negative", "flag"],
)
def test_what_is_no_heartbeat(data):
    with pytest.raises(FrameError, match="not a heartbeat"):
        Heartbeat.from_bytes(data)


def test_a_description_survives_the_trip():
    spec = RankSpec.from_json(parse_json(json.dumps(GOOD).encode()))
    assert vars(spec) == {**GOOD, "ticket": ""}
    assert RankSpec.from_json(json.loads(json.dumps(vars(spec)))) == spec
    less = {name: value for name, value in GOOD.items() if name not in ("environment", "fault")}
    assert RankSpec.from_json(less).environment == {} and RankSpec.from_json(less).fault == ""
    assert RankSpec.from_json({**GOOD, "slot": -1}).slot == -1
    assert RankSpec.from_json({**GOOD, "heartbeat_interval_sec": 2}).heartbeat_interval_sec == 2


WRONG = [
    *[(name, value) for name in NUMBERS for value in ("1", 1.0, None, [1], True, -2, 1 << 40)],
    *[("heartbeat_interval_sec", value) for value in ("1", None, 0, -1.0, math.nan, math.inf, True)],
    *[("hosted", value) for value in (1, "yes", None)],
    *[("address", value) for value in (1, None, ["a"])],
    *[("fault", value) for value in (1, None)],
    *[("environment", value) for value in (None, [], "A=b", {"A": 1}, {"A": None}, {"A=": "b"}, {"": "b"})],
    *[("environment", value) for value in ({"A\0": "b"}, {"A": "b\0"}, {"A": "\ud800"})],
    *[("num_processes", 0), ("num_processes", 1), ("local_count", 0), ("local_count", 1), ("width", 0)],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_description_with_a_wrong_field_is_refused(name, value):
    with pytest.raises(FrameError, match="not a rank's description") as caught:
        RankSpec.from_json({**GOOD, name: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [{}, {**GOOD, "command": "rm"}, {"rank": 0}, {**GOOD, "self": 1}])
def test_fields_that_are_missing_or_unknown_are_refused(value):
    with pytest.raises(FrameError, match="not a rank's description"):
        RankSpec.from_json(value)


LETTERS = "ab=\0é\ud800"
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(LETTERS, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(LETTERS, max_size=3), inner, max_size=3),
    max_leaves=5,
)


@unhurried
@given(st.dictionaries(st.sampled_from(sorted(GOOD)), anything, max_size=3))
def test_whatever_a_field_holds_the_answer_is_a_description_or_an_error(changes):
    try:
        spec = RankSpec.from_json({**GOOD, **changes})
    except FrameError:
        return
    assert 0 <= spec.rank < spec.num_processes and spec.heartbeat_interval_sec > 0
