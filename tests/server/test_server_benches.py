"""The benchmarks of the server, on the tiny model: that they run, and that they notice what is wrong."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from bench import test_constrained, test_load  # noqa: E402
from bench.harness import SMOKE, Bench, WrongResult  # noqa: E402
from bench.load import Load, Server, press  # noqa: E402
from tests.server.serving import MODEL, Served, serving  # noqa: E402

SMOKING = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: True))


class Here(Server):
    """A server in this process, which is its own leader."""

    model = MODEL

    def __init__(self, served: Served):
        self.url, self.popen = served.url, SimpleNamespace(pid=os.getpid())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    settings = {"model": "tiny", "dtype": "float32", "quantization": None, "tensor_parallel_size": 1}
    return Bench(settings, SMOKE, 1, tmp_path, tmp_path, 131, None)


def test_load_is_told_as_it_was(bench: Bench, engine, monkeypatch) -> None:
    options: list[str] = []

    @contextmanager
    def here(model: str, *more: str) -> Iterator[Here]:
        options.extend((model, *more))
        with serving(engine) as served:
            yield Here(served)

    monkeypatch.setattr(test_load, "serving", here)
    test_load.test_load(bench, SMOKING)
    assert options[:3] == ["tiny", "--tp", "1"]
    found = json.loads((bench.folder / "load.json").read_text())
    assert found["errors"] == 0 and found["requests"] >= found["streams"] == 16
    figures = found["figures"]
    assert found["tokens"] >= 16 * found["requests"]
    assert 0 < figures["inter_token_p50_seconds"] <= figures["inter_token_p99_seconds"]
    assert 0 < figures["first_token_p50_seconds"] <= figures["first_token_p99_seconds"]
    assert figures["leader_memory_bytes_at_end"] > 10 << 20 and figures["server_cpu_microseconds_per_token"] > 0


def test_load_tells_errors_from_answers(engine) -> None:
    with serving(engine, max_sequences=2) as served:
        load = press(Here(served), 8, 0.0, 131)
    assert load.num_requests + len(load.errors) == 8 and load.num_requests >= 2
    assert load.errors and all("RateLimitError" in error for error in load.errors)
    assert len(load.first_tokens) == load.num_requests
    assert Load(memory=[(0.0, 1), (5.0, 2), (11.0, 3)]).memory_at(10) == 3


def test_a_server_that_does_not_start_is_told_with_its_log() -> None:
    with pytest.raises(RuntimeError, match="ConfigError"), test_load.serving("no/such-model"):
        pass


def test_constrained_and_free_take_turns(bench: Bench, engine) -> None:
    found = test_constrained.compare(engine, 2, 8, 131, 2)
    test_constrained.record(bench, {2: found})
    written = json.loads((bench.folder / "constrained.json").read_text())["streams"]["2"]
    assert len(written["runs"]["free"]) == len(written["runs"]["constrained"]) == 2
    first, second = (a / b for a, b in zip(found["constrained"], found["free"], strict=True))
    assert written["ratio"] == pytest.approx((first + second) / 2)

    async def short(*rest: object) -> object:
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])])

    with pytest.raises(WrongResult, match="8 were asked for"):
        test_constrained.compare(SimpleNamespace(generate=short), 2, 8, 131, 1)
