"""Layers against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ryzanstein_jax.model.activations import activation
from ryzanstein_jax.model.layers import (
    AllHeadsRMSNorm,
    ColumnParallelLinear,
    Mlp,
    MoeMlp,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    apply_rope,
    rope_tables,
)
from ryzanstein_jax.model.params import param_specs
from ryzanstein_jax.model.spec import MoeSpec, RopeSpec
from ryzanstein_jax.sharding import make_mesh

F32 = jnp.dtype("float32")


def filled(module, seed=0):
    """The module with random values, and those values by path."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(module)
    flat, values = [], {}
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value().shape
        values[".".join(map(str, path))] = value = rng.standard_normal(shape).astype(np.float32)
        flat.append((path, variable.replace(jnp.asarray(value))))
    return nnx.merge(graph, nnx.from_flat_state(flat)), values


def inputs(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def close(got, wanted, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("bias", [False, True])
def test_column_parallel_linear(bias):
    layer, values = filled(ColumnParallelLinear(6, (2, 3, 4), ("a", "b", "c"), dtype=F32, bias=bias))
    x = inputs(5, 6)
    close(layer(x), np.einsum("td,abcd->tabc", x, values["kernel"]) + values.get("bias", 0))
    assert param_specs(layer)["kernel"].axes == ("a", "b", "c", "embed")


@pytest.mark.parametrize("bias", [False, True])
def test_row_parallel_linear(bias):
    layer, values = filled(RowParallelLinear((2, 3, 4), 6, ("a", "b", "c"), dtype=F32, bias=bias))
    x = inputs(5, 2, 3, 4)
    close(layer(x), np.einsum("tabc,dabc->td", x, values["kernel"]) + values.get("bias", 0))
    assert param_specs(layer)["kernel"].axes == ("row_embed", "row_a", "b", "c")


def test_embedding_and_its_logits():
    layer, values = filled(VocabParallelEmbedding(11, 6, dtype=F32))
    close(layer(jnp.array([3, 10, 0])), values["table"][[3, 10, 0]])
    x = inputs(4, 6)
    logits = layer.logits(x)
    close(logits, x @ values["table"].T)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("tokens", [[15], [0, 7, 8, 15], [-3, 99]])
def test_embedding_over_devices(width, tokens):
    """Each token's row is on one device only; ids out of the table take its nearest row, as on one device."""
    layer, values = filled(VocabParallelEmbedding(16, 6, dtype=F32))
    with jax.set_mesh(make_mesh(width)):
        found = jax.jit(layer)(jnp.asarray(tokens))
    assert np.array_equal(found, values["table"][np.clip(tokens, 0, 15)])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    layer, values = filled(RMSNorm(6, eps=1e-3, offset=offset, dtype=F32))
    x = inputs(5, 6) * 10
    close(layer(x), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (values["scale"] + offset))
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rms_norm_counts_in_float32():
    layer, _ = filled(RMSNorm(4, eps=1e-6, offset=0.0, dtype=F32))
    huge = jnp.full((1, 4), 1e4, jnp.float16)  # whose square float16 cannot hold
    assert np.isfinite(np.asarray(layer(huge))).all()


def test_all_heads_norm_leaves_padding_and_copies_out_of_the_mean():
    counted = ((True, True), (True, False), (False, False))
    layer, values = filled(AllHeadsRMSNorm((3, 2, 4), ("s", "q", "h"), counted, 12, eps=1e-3, dtype=F32))
    x = inputs(5, 3, 2, 4)
    real = x[:, np.array(counted)].reshape(5, 12)
    root = np.sqrt((real**2).mean(-1) + 1e-3)[:, None, None, None]
    close(layer(x), x / root * values["scale"])


def test_rope_turns_pairs_as_complex_numbers():
    rope = RopeSpec((1.0, 0.25, 0.01), scale=1.5)
    positions = np.array([0, 1, 7, 2000])
    x = inputs(4, 2, 3, 8)
    cos, sin = rope_tables(rope, jnp.asarray(positions))
    got = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    turned = (x[..., :3] + 1j * x[..., 3:6]) * 1.5
    turned *= np.exp(1j * positions[:, None] * np.array(rope.inv_freq))[:, None, None]
    close(got[..., :3], turned.real, atol=1e-3)
    close(got[..., 3:6], turned.imag, atol=1e-3)
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])


def test_rope_depends_on_the_distance_only():
    rope = RopeSpec((1.0, 0.1))
    q, k = inputs(1, 1, 4), inputs(1, 1, 4, seed=2)

    def score(a, b):
        at = [rope_tables(rope, jnp.array([position])) for position in (a, b)]
        turned = [np.asarray(apply_rope(jnp.asarray(x), *tables)) for x, tables in zip((q, k), at, strict=True)]
        return (turned[0] * turned[1]).sum()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)


@pytest.mark.parametrize(("name", "value"), [("silu", 0.731059), ("gelu", 0.841345), ("gelu_tanh", 0.841192)])
def test_activations(name, value):
    assert float(activation(name)(jnp.float32(1))) == pytest.approx(value, abs=1e-6)


def test_mlp():
    layer, values = filled(Mlp(6, 10, "silu", dtype=F32, bias=True))
    x = inputs(5, 6)
    gate, up = (x @ values["gate_up.kernel"][:, i].T + values["gate_up.bias"][:, i] for i in (0, 1))
    close(layer(x), (silu(gate) * up) @ values["down.kernel"].T + values["down.bias"], atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_mixture_of_experts_is_the_sum_over_the_chosen(normalize):
    spec = MoeSpec(num_experts=5, top_k=2, intermediate_size=7, normalize_top_k=normalize)
    layer, values = filled(MoeMlp(6, spec, 8, "silu", dtype=F32))  # three experts are padding
    x = inputs(9, 6)
    wanted = np.zeros_like(x)
    for token, row in enumerate(x):
        scores = np.exp(row @ values["router"].T)
        scores /= scores.sum()
        chosen = np.argsort(-scores)[:2]
        for expert in chosen:
            weight = scores[expert] / (scores[chosen].sum() if normalize else 1)
            gate, up = values["gate_up"][expert] @ row
            wanted[token] += weight * (values["down"][expert] @ (silu(gate) * up))
    close(layer(x), wanted, atol=1e-4)
    assert not np.asarray(layer.routing(x))[:, 5:].any()
