"""What `quantization_config` says: which kernels are quantized and how, and what is refused."""

import pytest

from ryzanstein_jax.errors import UnsupportedModelError
from ryzanstein_jax.model.quantization import LINEAR, QUANTIZATIONS, TABLES, Quantization
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
