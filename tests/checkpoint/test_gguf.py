"""GGUF: every supported quantization by slices, Hugging Face names and values, and settings."""

import dataclasses
import json
import subprocess
import sys

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from tiny import BASE, MOE, MOE_LAYERS, setup, weights_of

from ryzanstein_jax.checkpoint.assemble import load_params
from ryzanstein_jax.checkpoint.gguf import QUANTIZED, GgufSource
from ryzanstein_jax.checkpoint.gguf_config import hf_config
from ryzanstein_jax.checkpoint.source import whole
from ryzanstein_jax.errors import UnsupportedModelError, WeightsError
from ryzanstein_jax.model.families import spec_from_config


def write(path, arch, tensors, settings=(), blocks=2, heads=9, kv_heads=3, embed=12):
    """`tensors`: GGUF name -> array, or (stored bytes, type)."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(embed)
    writer.add_feed_forward_length(13)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a"] * 37)
    for key, value in dict(settings).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(rows, heads):
    """As llama.cpp's converter stores q and k of the llama architecture."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def stored(spec, weights, arch):
    """A Hugging Face checkpoint -> GGUF tensors."""
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[arch], len(spec.layers))
    made = {}
    for name, value in weights.items():
        base, _, suffix = name.rpartition(".")
        if arch == "llama" and base.endswith(("q_proj", "k_proj")):
            value = permuted(value, spec.num_heads if base.endswith("q_proj") else spec.num_kv_heads)
        if arch.startswith("gemma") and base.endswith("norm"):
            value = value + 1
        if ".experts." in base:
            layer = base.split(".")[2]
            kind = base.rsplit(".", 1)[1].removesuffix("_proj")
            made.setdefault(f"blk.{layer}.ffn_{kind}_exps.weight", []).append(value)
        else:
            made[f"{table.get_name(base)}.{suffix}"] = value
    return {name: np.stack(value) if isinstance(value, list) else value for name, value in made.items()}


@pytest.mark.parametrize("kind", [Quant.F32, Quant.F16, Quant.BF16, *QUANTIZED], ids=lambda kind: kind.name)
def test_every_type_reads_by_slices(tmp_path, kind):
    rng = np.random.default_rng(0)
    if kind.name.endswith("_K"):  # the library reads them only; random bytes are as good, for any block decodes
        size, width = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 120, (6, 512 // size * width), np.uint8)
    else:
        data = gguf.quants.quantize(rng.standard_normal((6, 512)).astype(np.float32), kind)
    path = write(tmp_path / "x.gguf", "llama", {"token_embd.weight": (data, kind)})
    source = GgufSource(path)
    name = "model.embed_tokens.weight"
    assert source.info(name).shape == (6, 512)
    expected = gguf.quants.dequantize(data, kind)
    found = source.read(name, whole((6, 512)))
    assert found.dtype == source.info(name).dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    for box in (((1, 4), (0, 512)), ((0, 6), (7, 300)), ((5, 6), (256, 288)), ((2, 3), (511, 512))):
        index = tuple(slice(*ends) for ends in box)
        np.testing.assert_array_equal(source.read(name, box).astype(np.float32), expected[index])
    source.release(name)


FAMILIES = {
    "llama": BASE.replace(tie_embeddings=False, qkv_bias=True),
    "qwen2": BASE.replace(qkv_bias=True),
    "qwen3": BASE.replace(qk_norm="head"),
    "gemma2": BASE.replace(norms="both"),
    "gemma3": BASE.replace(norms="both", qk_norm="head"),
    "olmo2": BASE.replace(norms="post", qk_norm="all", tie_embeddings=False),
    "qwen3moe": BASE.replace(qk_norm="head", moe=MOE, layers=(MOE_LAYERS[1],) * 2),
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_tensors_read_as_hugging_face_has_them(tmp_path, arch):
    spec = FAMILIES[arch]
    weights = weights_of(spec)
    source = GgufSource(write(tmp_path / "x.gguf", arch, stored(spec, weights, arch)))
    if spec.moe is None:
        assert set(source.names()) == set(weights)
    for name in set(source.names()) & set(weights):
        found = source.read(name, whole(weights[name].shape))
        np.testing.assert_allclose(found, weights[name], rtol=0, atol=1e-6, err_msg=name)
    sizes, params, mesh = setup(spec, 2)
    arrays, _ = load_params(source, spec, sizes, params, mesh)
    if spec.moe:
        np.testing.assert_array_equal(
            arrays["layers.1.mlp.gate_up"][3, 1], weights["model.layers.1.mlp.experts.3.up_proj.weight"]
        )


def test_mixtral_is_the_llama_architecture_with_experts(tmp_path):
    spec = BASE.replace(moe=MOE, layers=(MOE_LAYERS[1],) * 2)
    settings = {"llama.expert_count": 5, "llama.expert_used_count": 2}
    source = GgufSource(write(tmp_path / "x.gguf", "llama", stored(spec, weights_of(spec), "llama"), settings))
    load_params(source, spec, *(lambda s, p, m: (s, p, m))(*setup(spec, 2)))
    config = hf_config(source)
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 5, 2)


def test_phi3_keeps_its_fused_tensors(tmp_path):
    weights = weights_of(BASE)
    at = "model.layers.0.self_attn."
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "blk.0.attn_qkv.weight": np.concatenate([weights[f"{at}{name}_proj.weight"] for name in "qkv"]),
        "blk.0.ffn_up.weight": np.zeros((26, 12), np.float32),
        "rope_factors_long.weight": np.full(2, 4.0, np.float32),
        "rope_factors_short.weight": np.full(2, 1.5, np.float32),
    }
    settings = {"phi3.rope.dimension_count": 4, "phi3.rope.scaling.original_context_length": 16}
    source = GgufSource(write(tmp_path / "x.gguf", "phi3", tensors, settings))
    assert "model.layers.0.self_attn.qkv_proj.weight" in source.names()
    assert "model.layers.0.mlp.gate_up_proj.weight" in source.names()
    config = hf_config(source)
    assert config["rope_scaling"]["long_factor"] == [4.0, 4.0] and config["original_max_position_embeddings"] == 16


@pytest.mark.parametrize("box", [((0, 36), (0, 12)), ((4, 8), (0, 12)), ((3, 11), (2, 9)), ((35, 36), (0, 1))])
def test_permuted_rows_read_by_any_slice(tmp_path, box):
    weights = weights_of(BASE)
    source = GgufSource(write(tmp_path / "x.gguf", "llama", stored(BASE, weights, "llama")))
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(source.read(name, box), weights[name][tuple(slice(*ends) for ends in box)])


def test_settings_read_as_a_config(tmp_path):
    tensors = {"token_embd.weight": np.zeros((37, 12), np.float32)}
    settings = {"llama.rope.freq_base": 100000.0, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.eot_token_id": 5}  # fmt: skip
    config = hf_config(GgufSource(write(tmp_path / "x.gguf", "llama", tensors, settings)))
    expected = {
        "model_type": "llama", "vocab_size": 37, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 4, "intermediate_size": 13, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 1e5, "rope_scaling": None, "tie_word_embeddings": True,
        "attention_bias": False, "bos_token_id": 1, "eos_token_id": [2, 5], "torch_dtype": "float32",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_gemma_settings(tmp_path):
    tensors = {"token_embd.weight": np.zeros((37, 12), np.float32)}
    settings = {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0,
                "gemma2.attention.sliding_window": 16}  # fmt: skip
    config = hf_config(GgufSource(write(tmp_path / "x.gguf", "gemma2", tensors, settings)))
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)
    assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (16, 4)


@pytest.mark.parametrize("honest", [True, False])
def test_llama3_scaling_is_found_from_its_factors(tmp_path, honest):
    # transformers' own formula, for a head of 64 and theta 500000.
    inverse = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    wavelength = 2 * np.pi / inverse
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(wavelength > 8192, 32.0, np.where(wavelength < 2048, 1.0, 1 / ((1 - smooth) / 32 + smooth)))
    factors = factors if honest else factors[::-1].copy()
    tensors = {"token_embd.weight": np.zeros((37, 12), np.float32), "rope_freqs.weight": factors.astype(np.float32)}
    path = write(tmp_path / "x.gguf", "llama", tensors, {"llama.rope.freq_base": 500000.0})
    if honest:
        scaling = hf_config(GgufSource(path))["rope_scaling"]
        assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 32.0)
        assert scaling["original_max_position_embeddings"] == 8192
    else:
        with pytest.raises(UnsupportedModelError, match="rope_freqs"):
            hf_config(GgufSource(path))


def test_other_architectures_and_quantizations_are_refused(tmp_path):
    tensors = {"token_embd.weight": np.zeros((37, 12), np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"'bloom'.*llama, qwen2"):
        GgufSource(write(tmp_path / "a.gguf", "bloom", tensors))
    size, width = gguf.GGML_QUANT_SIZES[Quant.IQ4_XS]
    raw = np.zeros((2, 512 // size * width), np.uint8)
    with pytest.raises(WeightsError, match=r"token|embed.*IQ4_XS"):
        GgufSource(write(tmp_path / "b.gguf", "llama", {"token_embd.weight": (raw, Quant.IQ4_XS)}))


def test_any_truncation_is_refused(tmp_path):
    content = write(tmp_path / "x.gguf", "llama", {"token_embd.weight": np.ones((37, 12), np.float32)}).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (*range(0, len(content) - 1792, 37), len(content) - 17):
        cut.write_bytes(content[:size])
        with pytest.raises((WeightsError, UnsupportedModelError)):
            GgufSource(cut)


def test_hostile_counts_end_at_once(tmp_path):
    path = write(tmp_path / "x.gguf", "llama", {"token_embd.weight": np.ones((37, 12), np.float32)})
    content = path.read_bytes()
    start = content.index(b"token_embd.weight") + len(b"token_embd.weight")
    huge = (1 << 62).to_bytes(8, "little")
    for offset in (8, 16, start + 4, start + 12):  # tensors, keys, and both dimensions
        path.write_bytes(content[:offset] + huge + content[offset + 8 :])
        with pytest.raises(WeightsError):
            GgufSource(path)
    dims = (1 << 32).to_bytes(8, "little")  # their product wraps around to zero
    path.write_bytes(content[: start + 4] + dims + dims + content[start + 20 :])
    with pytest.raises(WeightsError):
        GgufSource(path)


def load_last_layer(path):
    """Of the default model, with its embedding: the source, the arrays and what loading cost."""
    source = GgufSource(path)
    spec = BASE.replace(
        vocab_size=49152, hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536,
        layers=(BASE.layers[0],) * 30,
    )  # fmt: skip
    sizes, params, mesh = setup(spec, 2)
    few = {path: param for path, param in params.items() if path.startswith(("layers.29.", "final_norm"))}
    kept = {name for name in source.names() if ".29." in name or "norm" in name.split(".")[1]}
    source._infos = {name: source._infos[name] for name in kept | {"model.embed_tokens.weight"}}
    few["embedding.table"] = params["embedding.table"]
    return source, *load_params(source, spec, sizes, few, mesh)


def test_the_default_model_loads(smollm2_path):
    config = hf_config(GgufSource(smollm2_path))
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]) == (30, 3, 49152)
    source, arrays, _ = load_last_layer(smollm2_path)
    kernel = np.asarray(arrays["layers.29.attention.qkv.kernel"])
    name = "model.layers.29.self_attn.k_proj.weight"
    np.testing.assert_array_equal(kernel[2, -2], source.read(name, ((128, 192), (0, 576))))
    assert 0.01 < np.asarray(arrays["embedding.table"]).std() < 1
    assert jax.tree.leaves(arrays)[0].dtype == np.float32


def test_loading_holds_little_more_than_the_weights(smollm2_path):
    """In a process of its own: what other tests still hold, or give back meanwhile, counts as well."""
    command = [sys.executable, __file__, str(smollm2_path)]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True).stdout)
    # The devices are CPUs: their arrays count.
    assert report["bytes_on_devices"] < report["peak_host_bytes"] < 2 * report["bytes_on_devices"]


def test_bfloat16_stays_bfloat16(tmp_path):
    data = gguf.quants.quantize(np.ones((37, 32), np.float32), Quant.BF16)
    source = GgufSource(write(tmp_path / "x.gguf", "llama", {"token_embd.weight": (data, Quant.BF16)}))
    assert source.info("model.embed_tokens.weight").dtype == ml_dtypes.bfloat16
    assert hf_config(source)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "qwen3moe"])
def test_settings_make_a_model_spec(tmp_path, arch):
    settings = {}
    if arch == "qwen3moe":
        settings = {f"{arch}.expert_count": 5, f"{arch}.expert_used_count": 2, f"{arch}.expert_feed_forward_length": 7}
    if arch.startswith("gemma"):
        settings = {f"{arch}.attention.sliding_window": 16}
    tensors = {"token_embd.weight": np.zeros((37, 12), np.float32)}
    spec = spec_from_config(hf_config(GgufSource(write(tmp_path / "x.gguf", arch, tensors, settings))))
    assert (spec.num_layers, spec.num_heads, spec.head_dim, spec.vocab_size) == (2, 9, 4, 37)
    expected = {"qwen2": {"qkv_bias": True}, "olmo2": {"norms": "post", "qk_norm": "all"},
                "gemma2": {"norms": "both", "norm_offset": 1.0, "attention_scale": 0.5},
                "qwen3": {"qk_norm": "head"}}.get(arch, {})  # fmt: skip
    assert {key: getattr(spec, key) for key in expected} == expected


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(load_last_layer(sys.argv[1])[2])))
