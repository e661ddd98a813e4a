"""Finding a model's files, and the golden checkpoints of every family through the decoder's own parameters."""

import json
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file
from test_gguf import write
from tiny import BASE, DictSource, setup, weights_of

from ryzanstein_jax.checkpoint.assemble import load_params
from ryzanstein_jax.checkpoint.files import open_source, resolve_model
from ryzanstein_jax.checkpoint.gguf import GgufSource
from ryzanstein_jax.checkpoint.safetensors import SafetensorsSource
from ryzanstein_jax.checkpoint.snapshot import SnapshotSource
from ryzanstein_jax.checkpoint.snapshot_writer import save_snapshot
from ryzanstein_jax.errors import ConfigError, WeightsError
from ryzanstein_jax.model.decoder import Decoder
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.params import param_specs
from ryzanstein_jax.sharding import PaddedSizes, make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.5}))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("")
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder(folder):
    files = resolve_model(str(folder))
    assert (files.kind, files.path, files.config["eos_token_id"]) == ("safetensors", folder, [2, 7])
    assert files.generation_config["temperature"] == 0.5
    assert files.tokenizer == folder / "tokenizer.json" and files.chat_template is not None
    assert files.tokenizer_config is None
    assert isinstance(open_source(files), SafetensorsSource)


def test_dummy_weights_need_no_files(folder):
    (folder / "model.safetensors").unlink()
    files = resolve_model(str(folder), load_format="dummy")
    assert files.kind == "dummy"
    with pytest.raises(ConfigError, match="dummy_params"):
        open_source(files)


def test_a_gguf_file(tmp_path):
    path = write(tmp_path / "x.gguf", "llama", {"token_embd.weight": np.zeros((37, 12), np.float32)})
    files = resolve_model(str(path))
    assert (files.kind, files.tokenizer, files.config["vocab_size"]) == ("gguf", path, 37)
    assert isinstance(open_source(files), GgufSource)
    with pytest.raises(ConfigError, match=r"name one, such as .*x\.gguf"):
        resolve_model(str(tmp_path))


def test_a_snapshot(tmp_path):
    spec = BASE.replace(layers=())
    sizes, params, mesh = setup(spec, 1)
    arrays = load_params(DictSource(weights_of(spec)), spec, sizes, params, mesh)[0]
    save_snapshot(tmp_path / "s", arrays, params, spec, sizes, config={"model_type": "llama"})
    files = resolve_model(str(tmp_path / "s"))
    assert files.kind == "snapshot" and isinstance(open_source(files), SnapshotSource)


def test_the_default_model(smollm2_path):
    files = resolve_model("smollm2")
    assert files.path == smollm2_path and files.config["hidden_size"] == 576


def test_another_format_than_asked_for_is_refused(folder):
    with pytest.raises(ConfigError, match="holds safetensors"):
        resolve_model(str(folder), load_format="gguf")
    with pytest.raises(ConfigError, match="load_format='pickle'"):
        resolve_model(str(folder), load_format="pickle")
    with pytest.raises(ConfigError, match=r"\.gguf file"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"a": ' + b"[" * 200_000])
def test_broken_config_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"JSON.*config\.json"):
        resolve_model(str(folder))


def test_an_oversized_config_is_refused_unread(folder):
    with open(folder / "config.json", "wb") as file:
        file.truncate(1 << 34)  # a hole: it takes no room
    with pytest.raises(WeightsError, match="too large"):
        resolve_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(folder))


def test_the_hub_is_asked_for_no_code_and_no_pickles(folder, monkeypatch):
    asked = {}

    def download(model, *, revision, allow_patterns):
        asked.update(model=model, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some/model", "v1").path == folder
    assert (asked["model"], asked["revision"]) == ("some/model", "v1")
    assert "*.safetensors" in asked["patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*.json")) for pattern in asked["patterns"])
    resolve_model("some/model", load_format="dummy")
    assert "*.safetensors" not in asked["patterns"]


def test_offline_says_what_to_do(monkeypatch):
    def download(*args, **kwargs):
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=r"some/model.*outgoing traffic.*hf download"):
        resolve_model("some/model")


@pytest.mark.parametrize("model", ["./nothing", "/no/such/folder", "x.gguf", "a/b/c"])
def test_a_path_that_is_not_there_never_reaches_the_hub(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ConfigError, match="no such file"):
        resolve_model(model)


@pytest.mark.parametrize("family", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_golden_checkpoints_fill_the_decoder(family):
    files = resolve_model(str(GOLDEN / family))
    spec = spec_from_config(files.config)
    source = open_source(files)
    for width in (1, 4):
        sizes = PaddedSizes.of(spec, width)
        params = param_specs(Decoder(spec, sizes, jnp.dtype("float32")))
        arrays, _ = load_params(source, spec, sizes, params, make_mesh(width))
        assert arrays.keys() == params.keys()
        # Each value of the checkpoint is there once, but for KV heads that are repeated over the width.
        if width == 1:
            stored = sum(np.prod(source.info(name).shape) for name in source.names())
            assert sum(array.size for array in arrays.values()) == stored == spec.num_parameters()
        assert all(np.isfinite(array).all() for array in arrays.values())
