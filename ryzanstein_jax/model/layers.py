"""Parallel layers. Each parameter states its shape, dtype and logical axes once, here.

A module is built abstract: its `nnx.Param`s hold `ShapeDtypeStruct`s with an `axes` note, and
initialization, sharding and loading all read them. Kernels are stored [output..., input...], as
checkpoints store them, so that a memory-mapped slice needs no transpose; XLA's CPU matrix-vector
product is also faster that way round. What a quantized kernel is made of is in `kernels`.

Array names end in their dims: T tokens, D embed, K KV slots, Q query heads per slot, H head_dim,
F ffn, V vocab, E experts, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from ryzanstein_jax.model.activations import activation, gated
from ryzanstein_jax.model.int8 import with_two_rows
from ryzanstein_jax.model.kernels import experts_product, kernel_params, param, quantized_product
from ryzanstein_jax.model.quantization import Scheme
from ryzanstein_jax.model.spec import MoeSpec, RopeSpec
from ryzanstein_jax.native import calls

#: Rows up to which XLA's CPU product is up to a third faster as (W x^T)^T; from more on, both ways are alike.
_FEW_ROWS = 64


def product(
    x_TI: jax.Array, kernel_OI: jax.Array, dtype: Any = None, *, sharded: str | None = None, gate: str | None = None
) -> jax.Array:
    """x W^T. Both are matrices: of a kernel with more dimensions XLA would make a transposed copy each time.

    Args:
        x_TI, kernel_OI: of one dtype.
        dtype: of the result; None is that of the operands.
        sharded: "outputs" or "inputs", which dimension of the kernel lies sharded over the mesh. Inputs of `x_TI` lie
            as those of the kernel, and the products of the devices are added up.
        gate: an activation: outputs lie in pairs, and what comes back is `gated`.
    """
    dtype = x_TI.dtype if dtype is None else dtype
    found = calls.sharded_product(x_TI, kernel_OI, dtype, sharded, gate)
    if found is not None:
        return found
    if gate:
        return gated(product(x_TI, kernel_OI, dtype, sharded=sharded), gate)

    def plain(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x_TI, kernel_OI, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def kernel_first(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
        # Without the barrier XLA would put the transposed product back into the first form.
        return jax.lax.optimization_barrier(plain(kernel_OI, x_TI)).T

    if x_TI.dtype == jnp.bfloat16:
        return with_two_rows(plain, x_TI, kernel_OI)
    if x_TI.dtype != jnp.float32 or not 1 < x_TI.shape[0] <= _FEW_ROWS:
        return plain(x_TI, kernel_OI)
    return jax.lax.platform_dependent(x_TI, kernel_OI, cpu=kernel_first, default=plain)


class ColumnParallelLinear(nnx.Module):
    """y = x W^T + b, sharded over an output dimension: no communication.

    The output may have several dimensions; `axes` names them. The first of them is the sharded one: then
    the kernel is a matrix in memory on each device, and XLA multiplies it as it lies.
    """

    def __init__(
        self,
        in_features: int,
        out_shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        dtype: jnp.dtype,
        bias: bool = False,
        scheme: Scheme | None = None,
    ):
        shape, kernel_axes = (*out_shape, in_features), (*axes, "embed")
        self.kernel, self.kernel_scale, self.kernel_zero = kernel_params(shape, kernel_axes, 1, dtype, scheme)
        self.scheme = scheme
        self.bias = param(out_shape, axes, dtype) if bias else None

    def __call__(self, x_TD: jax.Array, gate: str | None = None) -> jax.Array:
        """y; with an activation for a gate, `gated` of its pairs, [T, F]."""
        kernel = self.kernel[...]
        # A bias comes before the activation.
        within = gate if self.bias is None else None
        if self.scheme is None or self.kernel_scale is None:
            y = product(x_TD, kernel.reshape(-1, kernel.shape[-1]), sharded="outputs", gate=within)
        else:
            zero = None if self.kernel_zero is None else self.kernel_zero[...]
            scale = self.kernel_scale[...]
            y = quantized_product(x_TD, kernel, scale, zero, self.scheme, sharded="outputs", gate=within)
            y = y.astype(x_TD.dtype)
        if within:
            return y
        y = y.reshape(-1, *kernel.shape[:-1])
        y = y if self.bias is None else y + self.bias[...]
        return gated(y.reshape(y.shape[0], -1), gate) if gate else y


class RowParallelLinear(nnx.Module):
    """y = x W^T + b, the second product of a pair, whose input lies sharded over its first dimension.

    The input may have several dimensions; `axes` names them. Where the kernel shards that dimension too, XLA adds up
    what the devices have; where it shards its output instead, the input is gathered before and the output after. Where
    activations are quantized, each device scales its own part of every token: that needs no further collective, and
    rounds a little otherwise at each width. `width` is how many devices the last dimension of the input is cut for.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        axes: tuple[str, ...],
        *,
        dtype: jnp.dtype,
        bias: bool = False,
        scheme: Scheme | None = None,
        sharding: str = "megatron",
        width: int = 1,
    ):
        shape, kernel_axes = (out_features, *in_shape), ("row_embed", f"row_{axes[0]}", *axes[1:])
        self.kernel, self.kernel_scale, self.kernel_zero = kernel_params(
            shape, kernel_axes, len(in_shape), dtype, scheme, width
        )
        self.scheme, self.sharding = scheme, sharding
        self.bias = param((out_features,), ("embed",), dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        if self.sharding == "output":
            x = replicate(x)
        scatter = has_token_shards(self.sharding, x)
        if self.scheme is not None and self.kernel_scale is not None:
            dim = 1 if self.scheme.group else None
            parts: list[tuple[jax.Array, int | None]] = [(x, 1), (kernel, 1), (self.kernel_scale[...], dim)]
            if self.kernel_zero is not None:
                parts.append((self.kernel_zero[...], dim))
            y_TD = _summed_over_shards(self._quantized_product, *parts, scatter=scatter)
        elif scatter:
            y_TD = _summed_over_shards(_row_product, (x, 1), (kernel, 1), scatter=True)
        else:
            y_TD = _row_product(x, kernel, "outputs" if self.sharding == "output" else "inputs")
            if self.sharding == "output":
                y_TD = _sharded_by_output(y_TD)
            y_TD = replicate(y_TD)
        return y_TD if self.bias is None else y_TD + self.bias[...]

    def _quantized_product(
        self, x: jax.Array, kernel: jax.Array, scale: jax.Array, zero: jax.Array | None = None
    ) -> jax.Array:
        assert self.scheme is not None
        return quantized_product(x, kernel, scale, zero, self.scheme).astype(x.dtype)


def _row_product(x: jax.Array, kernel: jax.Array, sharded: str | None = None) -> jax.Array:
    return product(x.reshape(x.shape[0], -1), kernel.reshape(kernel.shape[0], -1), sharded=sharded)


def _is_sharded() -> bool:
    """Whether several devices share the work."""
    return bool(jax.sharding.get_abstract_mesh().size > 1)


def replicate(x: jax.Array) -> jax.Array:
    """Asks for `x` whole on each device: after a row-parallel product this is its all-reduce or all-gather."""
    if not _is_sharded():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def _sharded_by_output(y_TD: jax.Array) -> jax.Array:
    """Says that a product lies as its kernel does: for many tokens XLA would rather gather that, and compute all of it
    everywhere."""
    if not _is_sharded():
        return y_TD
    return jax.lax.with_sharding_constraint(y_TD, PartitionSpec(None, "tp"))


def has_token_shards(sharding: str, x: jax.Array) -> bool:
    """Whether each device keeps its share of these tokens between the pairs; else all keep all."""
    return sharding == "sequence" and _is_sharded() and x.shape[0] % jax.sharding.get_abstract_mesh().size == 0


def _summed_over_shards(
    function: Callable[..., jax.Array], *arguments: tuple[jax.Array, int | None], scatter: bool = False
) -> jax.Array:
    """The sum of what `function` gives for each device's part of the arguments, by one all-reduce.

    Args:
        function: of parts of the arrays.
        arguments: each array with the dimension that is sharded, or None.
        scatter: each device gets its part of the sum only, cut along the first dimension, by one reduce-scatter.
    """
    arrays = [array for array, _ in arguments]
    if not _is_sharded():
        return function(*arrays)
    specs = tuple(PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, "tp") for _, dim in arguments)

    def summed(*parts: jax.Array) -> jax.Array:
        part = function(*parts)
        return jax.lax.psum_scatter(part, "tp", tiled=True) if scatter else jax.lax.psum(part, "tp")

    out_specs = PartitionSpec("tp") if scatter else PartitionSpec()
    return jax.shard_map(summed, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


class VocabParallelEmbedding(nnx.Module):
    """Token embedding, and the output projection too where the two are tied; sharded over the vocabulary."""

    def __init__(
        self, vocab_size: int, features: int, *, dtype: jnp.dtype, scheme: Scheme | None = None,
        sharding: str = "megatron",
    ):  # fmt: skip
        shape = (vocab_size, features)
        self.table, self.table_scale, _ = kernel_params(shape, ("vocab", "embed"), 1, dtype, scheme)
        self.dtype, self.scheme, self.sharding = dtype, scheme, sharding

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        """[T, D]. Ids out of the table are moved to its nearest row."""
        # Stated by hand: of a single token XLA's GPU partitioner makes a slice, and gathers the whole table for it.
        tokens_T = jnp.clip(tokens_T, 0, self.table[...].shape[0] - 1)
        arguments: list[tuple[jax.Array, int | None]] = [(tokens_T, None), (self.table[...], 0)]
        if self.table_scale is not None:
            arguments.append((self.table_scale[...], 0))
        return _summed_over_shards(self._rows, *arguments, scatter=has_token_shards(self.sharding, tokens_T))

    def _rows(self, tokens_T: jax.Array, table_VD: jax.Array, scale_V: jax.Array | None = None) -> jax.Array:
        """The rows of these tokens that this device's part of the table holds, and zeros for the others."""
        if _is_sharded():
            tokens_T = tokens_T - jax.lax.axis_index("tp") * table_VD.shape[0]
        held_T = (tokens_T >= 0) & (tokens_T < table_VD.shape[0])
        rows_TD = jnp.take(table_VD, tokens_T, axis=0, mode="clip")
        if scale_V is not None:
            rows_TD = rows_TD.astype(jnp.float32) * jnp.take(scale_V, tokens_T, mode="clip")[:, None]
        return jnp.where(held_T[:, None], rows_TD, 0).astype(self.dtype)

    def logits(self, x_RD: jax.Array) -> jax.Array:
        """float32 [R, V], sharded over V."""
        if self.scheme is not None and self.table_scale is not None:
            return quantized_product(x_RD, self.table[...], self.table_scale[...], None, self.scheme, sharded="outputs")
        return product(x_RD, self.table[...], jnp.float32, sharded="outputs")


class RMSNorm(nnx.Module):
    """x / rms(x) * (scale + offset), computed in float32."""

    def __init__(self, features: int, *, eps: float, offset: float = 0.0, dtype: jnp.dtype, axis: str = "embed"):
        self.scale = param((features,), (axis,), dtype)
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        found = calls.norm(x, self.scale[...], self.eps, self.offset)
        if found is not None:
            return found
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (y * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class AllHeadsRMSNorm(nnx.Module):
    """OLMo-2's norm over all heads together: heads are sharded, so XLA adds a small all-reduce.

    `counted` [K, Q] marks each real head once: padding and repeated KV heads must not count in the mean.
    """

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str, ...], counted: tuple[Any, ...], features: int,
        *, eps: float, dtype: jnp.dtype,
    ):  # fmt: skip
        self.scale = param(shape, axes, dtype)
        self.counted = counted
        self.features, self.eps = features, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        squares = jnp.sum(x32 * x32, axis=-1) * jnp.asarray(self.counted, jnp.float32)
        mean = jnp.sum(squares, axis=tuple(range(1, squares.ndim))) / self.features
        y = x32 * jax.lax.rsqrt(mean + self.eps).reshape(-1, *([1] * (x.ndim - 1)))
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rope_tables(rope: RopeSpec, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [T, rotary_dim / 2] each."""
    angles = positions_T[:, None].astype(jnp.float32) * jnp.asarray(rope.inv_freq, jnp.float32)
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first `rotary_dim` features of x [T, ..., H] by halves, as Hugging Face models do."""
    half = cos.shape[-1]
    pairs, rest = x[..., : 2 * half].reshape(*x.shape[:-1], 2, half).astype(jnp.float32), x[..., 2 * half :]
    broadcast = (cos.shape[0], *([1] * (pairs.ndim - 2)), half)
    cos, sin = cos.reshape(broadcast), sin.reshape(broadcast)
    # The halves swapped by reversal: one pass over x, where putting two rotated halves together takes three.
    signs = jnp.array([[-1.0], [1.0]], jnp.float32)
    rotated = (pairs * cos + jnp.flip(pairs, -2) * (sin * signs)).reshape(*x.shape[:-1], 2 * half).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


class Mlp(nnx.Module):
    """down(act(gate(x)) * up(x)): gate and up are one column-parallel product, down is row-parallel."""

    def __init__(
        self,
        embed: int,
        ffn: int,
        act: str,
        *,
        dtype: jnp.dtype,
        bias: bool = False,
        schemes: Mapping[str, Scheme] = MappingProxyType({}),
        sharding: str = "megatron",
        width: int = 1,
    ):
        self.gate_up = ColumnParallelLinear(
            embed, (ffn, 2), ("ffn", "gate_up"), dtype=dtype, bias=bias, scheme=schemes.get("gate_up")
        )
        self.down = RowParallelLinear(
            (ffn,), embed, ("ffn",), dtype=dtype, bias=bias, scheme=schemes.get("down"), sharding=sharding, width=width
        )
        self.act = act

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return self.down(self.gate_up(x_TD, self.act))


class MoeMlp(nnx.Module):
    """Mixture of experts, sharded by expert: each device adds what its experts give, then one all-reduce.

    Each device runs all of its experts over all tokens and weighs their outputs, zero for tokens not
    routed to them. That is exact, and reads each weight once; it does more arithmetic than a grouped
    product would, which matters for long prefills only.
    """

    def __init__(
        self, embed: int, spec: MoeSpec, num_experts_padded: int, act: str, *, dtype: jnp.dtype,
        schemes: Mapping[str, Scheme] = MappingProxyType({}), sharding: str = "megatron",
    ):  # fmt: skip
        e, f = num_experts_padded, spec.intermediate_size
        self.router = param((spec.num_experts, embed), (None, "embed"), dtype)
        self.schemes = schemes.get("gate_up"), schemes.get("down")
        self.gate_up, self.gate_up_scale, self.gate_up_zero = kernel_params(
            (e, 2, f, embed), ("experts", "gate_up", "expert_ffn", "embed"), 1, dtype, self.schemes[0]
        )
        self.down, self.down_scale, self.down_zero = kernel_params(
            (e, embed, f), ("experts", "embed", "expert_ffn"), 1, dtype, self.schemes[1]
        )
        self.spec, self.act, self.num_experts_padded, self.sharding = spec, act, e, sharding

    def routing(self, x_TD: jax.Array) -> jax.Array:
        """float32 [T, E]: each token's weight for each expert, zero for those it is not routed to."""
        logits_TE = product(x_TD, self.router[...])
        probs_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(probs_TE, self.spec.top_k)
        if self.spec.normalize_top_k:
            top = top / jnp.sum(top, axis=-1, keepdims=True)
        one_hot = jax.nn.one_hot(chosen, self.num_experts_padded, dtype=jnp.float32)
        return jnp.einsum("tk,tke->te", top, one_hot)

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        weights_TE = self.routing(x_TD).astype(x_TD.dtype)
        y_ET2F = self._gate_up(x_TD)
        z_ETF = activation(self.act)(y_ET2F[:, :, 0]) * y_ET2F[:, :, 1]
        y_TD = jnp.sum(self._down(z_ETF * weights_TE.T[:, :, None]), axis=0)
        if has_token_shards(self.sharding, y_TD):
            return jax.lax.with_sharding_constraint(replicate(y_TD), PartitionSpec("tp"))
        return replicate(y_TD)

    def _gate_up(self, x_TD: jax.Array) -> jax.Array:
        e, _, f, d = self.gate_up.shape
        scale, zero = (
            None if one is None else one[...].reshape(e, 2 * f, *one.shape[3:])
            for one in (self.gate_up_scale, self.gate_up_zero)
        )
        y_ETX = experts_product(x_TD, self.gate_up[...].reshape(e, 2 * f, d), scale, zero, self.schemes[0])
        return y_ETX.reshape(e, -1, 2, f)

    def _down(self, z_ETF: jax.Array) -> jax.Array:
        scale, zero = (None if one is None else one[...] for one in (self.down_scale, self.down_zero))
        return experts_product(z_ETF, self.down[...], scale, zero, self.schemes[1])
