"""What `quantization_config` says: which kernels are quantized and how, and what is refused."""

import pytest

from ryzanstein_jax.errors import UnsupportedModelError
from ryzanstein_jax.model.quantization import LINEAR, QUANTIZATIONS, Quantization
from ryzanstein_jax.model.quantized_checkpoints import quantization_config, resolve_quantization

W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
                "group_size": None, "observer": "minmax",
            },
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
            "output_activations": None,
        }
    },
}  # fmt: skip


def changed(**group):
    base = W8A8["config_groups"]["group_0"]
    group = {name: (base[name] or {}) | part if isinstance(part, dict) else part for name, part in group.items()}
    return W8A8 | {"config_groups": {"group_0": base | group}}


def test_a_checkpoint_says_what_is_int8():
    whole = QUANTIZATIONS["int8"]
    assert resolve_quantization(None, None) is None
    assert resolve_quantization("int8", None) == whole
    for held in (whole, Quantization("int8", LINEAR), Quantization("int8", ("down",), ("down",))):
        assert resolve_quantization(None, quantization_config(held)) == held
    assert resolve_quantization(None, W8A8) == Quantization("int8", LINEAR)
    assert resolve_quantization(None, W8A8 | {"ignore": []}) == Quantization("int8", (*LINEAR, "unembed"))
    assert resolve_quantization("int8", W8A8) == whole


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "ryzanstein_jax", "name": "int2", "roles": []},
        {"quant_method": "ryzanstein_jax", "name": "int8", "roles": ["router"], "fine": []},
        {"quant_method": "ryzanstein_jax", "name": "int8", "roles": ["down"], "fine": ["qkv"]},
        {"quant_method": "ryzanstein_jax", "name": "int8", "roles": ["down"], "fine": "down"},
        {"quant_method": "ryzanstein_jax", "name": "int8"},
        W8A8 | {"format": "pack-quantized"},
        W8A8 | {"ignore": ["lm_head", "model.layers.0.mlp.down_proj"]},
        W8A8 | {"ignore": "lm_head"},
        W8A8 | {"config_groups": {}},
        W8A8 | {"config_groups": []},
        W8A8 | {"kv_cache_scheme": {"num_bits": 8}},
        changed(weights={"num_bits": 4}),
        changed(weights={"type": "float"}),
        changed(weights={"symmetric": False}),
        changed(weights={"strategy": "group"}),
        changed(weights=None),
        changed(input_activations={"dynamic": False}),
        changed(input_activations=None),
        changed(output_activations={"num_bits": 8}),
        changed(targets=["re:.*q_proj"]),
        "int8",
        [],
        {"quant_method": "x" * 10_000},
    ],
)
def test_what_is_not_read_is_refused_with_what_is(config):
    with pytest.raises(UnsupportedModelError, match="quantization_config.*Known: compressed-tensors int") as caught:
        resolve_quantization("int8", config)
    assert len(str(caught.value)) < 600


def compressed(weights, inputs, form):
    """As compressed-tensors 0.20 writes it."""
    fixed = {"dynamic": False, "group_size": None, "observer": "minmax", "observer_kwargs": {}, "actorder": None}
    group = {"targets": ["Linear"], "weights": fixed | weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", "version": "0.20.0",
        "global_compression_ratio": None, "moe_sparsity_config": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
W4A16 = compressed(GROUP, None, "pack-quantized")
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = FLOAT | {"strategy": "token", "dynamic": True, "group_size": None}
STATIC = FLOAT | {"strategy": "tensor", "dynamic": False, "group_size": None}
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.01,
    "static_groups": False, "true_sequential": True, "model_name_or_path": None, "checkpoint_format": "gptq",
    "lm_head": False, "meta": {"quantizer": ["gptqmodel:1.0"]},
}  # fmt: skip
CHANNELS = Quantization("fp8", LINEAR, layout="fp8")
BLOCKS = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (W4A16, Quantization("int4", LINEAR, group=128, layout="pack-quantized")),
        (
            compressed(GROUP | {"symmetric": False, "group_size": 32, "actorder": "weight"}, None, "pack-quantized"),
            Quantization("int4", LINEAR, group=32, zeros=True, layout="pack-quantized"),
        ),
        (
            compressed(GROUP | {"strategy": "channel", "group_size": None}, None, "pack-quantized"),
            Quantization("int4", LINEAR, layout="pack-quantized"),
        ),
        (compressed(FLOAT | {"strategy": "channel"}, TOKEN, "float-quantized"), CHANNELS),
        (compressed(FLOAT | {"strategy": "tensor"}, STATIC, "float-quantized"), CHANNELS),
        (
            compressed(
                FLOAT | {"strategy": "block", "block_structure": [128, 64]},
                FLOAT | {"strategy": "group", "group_size": 64, "dynamic": True}, "float-quantized",
            ),
            Quantization("fp8", LINEAR, group=64, layout="fp8", block=128),
        ),
        (AWQ, Quantization("int4", LINEAR, group=128, zeros=True, layout="awq")),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
            Quantization("int4", LINEAR, group=64, zeros=True, layout="awq"),
        ),
        (GPTQ, Quantization("int4", LINEAR, group=128, layout="gptq")),
        (
            GPTQ | {"checkpoint_format": "gptq_v2", "sym": False, "group_size": -1},
            Quantization("int4", LINEAR, zeros=True, layout="gptq_v2"),
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, CHANNELS),
        (BLOCKS, Quantization("fp8", LINEAR, group=128, layout="fp8", block=128)),
    ],
)  # fmt: skip
def test_ready_made_formats(config, wanted):
    assert resolve_quantization(None, config) == wanted
    whole = resolve_quantization(wanted.name, config)
    assert whole.roles == QUANTIZATIONS[wanted.name].roles and whole.layout == wanted.layout
    assert resolve_quantization(None, quantization_config(whole)).layout == "", "a snapshot has this package's own"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (W4A16 | {"format": "marlin-24"}, "format 'marlin-24'"),
        (W4A16 | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        (W4A16 | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (W4A16 | {"new_field": 1}, "new_field=1"),
        (W4A16 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (W4A16 | {"ignore": ["lm_head", "re:.*down_proj"]}, "down_proj"),
        (compressed(GROUP | {"num_bits": 3}, None, "pack-quantized"), "weights of 3 bits"),
        (compressed(GROUP | {"num_bits": 8}, None, "pack-quantized"), "weights of 8 bits"),
        (compressed(GROUP | {"actorder": "group"}, None, "pack-quantized"), "actorder='group'"),
        (compressed(GROUP | {"actorder": True}, None, "pack-quantized"), "actorder=True"),
        (compressed(GROUP | {"group_size": 0}, None, "pack-quantized"), "group_size=0"),
        (compressed(GROUP | {"group_size": "128"}, None, "pack-quantized"), "group_size='128'"),
        (compressed(GROUP | {"dynamic": True}, None, "pack-quantized"), "dynamic=True"),
        (compressed(GROUP | {"symmetric": 1}, None, "pack-quantized"), "symmetric=1"),
        (compressed(GROUP | {"odd": 1}, None, "pack-quantized"), "odd=1"),
        (compressed(GROUP, TOKEN, "pack-quantized"), "weights of 4 bits"),
        (compressed(FLOAT | {"strategy": "channel"}, None, "float-quantized"), "input_activations=None"),
        (compressed(FLOAT | {"strategy": "channel"}, TOKEN | {"num_bits": 4}, "float-quantized"), "num_bits=4"),
        (compressed(FLOAT | {"num_bits": 4, "strategy": "channel"}, TOKEN, "float-quantized"), "weights of 4 bits"),
        (compressed(FLOAT | {"strategy": "block"}, TOKEN, "float-quantized"), "input_activations of"),
        (AWQ | {"bits": 8}, "bits=8"),
        (AWQ | {"version": "gemv"}, "version='gemv'"),
        (AWQ | {"zero_point": False}, "zero_point=False"),
        (AWQ | {"group_size": 0}, "group_size=0"),
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, "self_attn"),
        (AWQ | {"modules_to_not_convert": "gate"}, "modules_to_not_convert='gate'"),
        (GPTQ | {"desc_act": True}, "desc_act=True"),
        (GPTQ | {"bits": 3}, "bits=3"),
        (GPTQ | {"lm_head": True}, "lm_head=True"),
        (GPTQ | {"checkpoint_format": "marlin"}, "format='marlin'"),
        (GPTQ | {"sym": None, "dynamic": {"-:.*down.*": {}}}, "dynamic="),
        (GPTQ | {"pack_dtype": "int8"}, "pack_dtype='int8'"),
        (BLOCKS | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (BLOCKS | {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"),
        (BLOCKS | {"weight_block_size": [128]}, "blocks of"),
        (BLOCKS | {"weight_block_size": [128, True]}, "blocks=True"),
        (BLOCKS | {"activation_scheme": "other"}, "activation_scheme='other'"),
        ({"quant_method": "ryzanstein_jax", "name": "int4", "roles": [], "fine": [], "group": -1}, "group=-1"),
        ({"quant_method": "ryzanstein_jax", "name": "int8", "roles": [], "fine": [], "group": 8}, "group=8"),
        ({"quant_method": "ryzanstein_jax", "name": "int4", "roles": [], "fine": [], "zeros": 1}, "zeros"),
        ({"quant_method": ["awq"]}, "quantization_config"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(config, named):
    with pytest.raises(UnsupportedModelError, match="Known: compressed") as caught:
        resolve_quantization(None, config)
    assert named in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize(("asked", "config"), [("int8", AWQ), ("int4", BLOCKS), ("fp8", W8A8), ("int4", W8A8)])
def test_a_checkpoint_does_not_become_another_precision(asked, config):
    with pytest.raises(UnsupportedModelError, match=f"quantization='{asked}' does not go with"):
        resolve_quantization(asked, config)
