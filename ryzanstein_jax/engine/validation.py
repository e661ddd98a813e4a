"""Whether a request is in order, before anything of it is kept. No JAX here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.request import SamplingParams


def validate(request_id: str, params: SamplingParams, priority: int, config: EngineConfig, *, vocab_size: int) -> None:
    """Raises RequestError for what is wrong with all but the prompt."""
    if not isinstance(request_id, str) or not request_id:
        raise RequestError("request_id", request_id, "use a text that is not empty")
    if not isinstance(params, SamplingParams):
        raise RequestError("params", params, "use SamplingParams")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise RequestError("priority", priority, "use a whole number; lower ones run first")
    most = min(config.max_logprobs, vocab_size)
    for field in ("logprobs", "prompt_logprobs"):
        value = getattr(params, field)
        if value is not None and value > most:
            raise RequestError(field, value, f"use at most {most} (max_logprobs)")
    if len(params.logit_bias) > config.max_logit_bias:
        count, most = len(params.logit_bias), config.max_logit_bias
        raise RequestError("logit_bias", f"{count} tokens", f"use at most {most} (max_logit_bias)")
    for field in ("logit_bias", "stop_token_ids"):
        for token in getattr(params, field):
            if token >= vocab_size:
                raise RequestError(field, token, f"use token ids below {vocab_size}, the size of the vocabulary")


def validate_prompt(prompt_token_ids: Sequence[int], max_length: int, vocab_size: int) -> list[int]:
    """The prompt as a list.

    Raises:
        RequestError: it is empty, longer than `max_length` - 1, or not of token ids below `vocab_size`.
    """
    field, longest = "prompt_token_ids", max_length - 1
    if isinstance(prompt_token_ids, str | bytes) or not hasattr(prompt_token_ids, "__len__"):
        raise RequestError(field, prompt_token_ids, "use a list of token ids")
    if len(prompt_token_ids) == 0:
        raise RequestError(field, [], "use at least one token")
    if len(prompt_token_ids) > longest:
        raise RequestError(
            field,
            f"{len(prompt_token_ids)} tokens",
            f"use at most {longest}: prompt and completion share {longest + 1} (max_model_len, or the KV cache)",
        )
    try:
        tokens = np.asarray(prompt_token_ids)
    except (ValueError, TypeError, OverflowError):
        tokens = np.zeros(0, object)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        raise RequestError(field, list(prompt_token_ids)[:8], "use a flat list of whole numbers")
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        where = int(wrong[0])
        remedy = f"token {where} is outside the vocabulary: use ids from 0 to {vocab_size - 1}"
        raise RequestError(field, int(tokens[where]), remedy)
    return [int(token) for token in tokens.tolist()]
