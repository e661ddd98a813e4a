"""Products of int8 with int8: kernels scaled per output channel, activations per token as they come.

    y[t, o] = (sum_i q[t, i] k[o, i]) * s[t] * c[o],    q[t] = round(x[t] / s[t])

With one digit q is int8, and s[t] = max_i |x[t, i]| / 127. With two it has sixteen bits, q = 256 high + low, and a step
s[t] that suits most of a token's values: then low digits say them, and high digits are zero but for outliers.

The sum is exact, in int32: at most 133,000 products of 127 x 127 fit. Outliers do not count for more, for a token's
magnitudes have no larger mean than 127 / 4 steps then. Array names end in their dims: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ryzanstein_jax.model.activations import gated
from ryzanstein_jax.native import calls

#: What one digit reaches, in steps; two reach 256 times as far, whichever way rounding goes.
LARGEST = 127.0
#: Most that a step of two digits is, in mean magnitudes of a token: low digits reach four of these, or all values if
#: these reach no farther. Chosen by measurement, docs/quantization.md.
MEAN_STEP = 4 / 127


def quantize_tokens(x: jax.Array, digits: int = 1) -> tuple[jax.Array, jax.Array]:
    """Values scaled into int8, each vector of the last dimension by itself.

    Single values outgrow the others of their token a hundredfold, in front of an MLP's last product above all: with one
    digit these have too few steps left.

    Args:
        x: floats [..., T, I].
        digits: 1 or 2.

    Returns:
        int8 [..., digits * T, I], the low digits of all tokens first; and float32 [..., T, 1], what a step counts: 0
        where a token is all zero, NaN where one of its values is.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    step = largest * (1 / LARGEST)
    if digits == 2:
        mean = jnp.mean(jnp.abs(x), axis=-1, keepdims=True)
        step = jnp.maximum(largest * (1 / (256 * LARGEST)), jnp.minimum(step, mean * MEAN_STEP))
    q = jnp.round(x * jnp.where(step > 0, 1 / step, 0.0)).astype(jnp.int32)
    if digits == 2:
        high = (q + 128) >> 8
        q = jnp.concatenate([q - (high << 8), high], axis=-2)
    return q.astype(jnp.int8), step


def scaled(y: jax.Array, digits: int, steps: jax.Array, channels: jax.Array) -> jax.Array:
    """float32 [..., T, O] of the integer product [..., digits * T, O], by the scales of tokens and channels."""
    if digits == 2:
        low, high = jnp.split(y, 2, axis=-2)
        y = low + (high << 8)
    return y.astype(jnp.float32) * steps * channels


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
    x_TI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array, digits: int, *, sharded: str | None = None,
    gate: str | None = None,
) -> jax.Array:  # fmt: skip
    """x (k c)^T, float32 [T, O], or [T, O / 2] with a gate.

    Args:
        x_TI: activations, [T, I].
        kernel_OI: int8 [O, I].
        scale_O: float32 [O], of each output channel.
        digits: of the activations.
        sharded, gate: as `layers.product` takes them; inputs are not sharded.
    """
    found = calls.sharded_integer_product(x_TI, kernel_OI, scale_O, digits, MEAN_STEP, sharded, gate)
    if found is not None:
        return found
    if gate:
        return gated(product(x_TI, kernel_OI, scale_O, digits, sharded=sharded), gate)
    q, steps = quantize_tokens(x_TI, digits)
    return scaled(integer_product(q, kernel_OI), digits, steps, scale_O)
