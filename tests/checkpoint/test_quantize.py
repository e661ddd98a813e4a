"""Kernels quantized while they are loaded: the same ones at every width, from every kind of source."""

import math

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
from ryzanstein_jax.checkpoint.snapshot import SnapshotSource, read_manifest
from ryzanstein_jax.checkpoint.snapshot_writer import save_snapshot
from ryzanstein_jax.checkpoint.source import slices, whole
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.decoder import Decoder
from ryzanstein_jax.model.params import param_specs
from ryzanstein_jax.model.quantization import LINEAR, QUANTIZATIONS, TABLES, Quantization
from ryzanstein_jax.sharding import PaddedSizes, make_mesh

SPEC = BASE.replace(quantization=QUANTIZATIONS["int8"], tie_embeddings=False, moe=MOE, layers=MOE_LAYERS)
WEIGHTS = weights_of(SPEC)
ALL = (*LINEAR, *TABLES)
#: What is tried at several widths. A group of 8 pads the 13 inputs of the MLP's last product to whole groups; one of 64
#: is cut, as 150 inputs come in parts of 32 times an odd number.
SPECS = {
    "int8": SPEC,
    "int4, whole groups": SPEC.replace(quantization=Quantization("int4", ALL, TABLES, group=8)),
    "int4, cut groups": SPEC.replace(quantization=Quantization("int4", ALL, TABLES, group=64), intermediate_size=150),
    "int4, by channel": SPEC.replace(quantization=Quantization("int4", LINEAR)),
    "fp8": SPEC.replace(quantization=QUANTIZATIONS["fp8"]),
    "fp8, groups": SPEC.replace(quantization=Quantization("fp8", LINEAR, group=8)),
}


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


@pytest.mark.parametrize("kind", SPECS)
def test_the_same_at_every_width_and_in_a_snapshot(kind, tmp_path):
    spec = SPECS[kind]
    source = DictSource(weights_of(spec))
    wanted = load(source, spec)[0]
    for width in (2, 3, 8):
        same(load(source, spec, width)[0], wanted)
    _, params, arrays, sizes = load(source, spec, 4)
    snapshot = SnapshotSource(save_snapshot(tmp_path / "one", arrays, params, spec, sizes, config={}), verify=True)
    assert snapshot.info("layers.0.mlp.down.kernel").dtype == params["layers.0.mlp.down.kernel"].dtype
    for width in (1, 3):
        same(load(snapshot, spec, width)[0], wanted)


def test_a_snapshot_holds_two_int4_values_in_a_byte(tmp_path):
    spec, path = SPECS["int4, cut groups"], "layers.0.mlp.down.kernel"
    found, params, arrays, sizes = load(DictSource(weights_of(spec)), spec, 2)
    snapshot = SnapshotSource(save_snapshot(tmp_path / "one", arrays, params, spec, sizes, config={}))
    rows, length = found[path].shape
    assert read_manifest(snapshot.path)["tensors"][path]["shape"] == [rows, length // 2]
    for box in (((0, rows), (0, length)), ((1, 3), (0, 1)), ((0, 2), (3, 4)), ((2, 5), (5, 12)), ((0, 1), (4, 9))):
        read = snapshot.read(path, box)
        assert read.dtype == ml_dtypes.int4
        np.testing.assert_array_equal(read, found[path][slices(box)], err_msg=str(box))


@pytest.mark.parametrize("kind", ["int4, whole groups", "int4, cut groups", "fp8, groups", "fp8"])
def test_each_group_has_a_scale_of_its_own(kind):
    """Against NumPy, kernel by kernel: no value is further than half a step from what it was."""
    spec = SPECS[kind]
    weights, group = weights_of(spec), spec.quantization.group
    found = load(DictSource(weights), spec)[0]
    for path, name, size in (
        ("layers.0.mlp.down.kernel", "mlp.down_proj.weight", group),
        ("layers.0.attention.out.kernel", "self_attn.o_proj.weight", group and math.gcd(group, spec.head_dim)),
    ):
        floats = weights[f"model.layers.0.{name}"]
        kernel = found[path].astype(np.float32).reshape(floats.shape)
        scale = found[path + "_scale"].reshape(len(floats), -1)
        assert found[path].dtype == (ml_dtypes.int4 if "int4" in kind else ml_dtypes.float8_e4m3fn)
        size = size or floats.shape[1]
        assert scale.shape[1] == -(-floats.shape[1] // size)
        for start in range(0, floats.shape[1], size):
            part, held = floats[:, start : start + size], kernel[:, start : start + size]
            step = scale[:, start // size][:, None]
            if "int4" in kind:
                largest = np.abs(part).max(axis=1)
                np.testing.assert_allclose(np.abs(step[:, 0]), largest / 8, rtol=1e-6)
                assert (held.min(axis=1) == -8).all()
                # The largest value is met exactly; only one of the same size and the other sign is cut.
                assert (np.abs(held * step - part) <= np.abs(step) * 1.0001).all()
                assert np.mean(np.abs(held * step - part) <= np.abs(step) * 0.5001) > 0.9
            else:
                np.testing.assert_allclose(step[:, 0], np.abs(part).max(axis=1) / 448, rtol=1e-6)
                assert (np.abs(held * step - part) <= np.maximum(np.abs(part) / 16, step / 512) * 1.001).all()


@pytest.mark.parametrize("kind", ["int8", "int4, cut groups"])
def test_the_same_in_small_pieces(kind, monkeypatch):
    source = DictSource(weights_of(SPECS[kind]))
    wanted = load(source, SPECS[kind])[0]
    monkeypatch.setattr(quantize, "_VALUES_AT_ONCE", 20)
    same(load(source, SPECS[kind], width=2)[0], wanted)


def test_a_device_reads_its_groups_only():
    spec = SPECS["int4, cut groups"]
    source = DictSource(weights_of(spec))
    load(source, spec, 8)
    reads = [box[1] for name, box in source.reads if name == "model.layers.0.mlp.down_proj.weight"]
    assert reads and all(stop - start <= 64 for start, stop in reads)


def test_a_snapshot_of_floats_is_quantized_like_its_source(single, tmp_path):
    spec = SPEC.replace(quantization=None)
    _, params, arrays, sizes = load(DictSource(WEIGHTS), spec, width=2)
    source = SnapshotSource(save_snapshot(tmp_path / "floats", arrays, params, spec, sizes, config={}))
    same(load(source, width=2)[0], single)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_kept_copy_has_the_same_values(kind, tmp_path):
    file = make(tmp_path / "a.gguf")
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
    source, rounding = GgufSource(file), Rounding(kind, group=4 * (kind == "int4"))
    quantizing = QuantizingSource(source, dict.fromkeys(names, rounding))
    copy = converted(file, quantization=QUANTIZATIONS[kind])
    assert copy.pays(quantizing) and copy.write(quantizing)
    assert converted(file).open() is None, "floats have another copy"
    opened = converted(file, quantization=QUANTIZATIONS[kind]).open()
    assert opened is not None and set(opened.names()) == set(quantizing.names())
    held = ml_dtypes.float8_e4m3fn if kind == "fp8" else np.int8
    assert opened.info("model.embed_tokens.weight").dtype == held, "files have no int4"
    for name in quantizing.names():
        box = whole(quantizing.info(name).shape)
        assert opened.info(name).shape == quantizing.info(name).shape
        found, wanted = (one.read(name, box).astype(np.float32) for one in (opened, quantizing))
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    assert copy.path.stat().st_size < 0.7 * sum(4 * np.prod(source.info(name).shape) for name in source.names())


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


@pytest.mark.parametrize("kind", SPECS)
def test_dummy_weights_are_those_of_floats_rounded(kind):
    mesh, found = make_mesh(2), []
    for spec in (SPECS[kind], SPECS[kind].replace(quantization=None)):
        sizes = PaddedSizes.of(spec, 2)
        params = param_specs(Decoder(spec, sizes, jnp.dtype("float32")))
        arrays = dummy_params(spec, sizes, params, mesh)
        contracted = {
            path: np.asarray(layout_of(path, params[path], spec, sizes).contract(jnp.asarray(np.asarray(array))))
            for path, array in arrays.items()
        }
        found.append(contracted)
    for path, floats in found[1].items():
        values = found[0][path].astype(np.float32)
        if path + "_scale" in found[0]:
            scale = float(found[0][path + "_scale"].flat[0])
            assert (found[0][path + "_scale"] == np.float32(scale)).all()
            room = scale / 2 if found[0][path].dtype != ml_dtypes.float8_e4m3fn else np.abs(floats) / 16 + scale / 500
            assert (np.abs(values * scale - floats) <= room * 1.001 + 1e-6).all(), path
        else:
            np.testing.assert_array_equal(values, floats, err_msg=path)
