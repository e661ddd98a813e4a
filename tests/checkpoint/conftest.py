"""Eight CPU devices, and the folder's own helper on the path."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    assert len(jax.devices("cpu")) >= 8, "another part of the run started JAX with fewer devices"
