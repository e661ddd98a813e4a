"""From what a user calls a model to the files it consists of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ryzanstein_jax.checkpoint.gguf import GgufSource
from ryzanstein_jax.checkpoint.gguf_config import hf_config
from ryzanstein_jax.checkpoint.safetensors import SafetensorsSource
from ryzanstein_jax.checkpoint.snapshot import MANIFEST, SnapshotSource, read_manifest
from ryzanstein_jax.checkpoint.source import WeightSource
from ryzanstein_jax.config import LOAD_FORMATS
from ryzanstein_jax.errors import ConfigError, WeightsError

DEFAULT_MODEL = "smollm2"
#: Of a hub repository; never pickles or code.
_JSON_PATTERNS = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja"]
#: How a folder of sentence-transformers makes embeddings, and the name that it has in a snapshot.
_POOLING, SNAPSHOT_POOLING = "1_Pooling/config.json", "pooling_config.json"
_WEIGHT_PATTERNS = ["*.safetensors", "model.safetensors.index.json"]
_MAX_CONFIG_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 256 << 20


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, found and read as far as its configuration.

    Attributes:
        kind: "safetensors", "gguf", "snapshot" or "dummy".
        path: the folder, or the `.gguf` file; where weights are read from.
        config: `config.json`, or what a GGUF file says in its words; `eos_token_id` in it is a list, with those of
            `generation_config.json` added.
        generation_config: `generation_config.json`, or empty.
        tokenizer: `tokenizer.json`, or the `.gguf` file that holds the tokenizer, or None.
        tokenizer_config: `tokenizer_config.json`, or None.
        chat_template: `chat_template.jinja`, or None.
        pooling_config: how sentence-transformers would make embeddings with it, or empty.
    """

    kind: str
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer: Path | None
    tokenizer_config: Path | None
    chat_template: Path | None
    pooling_config: dict[str, Any] = field(default_factory=dict)


def resolve_model(model: str, revision: str | None = None, load_format: str = "auto") -> ModelFiles:
    """Finds a model: a folder, a `.gguf` file, a snapshot, "smollm2", or an id on the Hugging Face hub.

    Args:
        model: what the user gave.
        revision: branch, tag or commit on the hub.
        load_format: "auto" looks at the files; "dummy" needs only the configuration.

    Raises:
        ConfigError: nothing of that name, locally or on the hub, or it is of another format.
        WeightsError: its files are broken, or its weights are pickled.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError("load_format", load_format, f"use one of {', '.join(LOAD_FORMATS)}")
    if model == DEFAULT_MODEL:
        from ryzanstein_jax.checkpoint.default_model import default_model_path

        path = default_model_path()
    else:
        path = Path(model).expanduser()
        if not path.exists():
            path = _from_hub(model, revision, load_format)
    kind = _kind(path, model, load_format)
    if path.is_file():
        return _gguf_files(kind, path)
    return _folder_files(kind, path, model)


def open_source(files: ModelFiles) -> WeightSource:
    """The weights of a model.

    Raises:
        ConfigError: dummy weights come from no file.
        WeightsError: the files are missing or broken.
    """
    if files.kind == "dummy":
        raise ConfigError("load_format", files.kind, "dummy weights are drawn with dummy_params, not read")
    if files.kind == "gguf":
        return GgufSource(files.path)
    return SnapshotSource(files.path) if files.kind == "snapshot" else SafetensorsSource(files.path)


def _kind(path: Path, model: str, load_format: str) -> str:
    if path.is_file():
        found = "gguf" if path.suffix == ".gguf" else None
        if found is None:
            raise ConfigError("model", model, "give a folder with config.json and safetensors, or a .gguf file")
    elif (path / MANIFEST).is_file():
        found = "snapshot"
    else:
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not any(path.glob("*.safetensors")):
            raise ConfigError("model", model, f"the folder holds GGUF files; name one, such as {ggufs[0]}")
        found = "safetensors"
    if load_format not in ("auto", "dummy", found):
        raise ConfigError("load_format", load_format, f'{path} holds {found}; use "auto" or "{found}"')
    return "dummy" if load_format == "dummy" else found


def _gguf_files(kind: str, path: Path) -> ModelFiles:
    return ModelFiles(kind, path, hf_config(GgufSource(path)), {}, path, None, None)


def _folder_files(kind: str, path: Path, model: str) -> ModelFiles:
    if not (path / "config.json").is_file():
        raise ConfigError("model", model, f"{path} holds no config.json; give the folder of a model")
    if kind == "snapshot":
        read_manifest(path)
    config = _read_json(path / "config.json")
    generation = _read_if_there(path / "generation_config.json")
    pooling = _read_if_there(path / (SNAPSHOT_POOLING if kind == "snapshot" else _POOLING))
    config["eos_token_id"] = _token_ids(config.get("eos_token_id")) + [
        i for i in _token_ids(generation.get("eos_token_id")) if i not in _token_ids(config.get("eos_token_id"))
    ]

    def held(name: str) -> Path | None:
        file = path / name
        if not file.is_file():
            return None
        if file.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise WeightsError("the file is too large", file=file, expected=f"at most {_MAX_TOKENIZER_BYTES} bytes")
        return file

    return ModelFiles(
        kind, path, config, generation, held("tokenizer.json"), held("tokenizer_config.json"),
        held("chat_template.jinja"), pooling,
    )  # fmt: skip


def _token_ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_CONFIG_BYTES:
        raise WeightsError("the file is too large", file=path, expected=f"at most {_MAX_CONFIG_BYTES}", found=size)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"not JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise WeightsError("not a JSON object", file=path, found=type(value).__name__)
    return value


def _from_hub(model: str, revision: str | None, load_format: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if model.endswith((".gguf", ".safetensors")) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError("model", model, "there is no such file or folder")
    patterns = [*_JSON_PATTERNS, _POOLING] + ([] if load_format == "dummy" else _WEIGHT_PATTERNS)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            "model", model,
            'there is no such folder, nor such a model on the hub that you may read; "smollm2" is the default model',
        ) from error  # fmt: skip
    except RevisionNotFoundError as error:
        raise ConfigError("revision", revision, f"{model} has no such revision on the hub") from error
    except (OSError, ValueError, RuntimeError) as error:
        # Offline, a proxy, a full disk: the hub's own words say which, ours what to do.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            "model", model,
            f"it is no local folder, and fetching it failed ({reason}); fetch it where there is a network with "
            '`hf download`, give the folder, or use "smollm2"',
        ) from error  # fmt: skip
