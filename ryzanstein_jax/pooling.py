"""Hidden states to sums of them, inside a step. The mean of a prompt that comes in chunks is made of the chunks' sums.

Array names end in their dims: C prompt tokens, D embed, P pools.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pool(hidden_CD: jax.Array, pools_P2: jax.Array) -> jax.Array:
    """Sums of hidden states over ranges of tokens.

    One product for all of them: adding up in an order of its own, as a scatter does on a GPU, would differ from run to
    run. A token that is not finite spoils the pools that hold it and no others.

    Args:
        hidden_CD: any float dtype.
        pools_P2: int32, first and last token of each pool.

    Returns:
        float32 [P, D]; NaN where a hidden state of the pool is not finite.
    """
    tokens_C = jnp.arange(hidden_CD.shape[0])
    inside_PC = (tokens_C >= pools_P2[:, :1]) & (tokens_C <= pools_P2[:, 1:])
    finite_C = jnp.isfinite(hidden_CD).all(axis=1)
    clean_CD = jnp.where(finite_C[:, None], hidden_CD, 0).astype(jnp.float32)
    sums_PD = jnp.einsum("pc,cd->pd", inside_PC.astype(jnp.float32), clean_CD, precision="highest")
    return jnp.where((inside_PC & ~finite_C).any(axis=1)[:, None], jnp.nan, sums_PD)
