"""What `quantization_config` of a checkpoint says of its weights. Each field is known, or the checkpoint is refused.

The formats are those of compressed-tensors 0.20, AutoAWQ 0.2, GPTQModel 7 (and AutoGPTQ before it), and of the `fp8`
method of transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from ryzanstein_jax.errors import UnsupportedModelError
from ryzanstein_jax.model.quantization import LINEAR, QUANTIZATIONS, Quantization

#: Of the snapshots of this package.
OWN_METHOD = "ryzanstein_jax"

_KNOWN = (
    "compressed-tensors int-quantized (8-bit channel weights, dynamic 8-bit token activations), pack-quantized (4-bit) "
    "and float-quantized (fp8), AWQ (gemm, 4-bit), GPTQ (4-bit, no desc_act) and fp8 (per tensor, channel or block)"
)
#: Modules that are never quantized here, so that it does not matter whether a checkpoint leaves them out.
_NEVER = re.compile(
    r"(lm_head|gate|router|norm|input_layernorm|post_attention_layernorm|pre_feedforward_layernorm"
    r"|post_feedforward_layernorm|q_norm|k_norm|embed_tokens)"
)
_OTHER_MODALITIES = re.compile(r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\b")
#: How a checkpoint was made, or is to be run elsewhere; nothing of it changes what the stored values mean.
_CALIBRATION = (
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_name_or_path", "meta", "mse",
    "model_file_base_name", "dataset", "tokenizer", "batch_size", "pad_token_id", "max_input_length", "model_seqlen",
    "block_name_to_quantize", "act_group_aware", "module_name_preceding_first_block", "cache_block_outputs", "backend",
    "use_exllama", "exllama_config", "use_cuda_fp16", "disable_exllama", "do_fuse", "modules_to_fuse",
    "fuse_max_seq_len",
)  # fmt: skip


def quantization_config(quantization: Quantization) -> dict[str, object]:
    """What `config.json` of a snapshot says of its weights."""
    return {
        "quant_method": OWN_METHOD, "name": quantization.name, "roles": list(quantization.roles),
        "fine": list(quantization.fine), "group": quantization.group, "zeros": quantization.zeros,
    }  # fmt: skip


def resolve_quantization(name: str | None, stated: object) -> Quantization | None:
    """How a model is computed.

    Args:
        name: that was asked for, of `QUANTIZATIONS`, or None: as the checkpoint is.
        stated: its `quantization_config`, or None.

    Raises:
        UnsupportedModelError: its weights are something else than what is read here, or than what was asked for.
    """
    if stated is None:
        return QUANTIZATIONS[name] if name is not None else None
    found = _of_checkpoint(stated)
    if name is None:
        return found
    if name != found.name:
        raise UnsupportedModelError(
            f"quantization={name!r} does not go with this checkpoint, whose weights are {found.name} already; leave "
            "the setting out, or take the model in floats"
        )
    wanted = QUANTIZATIONS[name]
    if found.layout or found.name != "int8":
        return replace(found, roles=wanted.roles, fine=wanted.fine)
    return wanted


def _of_checkpoint(value: object) -> Quantization:
    readers = {
        OWN_METHOD: _own, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq, "fp8": _fp8,
    }  # fmt: skip
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    reader = readers.get(method) if isinstance(method, str) else None
    if reader is None:
        _refuse(value)
    return reader(_Stated(value, value))


class _Stated:
    """Fields of a mapping, each looked at once: `done` refuses those that were not."""

    def __init__(self, fields: object, whole: object):
        self.whole = whole
        if not isinstance(fields, Mapping):
            self.refuse()
        self.rest: dict[str, Any] = {str(name): value for name, value in fields.items()}

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these names that has one."""
        values = [self.rest.pop(name, None) for name in names]
        return next((value for value in values if value is not None), default)

    def expect(self, wanted: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses a field that has none of the values in its tuple; a missing one counts as None."""
        for name, values in wanted.items():
            value = self.rest.pop(name, None)
            if not any(value is v or (type(value) is type(v) and value == v) for v in values):
                self.refuse(f"{name}={value!r}")

    def part(self, name: str) -> _Stated:
        return _Stated(self.rest.pop(name, None), self.whole)

    def done(self, harmless: Iterable[str] = ()) -> None:
        unread = sorted(self.rest.keys() - set(harmless))
        if unread:
            self.refuse(f"{unread[0]}={self.rest[unread[0]]!r}")

    def whole_number(self, name: str, value: object, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1 << 20:
            self.refuse(f"{name}={value!r}")
        return value

    def refuse(self, field: str = "") -> NoReturn:
        _refuse(self.whole, field)


def _own(stated: _Stated) -> Quantization:
    known = QUANTIZATIONS.get(str(stated.take("name")))
    roles, fine = stated.take("roles"), stated.take("fine")
    group, zeros = stated.take("group", default=0), stated.take("zeros", default=False)
    stated.done(("quant_method",))
    right = isinstance(roles, list) and isinstance(fine, list) and isinstance(zeros, bool)
    if known is None or not right or not set(map(str, fine)) <= set(map(str, roles)) <= set(known.roles):
        stated.refuse("name, roles, fine or zeros")
    stated.whole_number("group", group, 0)
    if (known.name == "int8" and (group or zeros)) or (known.name == "fp8" and zeros):
        stated.refuse(f"group={group!r}")
    return Quantization(known.name, tuple(map(str, roles)), tuple(map(str, fine)), group, zeros)


def _compressed_tensors(stated: _Stated) -> Quantization:
    """As llm-compressor writes it: every linear layer alike; of int8 the output projection may be one of them."""
    form, groups = stated.take("format"), stated.take("config_groups")
    ignored = _ignored(stated, "ignore")
    none: tuple[Any, ...] = (None, {})
    stated.expect(
        {"kv_cache_scheme": (None,), "sparsity_config": none, "transform_config": none, "moe_sparsity_config": none}
    )
    stated.done(("quant_method", "quantization_status", "global_compression_ratio", "version"))
    if not isinstance(groups, Mapping) or len(groups) != 1:
        stated.refuse("config_groups")
    (group,) = (_Stated(one, stated.whole) for one in groups.values())
    form = group.take("format", default=form)
    group.expect({"targets": (["Linear"],), "output_activations": (None,)})
    has_inputs = group.rest.get("input_activations") is not None
    weights = group.part("weights")
    inputs = group.part("input_activations") if has_inputs else None
    group.rest.pop("input_activations", None)
    group.done()
    kind = weights.take("type"), weights.take("num_bits")
    weights.expect({"dynamic": (False, None), "actorder": (None, False, "weight", "static")})
    strategy, size = weights.take("strategy"), weights.take("group_size")
    symmetric, block = weights.take("symmetric"), weights.take("block_structure")
    weights.done(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
    if type(symmetric) is not bool:
        stated.refuse(f"symmetric={symmetric!r}")
    if kind == ("int", 8) and form in ("int-quantized", None) and strategy == "channel" and symmetric:
        _activations(stated, inputs, "int", {(True, "token")})
        return Quantization("int8", LINEAR if "lm_head" in ignored else (*LINEAR, "unembed"))
    if kind == ("int", 4) and form == "pack-quantized" and inputs is None and strategy in ("group", "channel"):
        size = stated.whole_number("group_size", size, 1) if strategy == "group" else 0
        return Quantization("int4", LINEAR, group=size, zeros=not symmetric, layout="pack-quantized")
    if kind == ("float", 8) and form in ("float-quantized", "naive-quantized") and symmetric:
        if strategy in ("channel", "tensor"):
            _activations(stated, inputs, "float", {(True, "token"), (False, "tensor"), (True, "tensor")})
            return Quantization("fp8", LINEAR, layout="fp8")
        if strategy == "block":
            _activations(stated, inputs, "float", {(True, "group")})
            return _blocks(stated, block, "fp8")
    stated.refuse(f"weights of {kind[1]} bits ({kind[0]}, {strategy}) in format {form!r}")


def _activations(stated: _Stated, inputs: _Stated | None, kind: str, known: set[tuple[bool, str]]) -> None:
    """Refuses activations that are not 8-bit, symmetric and of one of these (dynamic, strategy)."""
    if inputs is None:
        stated.refuse("input_activations=None")
    inputs.expect({"num_bits": (8,), "type": (kind,), "symmetric": (True,), "actorder": (None,)})
    found = inputs.take("dynamic"), inputs.take("strategy")
    inputs.done(("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "group_size", "block_structure"))
    if found not in known:
        stated.refuse(f"input_activations of dynamic={found[0]!r}, strategy={found[1]!r}")


def _awq(stated: _Stated) -> Quantization:
    bits, size = stated.take("bits", "w_bit"), stated.take("group_size", "q_group_size")
    form = stated.take("version", "format", default="gemm")
    _ignored(stated, "modules_to_not_convert")
    stated.expect({
        "zero_point": (True,), "desc_act": (None, False), "lm_head": (None, False), "sym": (None, False, True),
        "modules_in_block_to_quantize": (None,),
    })  # fmt: skip
    stated.done(("quant_method", *_CALIBRATION))
    if bits != 4 or str(form).lower() != "gemm":
        stated.refuse(f"bits={bits!r}, version={form!r}")
    return Quantization("int4", LINEAR, group=_group(stated, size), zeros=True, layout="awq")


def _gptq(stated: _Stated) -> Quantization:
    bits, size = stated.take("bits"), stated.take("group_size")
    form = str(stated.take("checkpoint_format", "format", default="gptq")).lower()
    symmetric, act_order = stated.take("sym", default=True), stated.take("desc_act", default=False)
    _ignored(stated, "modules_to_not_convert")
    if act_order is not False:
        stated.refuse(f"desc_act={act_order!r}")
    stated.expect({
        "lm_head": (None, False), "is_marlin_format": (None, False), "pack_dtype": (None, "int32"),
        "dynamic": (None, {}), "modules_in_block_to_quantize": (None,), "adapter": (None,), "method": (None, "gptq"),
    })  # fmt: skip
    stated.done(("quant_method", *_CALIBRATION))
    if bits != 4 or form not in ("gptq", "gptq_v2") or type(symmetric) is not bool:
        stated.refuse(f"bits={bits!r}, format={form!r}, sym={symmetric!r}")
    return Quantization("int4", LINEAR, group=_group(stated, size), zeros=not symmetric, layout=form)


def _fp8(stated: _Stated) -> Quantization:
    block = stated.take("weight_block_size")
    _ignored(stated, "modules_to_not_convert", "ignored_layers")
    stated.expect({
        "activation_scheme": (None, "dynamic", "static"), "fmt": (None, "e4m3"), "scale_fmt": (None, "float"),
        "dequantize": (None, False), "modules_to_convert": (None,), "expert_dtype": (None, "fp8"),
        "kv_cache_scheme": (None,), "is_checkpoint_fp8_serialized": (None, True),
    })  # fmt: skip
    stated.done(("quant_method",))
    return Quantization("fp8", LINEAR, layout="fp8") if block is None else _blocks(stated, block, "fp8")


def _blocks(stated: _Stated, block: object, layout: str) -> Quantization:
    """Blocks of [outputs, inputs] with one scale each."""
    if not isinstance(block, list) or len(block) != 2:
        stated.refuse(f"blocks of {block!r}")
    rows, inputs = (stated.whole_number("blocks", size, 1) for size in block)
    return Quantization("fp8", LINEAR, group=inputs, layout=layout, block=rows)


def _group(stated: _Stated, size: object) -> int:
    """The inputs of a group; -1 is all of them: one scale for each output."""
    return 0 if size == -1 else stated.whole_number("group_size", size, 1)


def _ignored(stated: _Stated, *names: str) -> set[str]:
    """The modules that a checkpoint leaves in floats; refused where some of the linear layers are among them."""
    ignored = stated.take(*names, default=[])
    if not isinstance(ignored, list):
        stated.refuse(f"{names[0]}={ignored!r}")
    for entry in map(str, ignored):
        name = entry.removeprefix("re:").removeprefix("^").removeprefix(".*").removesuffix("$").replace("\\.", ".")
        if not _NEVER.fullmatch(name.rsplit(".", 1)[-1]) and not _OTHER_MODALITIES.match(name.removesuffix(".*")):
            stated.refuse(f"{names[0]} with {entry!r}")
    return {str(entry).removeprefix("re:").removeprefix(".*") for entry in ignored}


def _refuse(value: object, field: str = "") -> NoReturn:
    text = repr(value)
    raise UnsupportedModelError(
        f"config.json has quantization_config={text if len(text) <= 80 else text[:77] + '...'}"
        + (f", in it {field[:120]}" if field else "")
        + f": this kind of quantized checkpoint is not read. Known: {_KNOWN}. Take the model in float32, bfloat16 or "
        'float16, and quantization="int8" if you like'
    )
