"""Reading a `config.json` with suspicion: typed, bounded, and no field that changes the model passed over.

A field is read by the family's row, or known to be harmless, or neutral at the value it has. Any other
one is refused by name: a model that is almost right is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ryzanstein_jax.errors import ConfigError, UnsupportedModelError

#: Fields that say nothing about what the model computes at inference, whatever their value.
_HARMLESS_NAMES = """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _from_model_config
    _name_or_path _sliding_window_pattern architectures attention_dropout auto_map bad_words_ids
    begin_suppress_tokens cache_implementation chunk_size_feed_forward decoder_start_token_id do_sample dtype
    embd_pdrop embedding_dropout finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout id2label initializer_range keep_quantization_config_in_bnb_skip label2id language max_length
    max_sequence_length min_length model_max_length model_type no_repeat_ngram_size num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type
    remove_invalid_values resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef
    router_jitter_noise sep_token_id sliding_window_size suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class tokenizer_model_max_length top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
HARMLESS = frozenset(_HARMLESS_NAMES.split())

#: Fields that change what a model computes, with the values at which they don't. None always is one.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "num_shared_experts": (0,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "shared_expert_intermediate_size": (0,),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
}


def shown(value: object) -> str:
    """A value from outside, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def whole_number(field: str, value: object, low: int, high: int) -> int:
    """The value, if it is a whole number from low to high.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(field, _Short(value), f"config.json needs a whole number from {low} to {high} here")
    return value


def number(field: str, value: object, low: float, high: float) -> float:
    """The value as a float, if it is a finite number from low to high.

    Raises:
        ConfigError: it is not.
    """
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is converted: a whole number may be too large for a float.
    if not valid or not low <= value <= high or not math.isfinite(value):  # type: ignore[operator,arg-type]
        raise ConfigError(field, _Short(value), f"config.json needs a number from {low} to {high} here")
    return float(value)  # type: ignore[arg-type]


class Fields:
    """The fields of a configuration over a family's defaults; remembers which were read.

    A field that is null counts as absent where `get` is asked for a value, as in transformers, unless the
    family's row says what null means.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]):
        self._config, self._defaults = config, defaults
        self._read: set[str] = set()

    def given(self, field: str) -> Any:
        """What the configuration itself says, or None."""
        self._read.add(field)
        return self._config.get(field)

    def get(self, field: str) -> Any:
        """The value, or the family's default where the field is absent, or None. Null stays null."""
        self._read.add(field)
        return self._config[field] if field in self._config else self._defaults.get(field)

    def integer(self, field: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number; null or absent gives the family's default, else `default`.

        Raises:
            ConfigError: no such number, or none at all.
        """
        value = self.given(field)
        for fallback in (self._defaults.get(field), default):
            value = fallback if value is None else value
        return whole_number(field, value, low, high)

    def number(self, field: str, low: float, high: float) -> float:
        """A number; null or absent gives the family's default.

        Raises:
            ConfigError: no such number, or none at all.
        """
        value = self.given(field)
        return number(field, self._defaults.get(field) if value is None else value, low, high)

    def optional_number(self, field: str, low: float, high: float) -> float | None:
        """A number, or None where the configuration says null, or says nothing and the family has no default."""
        value = self.get(field)
        return None if value is None else number(field, value, low, high)

    def flag(self, field: str) -> bool:
        """A truth value; null or absent gives the family's default, else False.

        Raises:
            ConfigError: it is something else.
        """
        value = self.given(field)
        value = self._defaults.get(field, False) if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(field, _Short(value), "config.json needs true or false here")
        return value

    def refuse_unread(self) -> None:
        """Looks at each field that nothing read.

        Raises:
            UnsupportedModelError: a field is neither harmless nor at a neutral value.
        """
        for field, value in self._config.items():
            if field in self._read or field in HARMLESS or value is None:
                continue
            if field in NEUTRAL:
                if any(type(value) in (type(n), float) and value == n for n in NEUTRAL[field]):
                    continue
                raise UnsupportedModelError(
                    f"config.json has {field}={shown(value)}, which this engine does not compute here; "
                    f"use a model without it"
                )
            raise UnsupportedModelError(
                f"config.json has the unknown field {shown(field)}={shown(value)}, which may change what the "
                f"model computes; if it is only informational, remove it from config.json"
            )


class _Short:
    """Shows a value from outside in an error without its full length."""

    def __init__(self, value: object):
        self.value = value

    def __repr__(self) -> str:
        return shown(self.value)
