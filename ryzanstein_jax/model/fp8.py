"""Products with float8_e4m3fn kernels that have one scale for each output.

On GPUs activations become float8 too, with one scale for each token, and the product is one of two float8 matrices,
which Hopper and later do at twice the rate of bfloat16; elsewhere the kernel is dequantized within the product. Array
names end in their dims: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ryzanstein_jax.model import grouped

FLOAT8 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(FLOAT8).max)
#: cuBLASLt takes float8 matrices in multiples of 16 only.
_LEAST_ROWS = 16


def quantize_tokens(x_TI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values scaled into float8, each token by itself.

    Returns:
        float8 [T, I], and the float32 [T, 1] that it counts in, 0 where a token is all zero.
    """
    x_TI = x_TI.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x_TI), axis=-1, keepdims=True)
    scaled = x_TI * jnp.where(largest > 0, LARGEST / largest, 0.0)
    # What rounds above the largest value would become NaN.
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(FLOAT8), largest * (1 / LARGEST)


def of_two_float8(x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
    """x (k c)^T with float8 activations, float32 [T, O]."""
    rows = x_TI.shape[0]
    if rows < _LEAST_ROWS:
        x_TI = jnp.pad(x_TI, ((0, _LEAST_ROWS - rows), (0, 0)))
    q_TI, scale_T1 = quantize_tokens(x_TI)
    y_TO = jax.lax.dot_general(q_TI, kernel_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (y_TO * scale_T1 * scale_O)[:rows]


def product(x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
    """x (k c)^T, float32 [T, O].

    Args:
        x_TI: activations, [T, I].
        kernel_OI: float8_e4m3fn [O, I].
        scale_O: float32 [O], of each output channel.
    """

    def dequantized(x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
        return grouped.product(x_TI, kernel_OI, scale_O, None)

    return jax.lax.platform_dependent(x_TI, kernel_OI, scale_O, cuda=of_two_float8, default=dequantized)
