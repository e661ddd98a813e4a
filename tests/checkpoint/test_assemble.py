"""The weights that reach the devices compute what the checkpoint's do, at every width."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BASE, MOE, MOE_LAYERS, DictSource, setup, weights_of

from ryzanstein_jax.checkpoint.assemble import assemble, load_params
from ryzanstein_jax.checkpoint.dummy import dummy_params
from ryzanstein_jax.checkpoint.layout import layout_of
from ryzanstein_jax.checkpoint.recipe import make_recipes
from ryzanstein_jax.errors import WeightsError

FULL = BASE.replace(
    tie_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm="all", norms="both",
    moe=MOE, layers=MOE_LAYERS,
)  # fmt: skip


def load(spec, tensors, width, dtype="float32"):
    sizes, params, mesh = setup(spec, width, dtype)
    arrays, report = load_params(DictSource(tensors), spec, sizes, params, mesh)
    assert list(arrays) == list(params)
    for path, array in arrays.items():
        assert (array.shape, array.dtype) == (params[path].shape, params[path].dtype), path
    return sizes, params, {path: np.asarray(array) for path, array in arrays.items()}, report


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_head_stands_in_its_slot_and_padding_is_zero(width):
    tensors = weights_of(FULL)
    sizes, _, arrays, _ = load(FULL, tensors, width)
    size, at = FULL.head_dim, "model.layers.0.self_attn."

    def head(name, number):
        return tensors[f"{at}{name}"][number * size : (number + 1) * size]

    qkv, bias = arrays["layers.0.attention.qkv.kernel"], arrays["layers.0.attention.qkv.bias"]
    out, q_norm = arrays["layers.0.attention.out.kernel"], arrays["layers.0.attention.q_norm.scale"]
    for slot, kv_head in enumerate(sizes.heads.kv_heads):
        for place, query in enumerate(sizes.heads.query_heads[slot]):
            if query < 0:
                assert not qkv[slot, place].any() and not out[:, slot, place].any() and not q_norm[slot, place].any()
                continue
            np.testing.assert_array_equal(qkv[slot, place], head("q_proj.weight", query))
            np.testing.assert_array_equal(bias[slot, place], head("q_proj.bias", query))
            np.testing.assert_array_equal(q_norm[slot, place], head("q_norm.weight", query))
            columns = tensors[f"{at}o_proj.weight"][:, query * size : (query + 1) * size]
            np.testing.assert_array_equal(out[:, slot, place], columns)
        for place, name in ((-2, "k"), (-1, "v")):
            expected = head(f"{name}_proj.weight", kv_head) if kv_head >= 0 else np.zeros((size, FULL.hidden_size))
            np.testing.assert_array_equal(qkv[slot, place], expected)
        if kv_head >= 0:
            np.testing.assert_array_equal(
                arrays["layers.0.attention.k_norm.scale"][slot], head("k_norm.weight", kv_head)
            )


@pytest.mark.parametrize("width", [1, 3, 8])
def test_mlp_experts_vocabulary_and_norms(width):
    tensors = weights_of(FULL)
    _, _, arrays, report = load(FULL, tensors, width)
    ffn, vocab, experts = FULL.intermediate_size, FULL.vocab_size, MOE.num_experts
    for index, name in enumerate(("gate", "up")):
        kernel, bias = (arrays[f"layers.0.mlp.gate_up.{kind}"][:, index] for kind in ("kernel", "bias"))
        np.testing.assert_array_equal(kernel[:ffn], tensors[f"model.layers.0.mlp.{name}_proj.weight"])
        np.testing.assert_array_equal(bias[:ffn], tensors[f"model.layers.0.mlp.{name}_proj.bias"])
        assert not kernel[ffn:].any() and not bias[ffn:].any()
        for expert in range(experts):
            np.testing.assert_array_equal(
                arrays["layers.1.mlp.gate_up"][expert, index],
                tensors[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"],
            )
    np.testing.assert_array_equal(
        arrays["layers.0.mlp.down.kernel"][:, :ffn], tensors["model.layers.0.mlp.down_proj.weight"]
    )
    np.testing.assert_array_equal(
        arrays["layers.1.mlp.down"][experts - 1],
        tensors[f"model.layers.1.mlp.experts.{experts - 1}.down_proj.weight"],
    )
    assert not arrays["layers.1.mlp.down"][experts:].any() and not arrays["layers.1.mlp.gate_up"][experts:].any()
    np.testing.assert_array_equal(arrays["layers.1.mlp.router"], tensors["model.layers.1.mlp.gate.weight"])
    np.testing.assert_array_equal(arrays["embedding.table"][:vocab], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(arrays["unembed.table"][:vocab], tensors["lm_head.weight"])
    np.testing.assert_array_equal(arrays["final_norm.scale"], tensors["model.norm.weight"])
    for path, name in {
        "attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
    }.items():  # fmt: skip
        np.testing.assert_array_equal(arrays[f"layers.1.{path}.scale"], tensors[f"model.layers.1.{name}.weight"])
    assert report.bytes_on_devices >= sum(tensor.nbytes for tensor in tensors.values())
    assert report.seconds > 0 and report.bytes_read >= sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("norms", "names"),
    [
        ("pre", {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}),
        ("post", {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}),
    ],
)
def test_the_same_norm_name_means_another_place_in_another_family(norms, names):
    spec = BASE.replace(norms=norms)
    tensors = weights_of(spec)
    _, _, arrays, _ = load(spec, tensors, 1)
    for path, name in names.items():
        np.testing.assert_array_equal(arrays[f"layers.0.{path}.scale"], tensors[f"model.layers.0.{name}.weight"])


def fused(tensors):
    """Phi-3's spelling."""
    made = dict(tensors)
    for layer in (0, 1):
        at = f"model.layers.{layer}."
        qkv = [made.pop(f"{at}self_attn.{name}_proj.weight") for name in "qkv"]
        made[f"{at}self_attn.qkv_proj.weight"] = np.concatenate(qkv)
        pair = [made.pop(f"{at}mlp.{name}_proj.weight") for name in ("gate", "up")]
        made[f"{at}mlp.gate_up_proj.weight"] = np.concatenate(pair)
    return made


def mixtral(tensors):
    new = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    made = {}
    for name, value in tensors.items():
        for old, short in new.items():
            if ".experts." in name:
                name = name.replace(old, short)
        made[name.replace("layers.1.mlp.", "layers.1.block_sparse_moe.")] = value
    return made


def stacked(tensors, *, joined):
    """GGUF's stacked experts, or transformers 5's, which join gate and up too."""
    made = {name: value for name, value in tensors.items() if ".experts." not in name}
    at = "model.layers.1.mlp.experts."
    stack = {
        name: np.stack([tensors[f"{at}{expert}.{name}_proj.weight"] for expert in range(MOE.num_experts)])
        for name in ("gate", "up", "down")
    }
    if joined:
        made[f"{at}gate_up_proj"] = np.concatenate([stack["gate"], stack["up"]], axis=1)
        made[f"{at}down_proj"] = stack["down"]
    else:
        made |= {f"{at}{name}_proj.weight": value for name, value in stack.items()}
    return made


MOE_SPEC = BASE.replace(moe=MOE, layers=MOE_LAYERS)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(
    ("spec", "respell"),
    [
        (BASE, fused),
        (MOE_SPEC, mixtral),
        (MOE_SPEC, lambda tensors: stacked(tensors, joined=True)),
        (MOE_SPEC, lambda tensors: stacked(tensors, joined=False)),
        (BASE, lambda t: {f"language_{name}": v for name, v in t.items()}),
        (BASE, lambda t: {name.replace("model.", "language_model.model.", 1): v for name, v in t.items()}),
        (BASE, lambda t: {name.replace("model.", "model.language_model.", 1): v for name, v in t.items()}),
    ],
    ids=["phi3", "mixtral", "fused experts", "stacked experts", "unknown prefix", "prefix", "inner prefix"],
)
def test_dialects_give_the_same_parameters(spec, respell, width, request):
    tensors = weights_of(spec)
    if "unknown" in request.node.name:
        with pytest.raises(WeightsError, match="lacks"):
            load(spec, respell(tensors), width)
        return
    expected, found = load(spec, tensors, width)[2], load(spec, respell(tensors), width)[2]
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_values_are_cast_to_the_dtype_of_the_parameter():
    tensors = weights_of(BASE)
    _, _, arrays, _ = load(BASE, tensors, 2, "bfloat16")
    expected = np.asarray(jax.numpy.asarray(tensors["model.norm.weight"], "bfloat16"))
    np.testing.assert_array_equal(arrays["final_norm.scale"], expected)


def test_a_device_reads_no_more_than_its_own_heads():
    spec = BASE.replace(num_heads=8, num_kv_heads=4, hidden_size=16)
    tensors = weights_of(spec)
    source = DictSource(tensors)
    sizes, params, _ = setup(spec, 4)
    parts = make_recipes(source, spec, sizes, params).parts["layers.0.attention.qkv.kernel"]
    whole = params["layers.0.attention.qkv.kernel"].shape
    block, count = assemble(source, parts, ((2, 3), *((0, size) for size in whole[1:])), np.dtype("float32"))
    assert count == block.nbytes
    read = {name.rsplit(".", 2)[1]: box[0] for name, box in source.reads}
    assert read == {"q_proj": (16, 24), "k_proj": (8, 12), "v_proj": (8, 12)}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), width=st.integers(1, 8))
def test_any_box_equals_that_box_of_the_whole(data, width):
    tensors = weights_of(FULL)
    source = DictSource(tensors)
    sizes, params, _ = setup(FULL, width)
    path = data.draw(st.sampled_from(sorted(params)))
    parts = make_recipes(source, FULL, sizes, params).parts[path]
    shape = params[path].shape
    full, _ = assemble(source, parts, tuple((0, size) for size in shape), np.dtype("float32"))
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    part, _ = assemble(source, parts, tuple(box), np.dtype("float32"))
    np.testing.assert_array_equal(part, full[tuple(slice(*ends) for ends in box)])


@pytest.mark.parametrize(("spec", "width"), [(FULL, 4), (FULL.replace(num_heads=6, num_kv_heads=1), 8)])
def test_layouts_go_there_and_back(spec, width):
    sizes, params, _ = setup(spec, width)
    _, narrow, _ = setup(spec, 1)
    with jax.disable_jit():
        kinds = ("qkv.kernel", "out.kernel", "q_norm.scale", "k_norm.scale", "mlp.gate_up.kernel")
        for path, param in params.items():
            if not path.startswith("layers.0.") or not path.endswith(kinds):
                continue
            layout = layout_of(path, param, spec, sizes)
            assert layout.canonical == narrow[path].shape, path
            values = np.arange(1, 1 + np.prod(layout.canonical)).reshape(layout.canonical)
            padded = layout.expand(jax.numpy.asarray(values))
            assert padded.shape == param.shape
            np.testing.assert_array_equal(layout.contract(padded), values)


def test_a_missing_tensor_is_named():
    tensors = weights_of(BASE)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(WeightsError, match=r"lacks.*layers\.1\.self_attn\.v_proj\.weight.*expected: \(12, 12\)"):
        load(BASE, tensors, 2)


def test_a_tensor_of_another_shape_is_named_before_anything_is_read():
    tensors = weights_of(BASE)
    tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((12, 14), np.float32)
    source = DictSource(tensors)
    sizes, params, mesh = setup(BASE, 1)
    with pytest.raises(WeightsError, match=r"down_proj\.weight; expected: \(12, 13\); found: \(12, 14\)"):
        load_params(source, BASE, sizes, params, mesh)
    assert not source.reads


def test_a_bias_that_the_configuration_lacks_is_refused():
    tensors = weights_of(BASE.replace(qkv_bias=True))
    with pytest.raises(WeightsError, match=r"no place for.*k_proj\.bias.*6 such tensors"):
        load(BASE, tensors, 1)


def test_harmless_tensors_are_ignored():
    tensors = weights_of(BASE) | {
        "lm_head.weight": np.zeros((37, 12), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "vision_tower.patch.weight": np.zeros(3, np.float32),
    }
    load(BASE, tensors, 1)
    with pytest.raises(WeightsError, match="lacks"):
        load(BASE.replace(tie_embeddings=False), weights_of(BASE), 1)


class CanonicalSource(DictSource):
    dialect = "canonical"

    def __init__(self, arrays):
        super().__init__({path: np.asarray(array) for path, array in arrays.items()})


def test_dummy_weights_are_the_same_model_at_every_width():
    sizes, params, mesh = setup(FULL, 1)
    narrow = dummy_params(FULL, sizes, params, mesh, seed=3)
    width = 8
    sizes, params, mesh = setup(FULL, width)
    wide = dummy_params(FULL, sizes, params, mesh, seed=3)
    loaded = load_params(CanonicalSource(narrow), FULL, sizes, params, mesh)[0]
    for path, array in wide.items():
        np.testing.assert_array_equal(loaded[path], array, err_msg=path)
        assert len(array.sharding.device_set) == width
    kernel = np.asarray(narrow["layers.0.attention.out.kernel"])
    assert kernel.std() == pytest.approx(36**-0.5, rel=0.2)
    sizes, params, mesh = setup(FULL, 1)
    table = {"embedding.table": params["embedding.table"]}
    other = dummy_params(FULL, sizes, table, mesh, seed=4)["embedding.table"]
    assert not np.array_equal(other, narrow["embedding.table"])
    assert not np.array_equal(narrow["layers.0.attention.qkv.kernel"], narrow["layers.1.attention.qkv.kernel"])
