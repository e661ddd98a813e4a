"""The tokens of a sequence so far, counted from the pages: what penalties go by."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ryzanstein_jax.sampling import TokenCounts, count_tokens


def history_counts(fields: dict[str, jax.Array], history: jax.Array, width: int) -> TokenCounts:
    """How often each row's sequence holds each token, counted page by page, and only if a row has penalties.

    Args:
        fields: an unpacked `FullRowLayout`.
        history: int32 [pages, page], the ids of the tokens that the cache's pages hold.
        width: size of the vocabulary, with padding.
    """
    page_size = history.shape[1]
    tables, lens = fields["tables"], fields["position"]
    rows = tables.shape[0]
    wanted = (
        (fields["repetition_penalty"] != 1.0)
        | (fields["presence_penalty"] != 0.0)
        | (fields["frequency_penalty"] != 0.0)
    )
    empty = TokenCounts(jnp.zeros((rows, width), jnp.int32), jnp.zeros((rows, width), bool))

    def add_page(page: jax.Array, counts: TokenCounts) -> TokenCounts:
        tokens = jnp.take(history, tables[:, page], axis=0, mode="clip")
        positions = page * page_size + jnp.arange(page_size)
        valid = positions[None, :] < lens[:, None]
        is_output = positions[None, :] >= fields["prompt_len"][:, None]
        more = count_tokens(tokens, valid, is_output, width=width)
        return TokenCounts(counts.output + more.output, counts.seen | more.seen)

    pages = -(-jnp.max(jnp.where(wanted, lens, 0)) // page_size)
    return jax.lax.fori_loop(0, pages, add_page, empty)
