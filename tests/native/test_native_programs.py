"""Programs that call kernels: in many threads at once, kept on disk, and with the kernels turned off or missing."""

import importlib.util
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from llvmlite import binding

from ryzanstein_jax import executables, native
from ryzanstein_jax.executables import ExecutableStore, environment_of
from ryzanstein_jax.native import KERNELS_VARIABLE, Processor
from ryzanstein_jax.native.quantize import Quantize
from ryzanstein_jax.sharding import make_mesh
from tests.native.programs import arguments, lowered
from tests.support import quick_compiles

MESH = make_mesh(2)


@pytest.fixture(scope="module")
def compiled():
    with quick_compiles():
        return lowered().compile()


@pytest.fixture(scope="module")
def result(compiled):
    return np.asarray(compiled(*arguments()))


def test_many_threads_at_once(compiled, result):
    """More calls than processors, each on both devices: none waits for another for ever, and all have the same bits."""
    given = arguments()

    def many(_):
        return [np.asarray(compiled(*given)) for _ in range(25)]

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(many, range(8)):
            for found in results:
                np.testing.assert_array_equal(found, result)


def test_a_program_that_xla_does_not_print_is_not_kept(compiled, monkeypatch, tmp_path):
    """Which kernels it calls is not known then, and without these it would crash."""
    assert native.called_by(compiled)

    class Silent:
        def as_text(self):
            return None

    with pytest.raises(ValueError, match="not known"):
        native.called_by(Silent())
    with monkeypatch.context() as patched:
        patched.setattr(jax.stages.Compiled, "as_text", lambda self: None)
        store = ExecutableStore(tmp_path / "executables")
        assert not store.save("k", compiled) and not list(store.folder.iterdir())
    monkeypatch.setattr(native, "_registered", {})
    assert native.called_by(Silent()) == (), "there are none: nothing has to be printed"


def test_another_process_runs_it_without_tracing_or_compiling(compiled, result, tmp_path):
    store = ExecutableStore(tmp_path / "executables")
    # Of no program: another test may have made many more known than this one calls.
    native.register(Quantize(1, "float32", 1.0))
    assert store.save("k", compiled)
    child = subprocess.run(
        [sys.executable, "-m", "tests.native.child", str(store.folder), "k", str(tmp_path / "result.npy")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "result.npy"), result)


def test_an_entry_without_kernels_is_none(compiled, tmp_path, monkeypatch, caplog):
    """As they were before there were any."""
    store = ExecutableStore(tmp_path / "executables")
    dumps = pickle.dumps
    with monkeypatch.context() as patched:
        patched.setattr(executables.pickle, "dumps", lambda parts: dumps(parts[:3]))
        assert store.save("k", compiled)
    assert store.holds("k") and store.load("k", MESH) is None and "compiling again" in caplog.text
    assert store.save("k", compiled) and store.load("k", MESH) is not None


def test_programs_with_and_without_kernels_have_other_keys(monkeypatch):
    found = [environment_of(MESH)]
    monkeypatch.setenv(KERNELS_VARIABLE, "portable")
    found.append(environment_of(MESH))
    monkeypatch.delenv(KERNELS_VARIABLE)
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    found.append(environment_of(MESH))
    monkeypatch.setattr(native, "find_spec", importlib.util.find_spec)
    monkeypatch.setattr(native, "processor", lambda: Processor("other", "+avx2,+fma", 8))
    found.append(environment_of(MESH))
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_without_kernels(compiled, result, monkeypatch):
    assert "ryzanstein.Attention" in compiled.as_text()
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    assert not native.available() and native.versions() == ()
    with quick_compiles():
        portable = lowered().compile()
    assert "ryzanstein.Attention" not in portable.as_text()
    np.testing.assert_allclose(np.asarray(portable(*arguments())), result, atol=2e-5)
    monkeypatch.undo()
    monkeypatch.setenv(KERNELS_VARIABLE, "portable")
    assert "ryzanstein.Attention" not in lowered().as_text()


def test_processors_that_can(monkeypatch, caplog):
    assert native._lanes("x86_64", {"avx2": True, "fma": True}) == 8
    assert native._lanes("AMD64", {"avx2": True, "fma": True, "avx512f": True}) == 16
    assert native._lanes("x86_64", {"avx2": True}) == native._lanes("x86_64", {}) == 0
    assert native._lanes("x86_64", {"avx512f": True}) == 0
    assert native._lanes("aarch64", {}) == native._lanes("arm64", {"neon": True}) == 4

    def forbidden():
        raise OSError("cannot allocate executable memory")

    monkeypatch.setattr(binding, "check_jit_execution", forbidden)
    monkeypatch.setattr(native, "processor", native.processor.__wrapped__)
    assert native.processor().lanes == 0 and "executable memory" in caplog.text
    assert not native.available() and native.lanes() == 0


def test_importing_the_package_does_not_import_llvmlite():
    code = "import sys, ryzanstein_jax, ryzanstein_jax.native, ryzanstein_jax.step; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
