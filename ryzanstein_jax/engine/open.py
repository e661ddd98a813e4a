"""Opens a model as far as it costs nothing: files, spec, tokenizer. Weights and devices come later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ryzanstein_jax.checkpoint.files import ModelFiles, resolve_model
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.spec import ModelSpec


@dataclass(frozen=True)
class OpenModel:
    """A model before its weights.

    Attributes:
        files: where it lies.
        spec: what it computes.
        tokenizer: None where the model brings none; then requests are token ids.
        eos_token_ids: all tokens that end a completion.
    """

    files: ModelFiles
    spec: ModelSpec
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]


def open_model(config: EngineConfig) -> OpenModel:
    """Finds the model of a configuration and reads everything but its weights.

    Raises:
        ConfigError: there is no such model or tokenizer, or `max_model_len` is over the model's limit.
        UnsupportedModelError: the engine lacks its mathematics.
        WeightsError: a file is broken.
    """
    files = resolve_model(config.model, config.revision, config.load_format)
    spec = spec_from_config(files.config, max_model_len=config.max_model_len)
    if config.max_model_len is not None and config.max_model_len > spec.max_position_embeddings:
        remedy = f"the model's own limit is {spec.max_position_embeddings} tokens"
        raise ConfigError("max_model_len", config.max_model_len, remedy)
    tokenizer = _open_tokenizer(config, files)
    ends = spec.eos_token_ids + (tokenizer.stop_token_ids if tokenizer is not None else ())
    return OpenModel(files, spec, tokenizer, tuple(dict.fromkeys(ends)))


def _open_tokenizer(config: EngineConfig, files: ModelFiles) -> Tokenizer | None:
    path = files.tokenizer
    if config.tokenizer is not None:
        path = Path(config.tokenizer).expanduser()
        if not path.exists():
            path = resolve_model(config.tokenizer, config.revision, "dummy").tokenizer
    if path is None:
        return None
    return Tokenizer.from_gguf(path) if path.suffix == ".gguf" else Tokenizer.from_folder(path)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Writes a tokenizer in the files that Hugging Face folders have, and returns them."""
    main, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer.backend.save(str(main))
    settings.write_text(json.dumps({**tokenizer.special_tokens, "chat_template": tokenizer.chat_template}))
    return [main, settings]
