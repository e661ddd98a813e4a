"""Ready-made quantized checkpoints, written here value by value from the description of each format."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_quantize import load
from tiny import BASE, MOE_LAYERS, DictSource, weights_of

from ryzanstein_jax.checkpoint.packed import PackedSource
from ryzanstein_jax.checkpoint.safetensors import SafetensorsSource
from ryzanstein_jax.checkpoint.source import whole
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.quantization import LINEAR, TABLES, Quantization
from ryzanstein_jax.model.spec import MoeSpec

FP8 = ml_dtypes.float8_e4m3fn
#: Sizes that eight values to a word and groups of 16 divide, but no number of devices does: 48 inputs are 3 groups.
SPEC = BASE.replace(hidden_size=48, intermediate_size=48, head_dim=16, num_heads=6, moe=MoeSpec(3, 2, 16, True))
SPEC = SPEC.replace(layers=MOE_LAYERS)
GROUP = 16
#: Where each of eight columns stands in a word of AWQ's.
AWQ = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}


def word(values):
    """Eight 4-bit values, the first in the lowest bits, as a signed word."""
    total = sum(int(value) << (4 * place) for place, value in enumerate(values))
    return total - (1 << 32) if total >= 1 << 31 else total


def packed(table, axis, places=None):
    """A table of 0..15, eight values of one axis to a word, filled up with zeros."""
    table = np.moveaxis(table, axis, -1)
    rows = []
    for row in table.reshape(-1, table.shape[-1]):
        row = [*row, *[0] * (-len(row) % 8)]
        words = []
        for start in range(0, len(row), 8):
            eight = [0] * 8
            for column in range(8):
                eight[places[column] if places else column] = row[start + column]
            words.append(word(eight))
        rows.append(words)
    found = np.array(rows, np.int32).reshape(*table.shape[:-1], -1)
    return np.ascontiguousarray(np.moveaxis(found, -1, axis))


def kernels(group=GROUP, symmetric=False):
    """Module -> values 0..15 [O, I], float16 scales and zero points 0..15 [O, G]; all else as floats."""
    rng = np.random.default_rng(7)
    modules, rest = {}, {}
    for name, floats in weights_of(SPEC).items():
        if "_proj." not in name:
            rest[name] = floats
            continue
        outputs, inputs = floats.shape
        groups = inputs // group if group else 1
        scale = rng.uniform(0.01, 0.1, (outputs, groups)).astype(np.float16)
        zero = np.full((outputs, groups), 8) if symmetric else rng.integers(1, 16, (outputs, groups))
        modules[name.removesuffix(".weight")] = rng.integers(0, 16, floats.shape), scale, zero
    return modules, rest


def values_of(modules):
    """What they stand for: name -> float64 [O, I]."""
    found = {}
    for base, (q, scale, zero) in modules.items():
        size = q.shape[1] // scale.shape[1]
        wide = [np.repeat(one.astype(np.float64), size, axis=1) for one in (scale, zero)]
        found[base + ".weight"] = (q - wide[1]) * wide[0]
    return found


def pack_quantized(modules, symmetric):
    tensors = {}
    for base, (q, scale, zero) in modules.items():
        tensors[base + ".weight_packed"] = packed(q, 1)
        tensors[base + ".weight_scale"] = scale.astype(ml_dtypes.bfloat16)
        tensors[base + ".weight_shape"] = np.array(q.shape, np.int64)
        if not symmetric:
            tensors[base + ".weight_zero_point"] = packed(zero, 0)
    return tensors


def awq(modules, symmetric):
    tensors = {}
    for base, (q, scale, zero) in modules.items():
        tensors[base + ".qweight"] = packed(q.T, 1, AWQ)
        tensors[base + ".qzeros"] = packed(zero.T, 1, AWQ)
        tensors[base + ".scales"] = np.ascontiguousarray(scale.T)
    return tensors


def gptq(modules, symmetric, less=1):
    tensors = {}
    for base, (q, scale, zero) in modules.items():
        tensors[base + ".qweight"] = packed(q.T, 0)
        tensors[base + ".qzeros"] = packed(zero.T - less, 1)
        tensors[base + ".scales"] = np.ascontiguousarray(scale.T)
        tensors[base + ".g_idx"] = (np.arange(q.shape[1]) // (q.shape[1] // scale.shape[1])).astype(np.int32)
    return tensors


WRITERS = {
    "pack-quantized": pack_quantized, "awq": awq, "gptq": gptq,
    "gptq_v2": lambda modules, symmetric: gptq(modules, symmetric, less=0),
}  # fmt: skip
CASES = [
    ("pack-quantized", True, GROUP), ("pack-quantized", False, GROUP), ("pack-quantized", False, 0),
    ("awq", False, GROUP), ("gptq", True, GROUP), ("gptq", False, GROUP), ("gptq", True, 0), ("gptq_v2", False, GROUP),
]  # fmt: skip


def scaled(found, path, inputs):
    """float64 values of a loaded kernel, [..., inputs]."""
    kernel = found[path].astype(np.float64)
    scale = found[path + "_scale"].astype(np.float64)
    zero = found.get(path + "_zero", np.zeros(scale.shape)).astype(np.float64)
    if scale.ndim < kernel.ndim:
        scale, zero = (one.reshape(*one.shape, *[1] * (kernel.ndim - one.ndim)) for one in (scale, zero))
    else:
        size = -(-kernel.shape[-1] // scale.shape[-1])
        scale, zero = (np.repeat(one, size, axis=-1)[..., : kernel.shape[-1]] for one in (scale, zero))
    values = (kernel - zero) * scale
    return values.reshape(*values.shape[: values.ndim - inputs], -1)


def check(found, wanted):
    """The loaded parameters of both layers against the values of each module."""
    at = "model.layers.0."
    out = scaled(found, "layers.0.attention.out.kernel", 3)
    np.testing.assert_allclose(out, wanted[at + "self_attn.o_proj.weight"], rtol=1e-6)
    np.testing.assert_allclose(
        scaled(found, "layers.0.mlp.down.kernel", 1), wanted[at + "mlp.down_proj.weight"], rtol=1e-6
    )
    gate_up = scaled(found, "layers.0.mlp.gate_up.kernel", 1)
    for index, name in enumerate(("gate", "up")):
        np.testing.assert_allclose(gate_up[:, index], wanted[f"{at}mlp.{name}_proj.weight"], rtol=1e-6)
    qkv = scaled(found, "layers.0.attention.qkv.kernel", 1)
    for heads, name in ((qkv[:, :-2], "q"), (qkv[:, -2:-1], "k"), (qkv[:, -1:], "v")):
        np.testing.assert_allclose(heads.reshape(-1, 48), wanted[f"{at}self_attn.{name}_proj.weight"], rtol=1e-6)
    down = scaled(found, "layers.1.mlp.down", 1)
    for expert in range(3):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        np.testing.assert_allclose(down[expert], wanted[name], rtol=1e-6)


@pytest.mark.parametrize(("layout", "symmetric", "group"), CASES)
def test_a_checkpoint_is_read_as_what_it_stands_for(layout, symmetric, group, tmp_path):
    modules, rest = kernels(group, symmetric)
    if layout == "pack-quantized":  # its scales are rounded to bfloat16 below
        modules = {b: (q, s.astype(ml_dtypes.bfloat16), z) for b, (q, s, z) in modules.items()}
    save_file(WRITERS[layout](modules, symmetric) | rest, tmp_path / "model.safetensors")
    quantization = Quantization("int4", LINEAR, group=group, zeros=not symmetric, layout=layout)
    spec, wanted = SPEC.replace(quantization=quantization), values_of(modules)
    found = load(SafetensorsSource(tmp_path), spec)[0]
    assert found["layers.0.mlp.down.kernel"].dtype == ml_dtypes.int4
    assert ("layers.0.mlp.down.kernel_zero" in found) == (not symmetric)
    check(found, wanted)
    for width in (2, 5):  # the padding is checked by `load`: it is what the canonical values expand to
        for path, values in load(SafetensorsSource(tmp_path), spec, width)[0].items():
            np.testing.assert_array_equal(values, found[path], err_msg=path)


@pytest.mark.parametrize(
    ("shape", "block"), [((), 0), ((1,), 0), ("outputs", 0), ("column", 0), ("blocks", 16)], ids=str
)
def test_float8(shape, block, tmp_path):
    rng = np.random.default_rng(3)
    tensors, wanted = {}, {}
    for name, floats in weights_of(SPEC).items():
        if "_proj." not in name:
            tensors[name] = floats
            continue
        outputs, inputs = floats.shape
        q = rng.standard_normal(floats.shape).astype(FP8)
        size = {"outputs": (outputs,), "column": (outputs, 1), "blocks": (-(-outputs // 16), -(-inputs // 16))}
        scale = np.asarray(rng.uniform(0.5, 2, size.get(shape, shape)), np.float32)
        tensors[name] = q
        tensors[name + ("_scale_inv" if block else "_scale")] = scale
        tensors[name.removesuffix("weight") + "input_scale"] = np.asarray(3, np.float32)
        wide = scale.reshape(-1, 1) if not block else np.kron(scale, np.ones((16, 16)))[:outputs, :inputs]
        wanted[name] = q.astype(np.float64) * wide
    save_file(tensors, tmp_path / "model.safetensors")
    spec = SPEC.replace(quantization=Quantization("fp8", LINEAR, group=block, layout="fp8", block=block))
    found = load(SafetensorsSource(tmp_path), spec)[0]
    assert found["layers.0.mlp.down.kernel"].dtype == FP8
    check(found, wanted)
    for width in (2, 5):
        for path, values in load(SafetensorsSource(tmp_path), spec, width)[0].items():
            np.testing.assert_array_equal(values, found[path], err_msg=path)


class Watched(DictSource):
    """Tensors in memory; what is read is counted in bytes."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.taken = 0

    def read(self, name, box):
        found = super().read(name, box)
        self.taken += found.nbytes if name.endswith(("qweight", "weight_packed")) else 0
        return found


@pytest.mark.parametrize("layout", ["pack-quantized", "awq", "gptq"])
def test_only_what_a_slice_needs_is_read(layout):
    modules, rest = kernels()
    source = Watched(WRITERS[layout](modules, False) | rest)
    packed_source = PackedSource(source, Quantization("int4", LINEAR, group=GROUP, zeros=True, layout=layout))
    name = "model.layers.0.mlp.down_proj.weight"
    q = modules[name.removesuffix(".weight")][0]
    for box in (((3, 9), (5, 30)), ((0, 48), (0, 8)), ((47, 48), (0, 48))):
        source.taken = 0
        got = packed_source.read(name, box)
        rows, columns = (slice(*one) for one in box)
        np.testing.assert_array_equal(got.astype(int) + 8, q[rows, columns])
        assert source.taken <= (got.shape[0] + 14) * (got.shape[1] + 14) / 2
    assert packed_source.info(name).shape == (48, 48)
    assert name in set(packed_source.names()) and name.replace("weight", "qweight") not in set(packed_source.names())


def test_linears_of_a_checkpoint_and_tables_quantized_here():
    modules, rest = kernels()
    ready = Quantization("int4", (*LINEAR, *TABLES), TABLES, group=GROUP, zeros=True, layout="awq")
    found = load(DictSource(awq(modules, False) | rest), SPEC.replace(quantization=ready))[0]
    assert found["embedding.table"].dtype == np.int8
    check(found, values_of(modules))


BASE_NAME = "model.layers.0.mlp.down_proj."


def changed(**changes):
    def change(tensors):
        for suffix, value in changes.items():
            tensors[BASE_NAME + suffix] = value

    return change  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "change", "match"),
    [
        ("awq", lambda t: t.pop(BASE_NAME + "scales"), "lacks a tensor of a quantized module"),
        ("awq", lambda t: t.pop(BASE_NAME + "qweight"), "lacks a tensor that"),
        ("awq", changed(scales=np.ones((2, 48), np.float16)), "not what its layout says"),
        ("awq", changed(qzeros=np.ones((3, 5), np.int32)), "not what its layout says"),
        ("awq", changed(qweight=np.ones((48, 6), np.int64)), "not what its layout says"),
        ("awq", changed(qweight=np.ones((48,), np.int32)), "not two dimensions"),
        ("awq", changed(qweight=np.ones((40, 6), np.int32)), "shape is not what the model"),
        ("awq", changed(bias=np.ones(48, np.float16)), "no place for"),
        ("gptq", changed(g_idx=np.arange(48, dtype=np.int32)[::-1] // 16), "not in the order of the inputs"),
        ("gptq", changed(g_idx=np.zeros(47, np.int32)), "not what its layout says"),
        ("gptq", changed(qweight=np.ones((6, 45), np.int32)), "must come in eights"),
        ("gptq symmetric", changed(qzeros=np.zeros((3, 6), np.int32)), "zero points other than 8"),
        ("pack-quantized", changed(weight_shape=np.array([48, 47], np.int64)), "shape is not what the model"),
        ("pack-quantized", changed(weight_shape=np.array([48, 24], np.int64)), "weight_shape is not"),
        ("pack-quantized", changed(weight_zero_point=np.ones((48, 3), np.int8)), "not what its layout says"),
        ("pack-quantized", changed(weight_g_idx=np.zeros(48, np.int32)), "no place for"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_its_layout_is_refused(layout, change, match):
    layout, _, symmetric = layout.partition(" ")
    modules, rest = kernels(symmetric=bool(symmetric))
    tensors = WRITERS[layout](modules, bool(symmetric)) | rest
    change(tensors)
    spec = SPEC.replace(quantization=Quantization("int4", LINEAR, group=GROUP, zeros=not symmetric, layout=layout))
    with pytest.raises(WeightsError, match=match):
        load(DictSource(tensors), spec)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, n: t.pop(n + "_scale"), "lacks a tensor of a quantized module"),
        (lambda t, n: t.update({n + "_scale": np.ones((7,), np.float32)}), "not what its layout says"),
        (lambda t, n: t.update({n + "_scale": np.ones((), np.int8)}), "not what its layout says"),
        (lambda t, n: t.update({n: t[n].astype(np.float32)}), "no place for|another precision"),
    ],
)
def test_float8_that_is_not_its_layout_is_refused(change, match):
    tensors = {}
    for name, floats in weights_of(SPEC).items():
        tensors[name] = floats.astype(FP8) if "_proj." in name else floats
        if "_proj." in name:
            tensors[name + "_scale"] = np.ones((), np.float32)
    change(tensors, BASE_NAME + "weight")
    with pytest.raises(WeightsError, match=match):
        load(DictSource(tensors), SPEC.replace(quantization=Quantization("fp8", LINEAR, layout="fp8")))


def test_quantized_tensors_without_a_configuration_are_refused():
    tensors = weights_of(SPEC)
    tensors[BASE_NAME + "weight"] = tensors[BASE_NAME + "weight"].astype(FP8)
    with pytest.raises(WeightsError, match="float8_e4m3fn where the model computes in floats"):
        load(DictSource(tensors), SPEC)


def test_whole_tensors_read_as_their_parts():
    modules, rest = kernels()
    source = PackedSource(
        DictSource(gptq(modules, False) | rest), Quantization("int4", LINEAR, group=GROUP, zeros=True, layout="gptq")
    )
    for name in source.names():
        info = source.info(name)
        read = source.read(name, whole(info.shape))
        assert read.shape == info.shape and read.dtype == info.dtype, name
        source.release(name)
