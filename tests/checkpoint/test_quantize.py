"""Kernels that become int8 while they are loaded: the same ones at every width, from every kind of source."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_converted import converted, make
from tiny import BASE, MOE, MOE_LAYERS, DictSource, weights_of

from ryzanstein_jax.checkpoint import quantize
from ryzanstein_jax.checkpoint.assemble import load_params
from ryzanstein_jax.checkpoint.dummy import dummy_params
from ryzanstein_jax.checkpoint.gguf import GgufSource
from ryzanstein_jax.checkpoint.layout import layout_of
from ryzanstein_jax.checkpoint.quantize import QuantizingSource, Rounding
from ryzanstein_jax.checkpoint.safetensors import SafetensorsSource
from ryzanstein_jax.checkpoint.snapshot import SnapshotSource
from ryzanstein_jax.checkpoint.snapshot_writer import save_snapshot
from ryzanstein_jax.checkpoint.source import whole
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.decoder import Decoder
from ryzanstein_jax.model.params import param_specs
from ryzanstein_jax.model.quantization import LINEAR, QUANTIZATIONS, Quantization
from ryzanstein_jax.sharding import PaddedSizes, make_mesh

SPEC = BASE.replace(quantization=QUANTIZATIONS["int8"], tie_embeddings=False, moe=MOE, layers=MOE_LAYERS)
WEIGHTS = weights_of(SPEC)


def load(source, spec=SPEC, width=1, dtype="float32"):
    """Path -> canonical values, and the parameters."""
    sizes = PaddedSizes.of(spec, width)
    params = param_specs(Decoder(spec, sizes, jnp.dtype(dtype)))
    arrays, _ = load_params(source, spec, sizes, params, make_mesh(width))
    found = {}
    for path, array in arrays.items():
        layout = layout_of(path, params[path], spec, sizes)
        found[path] = np.asarray(layout.contract(jnp.asarray(np.asarray(array))))
        np.testing.assert_array_equal(layout.expand(jnp.asarray(found[path])), np.asarray(array), err_msg=path)
    return found, params, arrays, sizes


def same(found, expected):
    assert found.keys() == expected.keys()
    for path in expected:
        assert found[path].dtype == expected[path].dtype, path
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.fixture(scope="module")
def single():
    return load(DictSource(WEIGHTS))[0]


def test_each_output_has_the_scale_of_its_largest_input(single):
    floats = load(DictSource(WEIGHTS), SPEC.replace(quantization=None))[0]
    kernels = [path for path in single if path + "_scale" in single]
    assert len(kernels) == 2 + 2 * 4
    assert floats.keys() == {path for path in single if not path.endswith("_scale")}
    for path in floats:
        if path not in kernels:
            np.testing.assert_array_equal(single[path], floats[path])
            continue
        scale = single[path + "_scale"]
        inputs = tuple(range(scale.ndim, floats[path].ndim))
        np.testing.assert_allclose(scale, np.abs(floats[path]).max(axis=inputs) / 127, rtol=1e-6)
        wide = scale.reshape(*scale.shape, *[1] * len(inputs))
        assert (np.abs(single[path] * wide - floats[path]) <= wide * 0.5001).all()
        assert (np.abs(single[path]).max(axis=inputs) == 127).all()


@pytest.mark.parametrize("width", [2, 3, 8])
def test_the_same_at_every_width(single, width):
    same(load(DictSource(WEIGHTS), width=width)[0], single)


def test_the_same_in_small_pieces(single, monkeypatch):
    monkeypatch.setattr(quantize, "_VALUES_AT_ONCE", 20)
    same(load(DictSource(WEIGHTS), width=2)[0], single)


def test_a_snapshot_holds_int8_and_restores_onto_any_width(single, tmp_path):
    _, params, arrays, sizes = load(DictSource(WEIGHTS), width=4)
    folder = save_snapshot(tmp_path / "int8", arrays, params, SPEC, sizes, config={})
    source = SnapshotSource(folder, verify=True)
    assert source.info("layers.0.mlp.down.kernel").dtype == np.int8
    for width in (1, 2):
        same(load(source, width=width)[0], single)


def test_a_snapshot_of_floats_is_quantized_like_its_source(single, tmp_path):
    spec = SPEC.replace(quantization=None)
    _, params, arrays, sizes = load(DictSource(WEIGHTS), spec, width=2)
    source = SnapshotSource(save_snapshot(tmp_path / "floats", arrays, params, spec, sizes, config={}))
    same(load(source, width=2)[0], single)


def test_a_kept_copy_has_the_same_values(tmp_path):
    file = make(tmp_path / "a.gguf")
    source, int8 = GgufSource(file), QUANTIZATIONS["int8"]
    quantizing = QuantizingSource(source, {
            name: Rounding("int8") for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
        })
    copy = converted(file, quantization=int8)
    assert copy.pays(quantizing) and copy.write(quantizing)
    assert converted(file).open() is None, "floats have another copy"
    opened = converted(file, quantization=int8).open()
    assert opened is not None and set(opened.names()) == set(quantizing.names())
    assert opened.info("model.embed_tokens.weight").dtype == np.int8
    for name in quantizing.names():
        box = whole(quantizing.info(name).shape)
        assert opened.info(name).shape == quantizing.info(name).shape
        np.testing.assert_array_equal(opened.read(name, box), quantizing.read(name, box), err_msg=name)
    assert copy.path.stat().st_size < 0.5 * sum(4 * np.prod(source.info(name).shape) for name in source.names())


LINEARS = Quantization("int8", LINEAR)
READY = BASE.replace(quantization=LINEARS)


def ready_checkpoint(scale_dtype=np.float32):
    """compressed-tensors W8A8: `weight` int8 and `weight_scale` [outputs, 1] of each linear layer."""
    rng = np.random.default_rng(5)
    tensors = {}
    for name, values in weights_of(READY).items():
        if "_proj." in name:
            tensors[name] = rng.integers(-127, 128, values.shape, dtype=np.int8)
            tensors[name + "_scale"] = rng.uniform(0.01, 0.1, (len(values), 1)).astype(scale_dtype)
        else:
            tensors[name] = values
    return tensors


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("width", [1, 2])
def test_a_ready_made_checkpoint_is_taken_as_it_is(tmp_path, width, scale_dtype):
    tensors = ready_checkpoint(scale_dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    found = load(SafetensorsSource(tmp_path), READY, width)[0]
    at = "model.layers.1."
    np.testing.assert_array_equal(found["layers.1.mlp.down.kernel"], tensors[at + "mlp.down_proj.weight"])
    np.testing.assert_array_equal(
        found["layers.1.mlp.down.kernel_scale"], tensors[at + "mlp.down_proj.weight_scale"][:, 0].astype(np.float32)
    )
    for index, name in enumerate(("gate", "up")):
        scale = tensors[f"{at}mlp.{name}_proj.weight_scale"][:, 0].astype(np.float32)
        np.testing.assert_array_equal(found["layers.1.mlp.gate_up.kernel_scale"][:, index], scale)
    out = tensors[at + "self_attn.o_proj.weight_scale"][:, 0].astype(np.float32)
    np.testing.assert_array_equal(found["layers.1.attention.out.kernel_scale"], out)
    assert found["embedding.table"].dtype == np.float32


def test_ready_linears_and_an_embedding_quantized_here():
    spec = READY.replace(quantization=QUANTIZATIONS["int8"])
    tensors = ready_checkpoint()
    found = load(DictSource(tensors), spec, 2)[0]
    assert found["embedding.table"].dtype == np.int8
    largest = np.abs(tensors["model.embed_tokens.weight"]).max(axis=1)
    np.testing.assert_allclose(found["embedding.table_scale"], largest / 127, rtol=1e-6)


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "spec", "match"),
    [
        (lambda t: t.pop(NAME + "_scale"), READY, f"lacks a tensor that the scales of {NAME} needs"),
        (lambda t: t.update({NAME + "_scale": np.ones((3, 1), np.float32)}), READY, "shape is not what"),
        (lambda t: t.update({NAME + "_scale": np.ones((12, 2), np.float32)}), READY, "shape is not what"),
        (lambda t: t.update({NAME + "_zero_point": np.ones((12, 1), np.int8)}), READY, "no place for"),
        (lambda t: t.update({NAME: t[NAME].astype(np.float32)}), READY, "no place for"),
        (lambda t: None, READY.replace(quantization=None), "int8 where the model computes in floats"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(change, spec, match):
    tensors = ready_checkpoint()
    change(tensors)
    with pytest.raises(WeightsError, match=match):
        load(DictSource(tensors), spec)


def test_dummy_weights_are_those_of_floats_rounded():
    sizes, mesh = PaddedSizes.of(SPEC, 2), make_mesh(2)
    arrays = [
        dummy_params(spec, sizes, param_specs(Decoder(spec, sizes, jnp.dtype("float32"))), mesh)
        for spec in (SPEC, SPEC.replace(quantization=None))
    ]
    for path, floats in arrays[1].items():
        values = np.asarray(arrays[0][path], np.float32)
        if path + "_scale" in arrays[0]:
            scale = np.asarray(arrays[0][path + "_scale"])
            values = values * scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
            assert np.abs(values - np.asarray(floats)).max() <= 0.5001 * scale.max(), path
        else:
            np.testing.assert_array_equal(values, np.asarray(floats), err_msg=path)
