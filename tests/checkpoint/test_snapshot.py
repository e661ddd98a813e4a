"""Snapshots restore onto any width, and nothing but a whole one loads."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import BASE, DictSource, setup, weights_of

from ryzanstein_jax.checkpoint import snapshot_writer
from ryzanstein_jax.checkpoint.assemble import load_params
from ryzanstein_jax.checkpoint.snapshot import MANIFEST, SnapshotSource
from ryzanstein_jax.checkpoint.snapshot_writer import save_snapshot
from ryzanstein_jax.errors import WeightsError

SPEC = BASE.replace(tie_embeddings=False, qk_norm="all", norms="post", layers=BASE.layers[:1])


def load(source, width):
    sizes, params, mesh = setup(SPEC, width)
    return load_params(source, SPEC, sizes, params, mesh)[0]


def save(folder, width, **kwargs):
    sizes, params, _ = setup(SPEC, width)
    arrays = load(DictSource(weights_of(SPEC)), width)
    return save_snapshot(folder, arrays, params, SPEC, sizes, config={"model_type": "llama"}, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base = tmp_path_factory.mktemp("snapshots")
    (base / "tokenizer.json").write_text("{}")
    return save(base / "four", 4, files=[base / "tokenizer.json"])


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_saved_by_four_restores_onto_any_width(saved, width):
    expected = load(DictSource(weights_of(SPEC)), width)
    found = load(SnapshotSource(saved, verify=True), width)
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
        assert found[path].sharding == array.sharding


def test_what_is_stored_does_not_depend_on_the_width(saved, tmp_path):
    single = SnapshotSource(save(tmp_path / "one", 1))
    four = SnapshotSource(saved)
    assert set(single.names()) == set(four.names())
    for name in single.names():
        shape = single.info(name).shape
        assert shape == four.info(name).shape
        box = tuple((0, size) for size in shape)
        np.testing.assert_array_equal(single.read(name, box), four.read(name, box))


def test_bfloat16_survives(tmp_path):
    sizes, params, mesh = setup(SPEC, 2, "bfloat16")
    arrays = load_params(DictSource(weights_of(SPEC)), SPEC, sizes, params, mesh)[0]
    folder = save_snapshot(tmp_path / "half", arrays, params, SPEC, sizes, config={})
    again = load_params(SnapshotSource(folder), SPEC, sizes, params, mesh)[0]
    assert all(array.dtype == jax.numpy.bfloat16 for array in again.values())
    assert all(np.array_equal(again[path], arrays[path]) for path in arrays)


def test_it_holds_config_and_tokenizer(saved):
    assert json.loads((saved / "config.json").read_text()) == {"model_type": "llama"}
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_a_save_cut_short_leaves_nothing_that_loads(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(path):
        raise Killed

    monkeypatch.setattr(snapshot_writer, "_sync", die)
    with pytest.raises(Killed):
        save(tmp_path / "model", 1)
    assert not (tmp_path / "model").exists()
    with pytest.raises(WeightsError, match="no manifest"):
        SnapshotSource(tmp_path / "model")
    monkeypatch.undo()
    SnapshotSource(save(tmp_path / "model", 1), verify=True)  # what was left behind is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_replaced_only_on_demand(saved, copy):
    with pytest.raises(WeightsError, match="overwrite"):
        save(copy, 1)
    (copy / "stale").write_text("")
    save(copy, 1, overwrite=True)
    assert not (copy / "stale").exists()
    SnapshotSource(copy, verify=True)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_missing_and_truncated_files_are_refused(copy):
    file = largest(copy / "weights")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(WeightsError, match=f"incomplete.*{file.name}"):
        SnapshotSource(copy)
    file.unlink()
    with pytest.raises(WeightsError, match="incomplete.*no file"):
        SnapshotSource(copy)


def test_the_version_before_still_loads(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"version": 1}))
    assert set(SnapshotSource(copy).names()) == set(manifest["tensors"])


def test_changed_bytes_are_refused(copy):
    (copy / "config.json").write_bytes((copy / "config.json").read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(WeightsError, match="changed"):
        SnapshotSource(copy)
    (copy / "config.json").write_bytes((copy / "config.json").read_bytes().replace(b"gemma", b"llama"))
    file = largest(copy / "weights")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="changed"):
        SnapshotSource(copy, verify=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m | {"format": "other"}, "not that of a snapshot"),
        (lambda m: m | {"version": 3}, "another version"),
        (lambda m: [], "not that of a snapshot"),
        (lambda m: {key: m[key] for key in ("format", "version")}, "lacks"),
        (lambda m: m | {"files": {"../secret": {"bytes": 1, "sha256": ""}}}, "outside"),
        (lambda m: m | {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "outside"),
        (lambda m: m | {"tensors": {"final_norm.scale": {"shape": [13], "dtype": "float32"}}}, "disagree"),
        (lambda m: m | {"tensors": {"nothing": {"shape": [13], "dtype": "float32"}}}, "corrupt"),
        (lambda m: m | {"tensors": {"../x": {"shape": [1], "dtype": "float32"}}}, "unusable"),
        (lambda m: m | {"tensors": {"final_norm.scale": {"shape": ["12"], "dtype": "float32"}}}, "unusable"),
    ],
)
def test_a_foreign_manifest_is_refused(copy, change, match):
    manifest = change(json.loads((copy / MANIFEST).read_text()))
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=match):
        SnapshotSource(copy)


def test_a_folder_that_is_no_snapshot_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(WeightsError, match="no manifest"):
        SnapshotSource(tmp_path / "x")
    (tmp_path / "x" / MANIFEST).write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        SnapshotSource(tmp_path / "x")
