"""Products with kernels of few bits whose inputs share scales in groups: dequantized within the product.

    y[t, o] = sum_g s[o, g] sum_(i in g) x[t, i] (q[o, i] - z[o, g])

Kernels are int4, which lie packed on devices, or float8. Array names end in their dims: T tokens, I inputs, O outputs,
G groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ryzanstein_jax.model.int8 import with_two_rows

#: Inputs of a group for each token up to which a GPU sums each group by itself. For few rows XLA cuts the inputs of a
#: product into parts and writes the scales out to the size of the kernel; the sums of the groups are less to write.
_INPUTS_FOR_A_TOKEN = 4


def dequantized(kernel: jax.Array, scale: jax.Array, zero: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """The kernel's values.

    Args:
        kernel: int4 or float8, [..., I].
        scale: float32 [..., G], or without the last dimension: one for all of I.
        zero: int8, like `scale`, or None.
        dtype: to compute in.

    Returns:
        [..., I] of `dtype`.
    """
    if scale.ndim < kernel.ndim:
        scale, zero = scale[..., None], zero if zero is None else zero[..., None]
    grouped = _less_zero(kernel.astype(dtype).reshape(*scale.shape, -1), zero)
    return (grouped * scale.astype(dtype)[..., None]).reshape(kernel.shape)


def product(x_TI: jax.Array, kernel_OI: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """x ((q - z) s)^T, float32 [T, O].

    Args:
        x_TI: activations, [T, I].
        kernel_OI: int4 or float8 [O, I].
        scale: float32 [O, G], or [O] where each output has one.
        zero: int8, like `scale`, or None.
    """
    if scale.ndim == 1:
        q_OI = _less_zero(kernel_OI.astype(x_TI.dtype), zero)
        return with_two_rows(_dot, x_TI, q_OI) * scale

    if x_TI.shape[0] * scale.shape[1] * _INPUTS_FOR_A_TOKEN > x_TI.shape[1]:
        return _whole(x_TI, kernel_OI, scale, zero)
    return jax.lax.platform_dependent(x_TI, kernel_OI, scale, zero, cuda=by_groups, default=_whole)


def by_groups(x_TI: jax.Array, kernel_OI: jax.Array, scale_OG: jax.Array, zero_OG: jax.Array | None) -> jax.Array:
    """The same with the sum of each group scaled, float32 [T, O]."""
    outputs, groups = scale_OG.shape
    q_OGI = _less_zero(kernel_OI.astype(x_TI.dtype).reshape(outputs, groups, -1), zero_OG)
    x_TGI = x_TI.reshape(x_TI.shape[0], groups, -1)
    sums_GTO = jnp.einsum("tgi,ogi->gto", x_TGI, q_OGI, preferred_element_type=jnp.float32)
    return jnp.sum(sums_GTO * scale_OG.T[:, None], axis=0)


def _whole(x_TI: jax.Array, kernel_OI: jax.Array, scale_OG: jax.Array, zero_OG: jax.Array | None) -> jax.Array:
    return with_two_rows(_dot, x_TI, dequantized(kernel_OI, scale_OG, zero_OG, x_TI.dtype))


def _less_zero(q: jax.Array, zero: jax.Array | None) -> jax.Array:
    return q if zero is None else q - zero.astype(q.dtype)[..., None]


def _dot(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_TI, kernel_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
