"""Products of int8 with int8: kernels scaled per output channel, activations per token as they come.

    y[t, o] = (sum_i q[t, i] k[o, i]) * s[t] * c[o],    q[t] = round(x[t] / s[t]),    s[t] = max_i |x[t, i]| / 127

The sum is exact, in int32: at most 133,000 products of 127 x 127 fit. Array names end in their dims: T tokens,
I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST = 127.0


def quantize_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values scaled into int8, each vector of the last dimension by itself.

    Returns:
        int8, shaped like `x`, and the scales float32 with a last dimension of 1: 0 where a vector is all zero.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    inverse = jnp.where(largest > 0, LARGEST / largest, 0.0)
    return jnp.round(x * inverse).astype(jnp.int8), largest * (1 / LARGEST)


def integer_product(q_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """q k^T, int32 [T, O] of int8."""

    def plain(q_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
        return jax.lax.dot_general(q_TI, kernel_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    def two_rows(q_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
        # XLA's CPU library takes no single row; its own loop would be ten times slower.
        return plain(jnp.broadcast_to(q_TI, (2, q_TI.shape[1])), kernel_OI)[:1]

    if q_TI.shape[0] > 1:
        return plain(q_TI, kernel_OI)
    return jax.lax.platform_dependent(q_TI, kernel_OI, cpu=two_rows, default=plain)


def product(x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x (k c)^T, in x's dtype or the one given.

    Args:
        x_TI: activations, [T, I].
        kernel_OI: int8 [O, I].
        scale_O: float32 [O], of each output channel.
        dtype: of the result.
    """
    q_TI, scale_T1 = quantize_tokens(x_TI)
    y_TO = integer_product(q_TI, kernel_OI).astype(jnp.float32) * scale_T1 * scale_O
    return y_TO.astype(dtype or x_TI.dtype)
