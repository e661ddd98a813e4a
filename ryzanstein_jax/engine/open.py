"""Opens a model as far as it costs nothing: files, spec, tokenizer. Weights and devices come later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ryzanstein_jax.checkpoint.files import ModelFiles, resolve_model
from ryzanstein_jax.config import POOLINGS, EngineConfig
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import ConfigError, RequestError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.request import PoolingParams

#: Poolings of sentence-transformers and what they are here, where vectors have length 1.
_POOLINGS = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean", "mean_sqrt_len_tokens": "mean"}


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

    def pooling_params(self, pooling: str | None = None, dimensions: int | None = None) -> PoolingParams:
        """How embeddings are made where nothing else is asked: as the model's folder says, or else of the last token.

        Args:
            pooling: overrules the folder.
            dimensions: as `PoolingParams` has it.

        Raises:
            RequestError: the folder asks for what is not there, or there are fewer dimensions.
        """
        if dimensions is not None and dimensions > self.spec.hidden_size:
            raise RequestError("dimensions", dimensions, f"embeddings of this model have {self.spec.hidden_size}")
        return PoolingParams(pooling=pooling or pooling_of(self.files.pooling_config), dimensions=dimensions)


def pooling_of(config: dict[str, Any]) -> str:
    """The pooling that a `1_Pooling/config.json` asks for, in either of its spellings; "last" where it is empty.

    Raises:
        RequestError: it is another one, or several at once.
    """
    if not config:
        return "last"
    asked = config.get("pooling_mode")
    named = [asked] if isinstance(asked, str) else asked
    if named is None:
        named = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
        named = [name for name in named if name != "include_prompt"]
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) and named[0] in _POOLINGS:
        return _POOLINGS[named[0]]
    remedy = f"the model's 1_Pooling/config.json asks for it; set embedding_pooling to one of {', '.join(POOLINGS)}"
    raise RequestError("pooling", str(named)[:200], remedy)


def open_model(config: EngineConfig) -> OpenModel:
    """Finds the model of a configuration and reads everything but its weights.

    Raises:
        ConfigError: there is no such model or tokenizer, or `max_model_len` is over the model's limit.
        UnsupportedModelError: the engine lacks its mathematics.
        WeightsError: a file is broken.
    """
    files = resolve_model(config.model, config.revision, config.load_format)
    spec = spec_from_config(files.config, max_model_len=config.max_model_len, quantization=config.quantization)
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
