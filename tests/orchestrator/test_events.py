"""Events: bounded, in order, one JSON line each, whatever is put in."""

import json
import logging
import threading
from datetime import datetime

import pytest

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.orchestrator.events import MAX_MESSAGE, EventKind, EventLog


def test_an_event_is_kept_and_logged_as_one_line(caplog):
    caplog.set_level(logging.INFO, "ryzanstein_jax.orchestrator")
    log = EventLog()
    event = log.record(EventKind.FAULT, "rank 1 died\nof signal 9", generation=3, rank=1, signal=9, ranks=[0, 1.5, "x"])
    assert log.list() == (event,)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "\n" not in record.getMessage()
    line = json.loads(record.getMessage())
    assert line.pop("monotonic") == pytest.approx(event.monotonic, abs=1e-5)
    assert datetime.fromisoformat(line.pop("time")).utcoffset().total_seconds() == 0
    assert line == {
        "kind": "fault", "severity": "error", "generation": 3, "rank": 1, "message": "rank 1 died\nof signal 9",
        "signal": 9, "ranks": [0, 1.5, "x"],
    }  # fmt: skip


def test_severities():
    log = EventLog()
    assert log.record(EventKind.READY, "").severity == "info"
    assert log.record(EventKind.DEGRADED, "").severity == "warning"
    assert log.record(EventKind.READY, "", severity="error").severity == "error"


def test_the_history_is_bounded_and_in_order():
    log = EventLog(limit=10)
    threads = [
        threading.Thread(target=lambda: [log.record(EventKind.TELEMETRY, str(n)) for n in range(100)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = log.list()
    assert len(events) == 10
    assert [event.monotonic for event in events] == sorted(event.monotonic for event in events)
    log.record(EventKind.CLOSED, "last")
    assert [event.message for event in log.list(last=1)] == ["last"] and len(log.list(last=99)) == 10
    assert len(log.list(kind=EventKind.CLOSED)) == 1 and log.list(last=0) == ()


def test_what_json_can_not_hold_becomes_bounded_text():
    log = EventLog()
    event = log.record(EventKind.FAULT, "x" * 10_000, nan=float("nan"), thing=object(), long="y" * 10_000, none=None)
    line = json.loads(event.to_json())
    assert len(line["message"]) == len(line["long"]) == MAX_MESSAGE
    assert line["nan"] == "nan" and line["thing"].startswith("<object") and line["none"] is None
    nested = log.record(EventKind.FAULT, "", deep=[{"a": 1}, [float("inf")]], many=list(range(10_000)))
    assert len(json.loads(nested.to_json())["many"]) <= MAX_MESSAGE


@pytest.mark.parametrize(
    "bad", [dict(kind="nonsense"), dict(severity="loud"), dict(time="now"), {f"f{n}": n for n in range(33)}]
)
def test_what_is_refused(bad):
    log = EventLog()
    with pytest.raises(ConfigError):
        log.record(**{"kind": EventKind.READY, "message": "", **bad})
    assert log.list() == ()
    with pytest.raises(ConfigError, match="at least 1"):
        EventLog(limit=0)


def test_events_of_replicas_say_whose_they_are():
    assert json.loads(EventLog(replica=1).record(EventKind.READY, "").to_json())["replica"] == 1
    assert "replica" not in EventLog().record(EventKind.READY, "").to_json()
