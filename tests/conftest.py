"""Fixtures that several parts of the tests share, and how JAX runs under test."""

import os
from pathlib import Path

import pytest

from ryzanstein_jax.checkpoint.default_model import default_model_path

# JAX reads these when it is first imported, which no line above does: eight CPU devices stand for eight GPUs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Half the time of these tests would go into LLVM's optimizations: `make demo` and the benchmarks run with all of them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
# A test that reaches for a model hub fails at once, with or without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

#: Folders of tests that mostly wait for processes. With several workers all of them run on one, a test at a time: a
#: machine is not to be so busy that processes which are well look hung.
_WAITING = ("faults", "orchestrator", "server")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two workers (`-n 2 --dist loadgroup`) one waits and the other computes; a file's tests share its fixtures."""
    for item in items:
        waits = item.path.parent.name in _WAITING
        item.add_marker(pytest.mark.xdist_group("waiting" if waits else item.path.name))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct GGUF; the first run ever fetches it into the user's cache."""
    return default_model_path(progress=False)
