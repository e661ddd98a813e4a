"""The tiny model, its engine and a server in front of it; and a server in front of no model at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ryzanstein_jax import AsyncLLM
from ryzanstein_jax.engine.tokens import Tokenizer
from tests.server.model import SETTINGS, tiny_model
from tests.server.serving import FakeBackend, Served, serving


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def engine(tiny: Path) -> Iterator[AsyncLLM]:
    made = AsyncLLM(str(tiny), **SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(engine: AsyncLLM) -> Iterator[Served]:
    """The tiny model, served."""
    with serving(engine) as found:
        yield found
    assert engine.stats().num_pages_used == 0


@pytest.fixture
def fake(tiny: Path) -> FakeBackend:
    return FakeBackend(Tokenizer.from_folder(tiny))
