"""Safetensors files: slices of what is there, and a typed error for what is broken."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ryzanstein_jax.checkpoint.safetensors import SafetensorsSource
from ryzanstein_jax.checkpoint.source import whole
from ryzanstein_jax.errors import WeightsError

TENSORS = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(10, dtype=np.float16),
    "c": np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16),
}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_slices_and_dtypes(folder):
    for path in (folder, folder / "model.safetensors"):
        source = SafetensorsSource(path)
        assert set(source.names()) == set(TENSORS)
        for name, value in TENSORS.items():
            info = source.info(name)
            assert (info.shape, info.dtype, info.file.name) == (value.shape, value.dtype, "model.safetensors")
            np.testing.assert_array_equal(source.read(name, whole(value.shape)), value)
            source.release(name)
        np.testing.assert_array_equal(source.read("a", ((1, 3), (2, 5))), TENSORS["a"][1:3, 2:5])


def test_a_slice_is_a_view_of_the_map(folder):
    block = SafetensorsSource(folder).read("a", ((1, 2), (0, 6)))
    assert not block.flags.owndata and not block.flags.writeable


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, index):
    names = {}
    for number, (name, value) in enumerate(TENSORS.items()):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: value}, tmp_path / file)
        names[name] = file
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    source = SafetensorsSource(tmp_path)
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(source.read(name, whole(value.shape)), value)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("../other/model.safetensors", "beside it"),
        ("/etc/passwd", "beside it"),
        ("model.bin", "beside it"),
        (7, "beside it"),
        ("missing.safetensors", "no file"),
        ("model.safetensors", "does not hold"),
    ],
)
def test_a_bad_index_is_refused(folder, file, match):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"zzz": file}}))
    with pytest.raises(WeightsError, match=match):
        SafetensorsSource(folder)


def test_the_same_tensor_in_two_shards_is_refused(folder):
    save_file({"a": TENSORS["a"]}, folder / "other.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(WeightsError, match="two files"):
        SafetensorsSource(folder)


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1, -100])
def test_a_truncated_file_is_refused(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(WeightsError, match="truncated"):
        SafetensorsSource(folder)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (struct.pack("<Q", 1 << 62) + b"{}", "not a readable"),
        (raw(b"not json at all!"), "not a readable"),
        (raw({"a": ENTRY | {"shape": [3]}}, bytes(8)), "not a readable"),
        (raw({"a": ENTRY | {"shape": [1 << 40, 1 << 40]}}, bytes(8)), "not a readable"),
        (raw({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(8)), "not a readable"),
        (raw({"a": ENTRY | {"data_offsets": [0, 1 << 60]}}, bytes(8)), "not a readable"),
        (raw({"a": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "dtype.*found: U32"),
        (raw(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)), "twice|not a readable"),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, content, match):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=match) as caught:
        SafetensorsSource(tmp_path)
    assert "model.safetensors" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 250), byte=st.integers(0, 255))
def test_any_changed_byte_of_a_header_reads_or_is_refused(tmp_path_factory, position, byte):
    file = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file(TENSORS, file)
    content = bytearray(file.read_bytes())
    content[position] = byte
    file.write_bytes(content)
    try:
        source = SafetensorsSource(file)
        for name in source.names():
            source.read(name, whole(source.info(name).shape))
    except WeightsError:
        pass


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(WeightsError, match=r"pickled.*save_pretrained.*pytorch_model\.bin"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match="no weights"):
        SafetensorsSource(tmp_path)
