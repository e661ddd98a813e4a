"""Activation functions of MLPs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    return {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    }[name]


def gated(y: jax.Array, gate: str) -> jax.Array:
    """activation(first) * second of the pairs that lie one behind the other in y [T, 2 F]: [T, F], rounded once."""
    pairs = y.reshape(y.shape[0], -1, 2).astype(jnp.float32)
    return (activation(gate)(pairs[:, :, 0]) * pairs[:, :, 1]).astype(y.dtype)
