"""Products of int8 with int8: kernels scaled per output channel, activations per token as they come.

    y[t, o] = (sum_i q[t, i] k[o, i]) * s[t] * c[o],    q[t] = round(x[t] / s[t]),    s[t] = max_i |x[t, i]| / 127

The sum is exact, in int32: at most 133,000 products of 127 x 127 fit. Array names end in their dims: T tokens,
I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ryzanstein_jax.native import calls

LARGEST = 127.0
#: The rest of a rounding is at most half a step, which a second digit cuts into 127.
FINER = 2 * LARGEST


def quantize_tokens(x: jax.Array, digits: int = 1) -> tuple[jax.Array, list[jax.Array]]:
    """Values scaled into int8, each vector of the last dimension by itself.

    With a second digit the rest that rounding left is quantized in the same way, 254 times finer. Where single values
    outgrow the others of their token a hundredfold, as in front of an MLP's last product, one digit leaves these too
    few steps.

    Args:
        x: floats [..., T, I].
        digits: 1 or 2.

    Returns:
        int8 [..., digits * T, I], the first digits of all tokens first; and the float32 [..., T, 1] that each digit
        counts, 0 where a token is all zero.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scaled = x * jnp.where(largest > 0, LARGEST / largest, 0.0)
    scale = largest * (1 / LARGEST)
    first = jnp.round(scaled)
    if digits == 1:
        return first.astype(jnp.int8), [scale]
    second = jnp.round((scaled - first) * FINER)
    return jnp.concatenate([first, second], axis=-2).astype(jnp.int8), [scale, scale * (1 / FINER)]


def scaled(y: jax.Array, scales: list[jax.Array], channels: jax.Array) -> jax.Array:
    """float32 [..., T, O] of the integer product [..., digits * T, O], by the scales of tokens and channels."""
    parts = jnp.split(y, len(scales), axis=-2)
    total = sum(part.astype(jnp.float32) * scale for part, scale in zip(parts, scales, strict=True))
    return jnp.asarray(total) * channels


def integer_product(q_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """q k^T, int32 [T, O] of int8."""
    return with_two_rows(
        lambda q, k: jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32),
        q_TI,
        kernel_OI,
    )


def with_two_rows(dot: Callable[[jax.Array, jax.Array], jax.Array], x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """dot(x, kernel), a single row of bfloat16 or int8 as one of two equal ones on a CPU.

    XLA's CPU library does not take a single row of these: its own loop for it is ten times slower.
    """
    if x_TI.shape[0] > 1:
        return dot(x_TI, kernel_OI)

    def doubled(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
        return dot(jnp.broadcast_to(x_TI, (2, x_TI.shape[1])), kernel_OI)[:1]

    return jax.lax.platform_dependent(x_TI, kernel_OI, cpu=doubled, default=dot)


def product(
    x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array, digits: int, *, sharded: str | None = None
) -> jax.Array:
    """x (k c)^T, float32.

    Args:
        x_TI: activations, [T, I].
        kernel_OI: int8 [O, I].
        scale_O: float32 [O], of each output channel.
        digits: of the activations.
        sharded: "outputs", if these lie sharded over the mesh.
    """
    found = calls.sharded_integer_product(x_TI, kernel_OI, scale_O, digits, FINER, sharded)
    if found is not None:
        return found
    q, scales = quantize_tokens(x_TI, digits)
    return scaled(integer_product(q, kernel_OI), scales, scale_O)
