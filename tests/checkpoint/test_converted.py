"""Quantized weights kept as they are computed with: the same values, while the file is the same, and bounded."""

import logging
import os

import gguf
import numpy as np
import psutil
import pytest
from gguf import GGMLQuantizationType as Quant
from test_gguf import write

from ryzanstein_jax.checkpoint.converted import ConvertedWeights
from ryzanstein_jax.checkpoint.files import resolve_model
from ryzanstein_jax.checkpoint.gguf import GgufSource
from ryzanstein_jax.checkpoint.safetensors import SafetensorsSource
from ryzanstein_jax.checkpoint.source import whole
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.local import _fastest_source
from ryzanstein_jax.program_table import BackgroundLoader

BYTES = 4 * (37 * 64 + 64 * 64 + 64)


def make(path, seed=0, kind=Quant.Q8_0):
    rng = np.random.default_rng(seed)

    def quantized(*shape):
        return gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind), kind

    tensors = {
        "token_embd.weight": quantized(37, 64),
        "blk.0.attn_q.weight": quantized(64, 64),
        "output_norm.weight": rng.standard_normal(64).astype(np.float32),
    }
    return write(path, "llama", tensors, blocks=1, heads=4, kv_heads=4, embed=64)


@pytest.fixture
def file(tmp_path):
    return make(tmp_path / "a.gguf")


def converted(file, dtype="float32", max_bytes=1 << 20, quantization=None):
    return ConvertedWeights(file.parent / "weights", file, np.dtype(dtype), max_bytes, quantization)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_those_of_the_source(file, dtype):
    source, copy = GgufSource(file), converted(file, dtype)
    assert copy.open() is None and copy.pays(source)
    assert copy.write(source)
    opened = converted(file, dtype).open()
    assert opened is not None and set(opened.names()) == set(source.names())
    for name in source.names():
        box = whole(source.info(name).shape)
        assert opened.info(name).shape == source.info(name).shape
        np.testing.assert_array_equal(opened.read(name, box), source.read(name, box).astype(dtype))
    assert copy.path.stat().st_mode & 0o777 == 0o600 and copy.folder.stat().st_mode & 0o777 == 0o700
    assert len(list(copy.folder.iterdir())) == 1


def test_another_file_dtype_or_time_has_no_copy(file, tmp_path):
    converted(file).write(GgufSource(file))
    assert converted(file).open() is not None
    assert converted(file, "bfloat16").open() is None
    assert converted(make(tmp_path / "b.gguf")).open() is None
    os.utime(file, ns=(1, 1))
    assert converted(file).open() is None


def test_it_is_made_only_where_it_pays(file, tmp_path, monkeypatch):
    source = GgufSource(file)
    assert converted(file, max_bytes=BYTES).pays(source)
    assert not converted(file, max_bytes=BYTES - 1).pays(source)
    floats = make(tmp_path / "b.gguf", kind=Quant.F16)
    assert not converted(floats).pays(GgufSource(floats)), "a cast is as quick as a copy"
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=7 * BYTES))
    assert not converted(file).pays(source)


def test_what_others_may_have_written_or_what_is_broken_is_ignored(file, caplog):
    copy, source = converted(file), GgufSource(file)
    for spoil in (
        lambda: copy.folder.chmod(0o777),
        lambda: copy.path.chmod(0o620),
        lambda: (copy.path.rename(file.parent / "x"), copy.path.symlink_to(file.parent / "x")),
        lambda: copy.path.write_bytes(copy.path.read_bytes()[:-1]),
    ):
        assert copy.write(source) and copy.open() is not None
        spoil()
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert copy.open() is None
        assert "ignoring" in caplog.text
        copy.folder.chmod(0o700)
        copy.path.unlink()


def test_a_full_disk_is_no_failure_and_leaves_nothing(file, monkeypatch):
    copy = converted(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert not copy.write(GgufSource(file))
    with monkeypatch.context() as patch:
        usage = psutil.disk_usage(str(file.parent))
        patch.setattr(psutil, "disk_usage", lambda path: usage._replace(free=2 * BYTES - 1))
        assert not copy.write(GgufSource(file))
    assert list(copy.folder.iterdir()) == []


def test_what_was_used_longest_ago_goes_first(tmp_path):
    files = [make(tmp_path / f"{name}.gguf", seed) for seed, name in enumerate("abc")]
    size = 0
    for age, file in ((200, files[0]), (100, files[1])):
        copy = converted(file)
        copy.write(GgufSource(file))
        size = copy.path.stat().st_size
        os.utime(copy.path, (copy.path.stat().st_atime - age, copy.path.stat().st_mtime - age))
    left = copy.folder / ".partial-left"
    left.touch()
    assert converted(files[0]).open() is not None
    converted(files[2], max_bytes=int(2.5 * size)).write(GgufSource(files[2]))
    assert [converted(file).open() is not None for file in files] == [True, False, True]
    assert not left.exists()


def test_an_engine_makes_and_takes_the_copy(file, monkeypatch):
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(file.parent / "cache"))
    files, dtype = resolve_model(str(file)), np.dtype("float32")
    config = EngineConfig(str(file))
    source, keep = _fastest_source(config, files, dtype)
    assert isinstance(source, GgufSource) and keep is not None
    loader = BackgroundLoader([], keep)
    loader.wait()
    again, keep = _fastest_source(config, files, dtype)
    assert isinstance(again, SafetensorsSource) and keep is None
    never, keep = _fastest_source(config.replace(weights_cache_gib=0), files, dtype)
    assert isinstance(never, GgufSource) and keep is None
