"""Fixtures of the health monitor's tests."""

import pytest

from ryzanstein_jax.orchestrator import health
from tests.orchestrator.watch import Clock


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(health, "time", clock)
    return clock


@pytest.fixture
def cpu(monkeypatch) -> dict[int, float]:
    """Processor time by pid."""
    used: dict[int, float] = {}
    monkeypatch.setattr(health, "_cpu_seconds", used.get)
    monkeypatch.setattr(health, "_process_state", lambda pid: "R")
    return used
