"""Fixtures that several parts of the tests share, and how JAX runs under test."""

import os
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of two workers (`-n 2`) one waits and the other computes; the tests of a file share its fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            return "waiting" if file.parent.name in _WAITING else str(file)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct GGUF; the first run ever fetches it into the user's cache."""
    return default_model_path(progress=False)
