"""Rotary frequencies of all scaling types, as transformers computes them: in float32, in the same order.

The parameters are those of a `rope_parameters` entry: `rope_type`, `rope_theta` and what the type needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzanstein_jax.errors import ConfigError, UnsupportedModelError
from ryzanstein_jax.model.config_fields import number, shown, whole_number
from ryzanstein_jax.model.spec import RopeSpec

MAX_POSITION = 1 << 24


@dataclass(frozen=True)
class RopeContext:
    """What a rope needs to know of its model.

    Attributes:
        head_dim: features of a head.
        max_position_embeddings: the model's longest sequence.
        max_model_len: the longest sequence to be served; longrope goes by it.
    """

    head_dim: int
    max_position_embeddings: int
    max_model_len: int


def rope_spec(parameters: Mapping[str, Any], context: RopeContext) -> RopeSpec:
    """The frequencies and the scale that the parameters describe.

    Longrope has two sets of factors, for sequences up to `original_max_position_embeddings` and for longer
    ones. One set serves a whole engine, so that cached keys stay valid: the short one exactly if
    `max_model_len` is no longer than that.

    Raises:
        UnsupportedModelError: a rope type or a parameter that is not known.
        ConfigError: a parameter is missing or out of range.
    """
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    rope_type = "longrope" if rope_type == "su" else rope_type  # the name in the first Phi-3 checkpoints
    if not isinstance(rope_type, str) or rope_type not in _TYPES:
        raise UnsupportedModelError(
            f"config.json has rope_type={shown(rope_type)}; this engine computes {', '.join(_TYPES)}"
        )
    compute, known = _TYPES[rope_type]
    unknown = [
        name
        for name, value in parameters.items()
        if value is not None
        and name not in {"rope_type", "type", "rope_theta", "partial_rotary_factor", *known.split()}
    ]
    if unknown:
        raise UnsupportedModelError(
            f"config.json has the parameter {shown(unknown[0])}={shown(parameters[unknown[0]])} that rope_type "
            f"{rope_type!r} does not have; remove it if it means nothing"
        )
    theta = number("rope_theta", parameters.get("rope_theta"), 1.0, 1e12)
    partial = _optional(parameters, "partial_rotary_factor", 1.0, 0.0, 1.0)
    rotary_dim = int(context.head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            "partial_rotary_factor", partial, f"it must rotate an even part of head_dim={context.head_dim}"
        )
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    wavelength = np.power(np.float32(theta), exponent)  # over 2 pi
    inv_freq, scale = compute(wavelength, theta, parameters, context)
    return RopeSpec(inv_freq=tuple(float(f) for f in inv_freq), scale=float(scale))


_Computed = tuple[np.ndarray, float]


def _default(wavelength: np.ndarray, theta: float, parameters: Mapping[str, Any], context: RopeContext) -> _Computed:
    return np.float32(1) / wavelength, 1.0


def _linear(wavelength: np.ndarray, theta: float, parameters: Mapping[str, Any], context: RopeContext) -> _Computed:
    return np.float32(1) / wavelength / np.float32(_factor(parameters)), 1.0


def _llama3(wavelength: np.ndarray, theta: float, parameters: Mapping[str, Any], context: RopeContext) -> _Computed:
    factor = np.float32(_factor(parameters))
    low = number("low_freq_factor", parameters.get("low_freq_factor"), 1e-6, 1e6)
    high = number("high_freq_factor", parameters.get("high_freq_factor"), 1e-6, 1e6)
    if high <= low:
        raise ConfigError("high_freq_factor", high, f"it must be above low_freq_factor={low}")
    original = _original_length(parameters, context)
    inv_freq = np.float32(1) / wavelength
    length = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(original) / length - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(length > original / low, inv_freq / factor, inv_freq)
    medium = (length >= original / high) & (length <= original / low)
    return np.where(medium, smoothed, scaled), 1.0


def _yarn(wavelength: np.ndarray, theta: float, parameters: Mapping[str, Any], context: RopeContext) -> _Computed:
    factor, original = _factor(parameters), _original_length(parameters, context)
    beta_fast = _optional(parameters, "beta_fast", 32.0, 1e-6, 1e6)
    beta_slow = _optional(parameters, "beta_slow", 1.0, 1e-6, 1e6)
    if theta <= 1:
        raise ConfigError("rope_theta", theta, "yarn needs a number above 1")

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = (_optional(parameters, name, 0.0, 0.0, 1e6) for name in ("mscale", "mscale_all_dim"))
    default_scale = magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)
    scale = _optional(parameters, "attention_factor", default_scale, 1e-6, 1e6)

    dim = 2 * len(wavelength)
    truncate = parameters.get("truncate")
    if truncate not in (None, True, False):
        raise ConfigError("truncate", shown(truncate), "config.json needs true or false here")

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(beta_fast), correction(beta_slow)
    if truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - ramp
    interpolated = np.float32(1) / (np.float32(factor) * wavelength)
    return interpolated * (1 - keep) + np.float32(1) / wavelength * keep, scale


def _longrope(wavelength: np.ndarray, theta: float, parameters: Mapping[str, Any], context: RopeContext) -> _Computed:
    original = _original_length(parameters, context)
    factor = _optional(parameters, "factor", context.max_position_embeddings / original, 1e-6, 1e6)
    default_scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = _optional(parameters, "attention_factor", default_scale, 1e-6, 1e6)
    factors = {}
    for field in ("short_factor", "long_factor"):
        values = parameters.get(field)
        if not isinstance(values, list) or len(values) != len(wavelength):
            raise ConfigError(field, shown(values), f"longrope needs a list of {len(wavelength)} numbers here")
        factors[field] = np.array([number(field, value, 1e-6, 1e6) for value in values], np.float32)
    chosen = factors["short_factor" if context.max_model_len <= original else "long_factor"]
    return np.float32(1) / (chosen * wavelength), scale


#: rope type -> its function, and the parameters that it has of its own.
_TYPES: dict[str, tuple[Callable[[np.ndarray, float, Mapping[str, Any], RopeContext], _Computed], str]] = {
    "default": (_default, ""),
    "linear": (_linear, "factor"),
    "llama3": (_llama3, "factor low_freq_factor high_freq_factor original_max_position_embeddings"),
    "yarn": (
        _yarn,
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
    ),
    "longrope": (_longrope, "factor original_max_position_embeddings attention_factor short_factor long_factor"),
}


def _factor(parameters: Mapping[str, Any]) -> float:
    return number("rope factor", parameters.get("factor"), 1.0, 1e6)


def _original_length(parameters: Mapping[str, Any], context: RopeContext) -> int:
    value = parameters.get("original_max_position_embeddings")
    value = context.max_position_embeddings if value is None else value
    return whole_number("original_max_position_embeddings", value, 2, MAX_POSITION)


def _optional(parameters: Mapping[str, Any], field: str, default: float, low: float, high: float) -> float:
    value = parameters.get(field)
    return default if value is None else number(field, value, low, high)
