"""Logits to tokens: greedy, temperature, top-k, top-p, min-p; penalties, bias, masks, log-probabilities.

Nothing sorts the vocabulary: top-k and top-p are thresholds found by
bisection over the logits' bits. A row's token is a function of its logits, its settings, its key and its position
alone, and one that the rounding of its logits hardly touches.

Array names end in their dims: R rows, V vocabulary (perhaps padded), L history, N alternatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: Logits are cut to this, so that their differences stay numbers.
LARGEST = float(np.finfo(np.float32).max)

_KEEP_ALL = -(1 << 31)  # below each ordered key
_SMALLEST_TEMPERATURE = 1e-20  # a smaller one would be a denormal number, which devices flush to zero


class Rows(NamedTuple):
    """How each row is sampled: the fields of `plan.ROW`.

    Attributes:
        key: uint32 [R, 2], the request's seed as two words.
        position: int32 [R], of the token sampled, in its sequence.
        temperature: float32 [R]; 0 is greedy, and the filters are then not looked at.
        top_k: int32 [R]; keeps that many most likely tokens and those as likely as the last; < 1 keeps all.
        top_p: float32 [R]; then keeps the smallest set of at least this share of what is left.
        min_p: float32 [R]; then keeps tokens at least this share as likely as the most likely one.
    """

    key: jax.Array
    position: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


class FullRows(NamedTuple):
    """`Rows` and what only the full sampler reads.

    Attributes:
        rows: as for `sample`.
        repetition_penalty, presence_penalty, frequency_penalty: float32 [R].
        target: int32 [R]; a token to score instead of sampling one, or -1.
    """

    rows: Rows
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    target: jax.Array


class TokenCounts(NamedTuple):
    """What each row's history holds.

    Attributes:
        output: int32 [R, V], how often each token stands in the completion.
        seen: bool [R, V], whether it stands in prompt or completion.
    """

    output: jax.Array
    seen: jax.Array


class Bias(NamedTuple):
    """Numbers added to single logits; those of one token add up, minus infinity bans it.

    Attributes:
        row, token: int32 [B]. An entry out of range, such as padding with row = R, is dropped.
        value: float32 [B].
    """

    row: jax.Array
    token: jax.Array
    value: jax.Array


class SampleResult(NamedTuple):
    """What `plan.StepResult` carries.

    Attributes:
        tokens: int32 [R].
        logprobs: float32 [R], of those tokens, in the distribution of the logits as they came.
        ranks: int32 [R], 1 + how many tokens are more likely.
        top_tokens: int32 [R, N], the most likely tokens, best first.
        top_logprobs: float32 [R, N].
    """

    tokens: jax.Array
    logprobs: jax.Array
    ranks: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def sample(logits_RV: jax.Array, rows: Rows, *, vocab_size: int) -> jax.Array:
    """Chooses one token per row.

    Args:
        logits_RV: float32 [R, V]; columns from `vocab_size` on are padding and never chosen, nor is NaN.
            A row without any finite logit gives token 0.
        rows: how to choose.
        vocab_size: number of real columns.

    Returns:
        int32 [R], each from 0 to vocab_size - 1.
    """
    return _choose(_clean(logits_RV, vocab_size), rows)


def full_sample(
    logits_RV: jax.Array,
    rows: FullRows,
    *,
    vocab_size: int,
    num_logprobs: int = 0,
    counts: TokenCounts | None = None,
    bias: Bias | None = None,
    mask: jax.Array | None = None,
) -> SampleResult:
    """Samples with penalties, bias and masks, scores targets, and returns log-probabilities.

    The order is vLLM's: log-probabilities of the logits as they came, then mask, bias, penalties
    (repetition, frequency, presence), temperature and filters.

    Args:
        logits_RV: float32 [R, V], as for `sample`.
        rows: how to choose.
        vocab_size: number of real columns.
        num_logprobs: N, how many alternatives to return; at most V.
        counts: each row's history, for the penalties; None leaves them out.
        bias: biased logits; None for none.
        mask: uint32 [R, ceil(vocab_size / 32)]: bit t % 32 of word t // 32 allows token t. None allows all.
    """
    clean_RV = _clean(logits_RV, vocab_size)
    logprobs_RV = _log_softmax(clean_RV)
    adjusted_RV = clean_RV
    if mask is not None:
        adjusted_RV = jnp.where(_allowed(mask, adjusted_RV.shape[1]), adjusted_RV, -jnp.inf)
    if bias is not None:
        token = jnp.where((bias.token >= 0) & (bias.row >= 0), bias.token, vocab_size)
        row = jnp.where(token < vocab_size, bias.row, adjusted_RV.shape[0])
        adjusted_RV = adjusted_RV.at[row, token].add(bias.value, mode="drop")
    if counts is not None:
        adjusted_RV = _penalize(adjusted_RV, rows, counts)
    # A bias may have made infinities or, with a banned token, NaN.
    chosen_R = _choose(_clean(adjusted_RV, vocab_size), rows.rows)
    tokens_R = jnp.where(rows.target >= 0, jnp.minimum(rows.target, vocab_size - 1), chosen_R)
    chosen_logprob_R1 = jnp.take_along_axis(logprobs_RV, tokens_R[:, None], axis=1)
    top_logprobs_RN, top_tokens_RN = jax.lax.top_k(logprobs_RV, num_logprobs)
    return SampleResult(
        tokens=tokens_R,
        logprobs=chosen_logprob_R1[:, 0],
        ranks=1 + jnp.sum(logprobs_RV > chosen_logprob_R1, axis=1, dtype=jnp.int32),
        top_tokens=top_tokens_RN.astype(jnp.int32),
        top_logprobs=top_logprobs_RN,
    )


def count_tokens(history_RL: jax.Array, valid_RL: jax.Array, is_output_RL: jax.Array, *, width: int) -> TokenCounts:
    """Counts each row's tokens.

    Args:
        history_RL: int32 [R, L], tokens of prompt and completion in any order.
        valid_RL: bool [R, L], which of them count.
        is_output_RL: bool [R, L], which of those belong to the completion.
        width: V, columns of the result; tokens out of range are dropped.
    """
    num_rows = history_RL.shape[0]
    row_R1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    inside_RL = valid_RL & (history_RL >= 0) & (history_RL < width)
    token_RL = jnp.where(inside_RL, history_RL, width)  # which mode="drop" leaves out
    ones_RL = is_output_RL.astype(jnp.int32)
    output = jnp.zeros((num_rows, width), jnp.int32).at[row_R1, token_RL].add(ones_RL, mode="drop")
    seen = jnp.zeros((num_rows, width), jnp.bool_).at[row_R1, token_RL].set(True, mode="drop")
    return TokenCounts(output=output, seen=seen)


def _clean(logits_RV: jax.Array, vocab_size: int) -> jax.Array:
    """The logits with padding and NaN as minus infinity, plus infinity as the largest number, and no -0."""
    logits_RV = jnp.where(jnp.isnan(logits_RV), -jnp.inf, jnp.minimum(logits_RV, LARGEST))
    logits_RV = jnp.where(logits_RV == 0, 0.0, logits_RV)
    if logits_RV.shape[1] > vocab_size:
        column_V = jnp.arange(logits_RV.shape[1], dtype=jnp.int32)
        logits_RV = jnp.where(column_V < vocab_size, logits_RV, -jnp.inf)
    return logits_RV


def _choose(logits_RV: jax.Array, rows: Rows) -> jax.Array:
    """Tokens int32 [R] of clean logits."""
    best_R = jnp.max(logits_RV, axis=1)
    # Two plain reductions: XLA's argmax on CPU takes up to twice as long as both.
    column_V = jnp.arange(logits_RV.shape[1], dtype=jnp.int32)
    greedy_R = jnp.min(jnp.where(logits_RV == best_R[:, None], column_V, logits_RV.shape[1] - 1), axis=1)
    greedy_R = jnp.where(jnp.isfinite(best_R), greedy_R, 0)
    random_R = rows.temperature > 0

    def draw() -> jax.Array:
        return jnp.where(random_R, _draw(logits_RV, best_R, greedy_R, rows), greedy_R)

    return jax.lax.cond(jnp.any(random_R), draw, lambda: greedy_R)


def _draw(logits_RV: jax.Array, best_R: jax.Array, greedy_R: jax.Array, rows: Rows) -> jax.Array:
    """Tokens drawn from the filtered distribution, int32 [R]; greedy rows give anything."""
    best_R1 = jnp.where(jnp.isfinite(best_R), best_R, 0.0)[:, None]
    temperature_R1 = jnp.where(rows.temperature > 0, jnp.maximum(rows.temperature, _SMALLEST_TEMPERATURE), 1.0)[:, None]
    threshold_R = _threshold(logits_RV, best_R1, temperature_R1, rows)

    weight_RV = _weights(logits_RV, best_R1, temperature_R1)
    kept_RV = (_ordered_key(logits_RV) >= threshold_R[:, None]) & (weight_RV >= rows.min_p[:, None])
    # The first of independent exponential clocks to ring, each as fast as its token is likely. Unlike a look-up in the
    # cumulative distribution, where the rounding of all weights before it moves a token's place, this is decided by
    # two tokens alone: logits that differ in their last bits, as those of a replay do, hardly ever change it.
    ring_RV = jnp.where(kept_RV & (weight_RV > 0), _exponentials(rows, logits_RV.shape[1]) / weight_RV, jnp.inf)
    column_V = jnp.arange(logits_RV.shape[1], dtype=jnp.int32)
    first_RV = ring_RV == jnp.min(ring_RV, axis=1, keepdims=True)
    drawn_R = jnp.min(jnp.where(first_RV, column_V, logits_RV.shape[1] - 1), axis=1)
    # Without any weight (no finite logit) there is nothing to draw from.
    return jnp.where(jnp.isfinite(best_R), drawn_R, greedy_R)


def _exponentials(rows: Rows, width: int) -> jax.Array:
    """Exponential random numbers, float32 [R, width], of each row's key and position; finite and above 0."""
    keys_R = jax.random.wrap_key_data(rows.key, impl="threefry2x32")
    bits_RV = jax.vmap(lambda key, position: jax.random.bits(jax.random.fold_in(key, position), (width,)))(
        keys_R, rows.position
    )
    # Small ones win, so it is these that need many bits.
    uniform_RV = jnp.minimum((bits_RV.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    return -jnp.log1p(-uniform_RV)


def _weights(logits: jax.Array, best: jax.Array, temperature: jax.Array) -> jax.Array:
    """Probabilities relative to that of the most likely token, from 0 to 1."""
    return jnp.exp((logits - best) / temperature)


def _ordered_key(logits: jax.Array) -> jax.Array:
    """int32 keys in the order of the floats (no NaN, no -0)."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _threshold(logits_RV: jax.Array, best_R1: jax.Array, temperature_R1: jax.Array, rows: Rows) -> jax.Array:
    """Ordered key, int32 [R], from which on top-k and top-p keep tokens."""
    random_R = rows.temperature > 0
    keep_all_R = jnp.full_like(rows.top_k, _KEEP_ALL)
    by_k_R = random_R & (rows.top_k > 0) & (rows.top_k < logits_RV.shape[1])
    by_p_R = random_R & (rows.top_p < 1)

    def filtered() -> jax.Array:
        key_RV = _ordered_key(logits_RV)
        weight_RV = _weights(logits_RV, best_R1, temperature_R1)
        above_R = jnp.max(key_RV, axis=1) + 1

        def measure(threshold_R: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Weight and number of the tokens from the threshold on, float32 [R] and int32 [R]."""
            inside_RV = key_RV >= threshold_R[:, None]
            # One reduction for both, also where one would do: XLA's CPU code for it is twice as fast as for either
            # alone. The barrier keeps the compiler from dropping the one that top-k does not look at.
            mass_R, count_R = jax.lax.reduce(
                (jnp.where(inside_RV, weight_RV, 0.0), inside_RV.astype(jnp.int32)),
                (jnp.float32(0), jnp.int32(0)),
                lambda a, b: (a[0] + b[0], a[1] + b[1]),
                (1,),
            )
            return jax.lax.optimization_barrier((mass_R, count_R))

        def top_k() -> jax.Array:
            return _bisect(measure, lambda mass, count: count >= rows.top_k, keep_all_R, above_R, by_k_R)

        k_threshold_R = jax.lax.cond(jnp.any(by_k_R), top_k, lambda: keep_all_R)

        def top_p() -> jax.Array:
            wanted_R = rows.top_p * measure(k_threshold_R)[0]
            return _bisect(measure, lambda mass, count: mass >= wanted_R, k_threshold_R, above_R, by_p_R)

        return jax.lax.cond(jnp.any(by_p_R), top_p, lambda: k_threshold_R)

    return jax.lax.cond(jnp.any(by_k_R | by_p_R), filtered, lambda: keep_all_R)


def _bisect(
    measure: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    enough: Callable[[jax.Array, jax.Array], jax.Array],
    low_R: jax.Array,
    above_R: jax.Array,
    active_R: jax.Array,
) -> jax.Array:
    """Raises `low` as far as what lies from it on is still enough, in active rows; keys int32 [R].

    A row is done once one token lies between its bounds, so that no key between them changes what is kept.
    How often other rows go on halving changes a row's key, but never the tokens on either side of it.

    Args:
        measure: weight and number of the tokens from a key on.
        enough: whether they are enough.
        low_R: keys from which on there is enough.
        above_R: keys, above all of a row's.
        active_R: bool [R]; other rows keep their `low`.
    """
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def unfinished(state: State) -> jax.Array:
        low, above, count_low, count_above = state
        return jnp.any(active_R & (low + 1 < above) & (count_low - count_above > 1))

    def halve(state: State) -> State:
        low, above, count_low, count_above = state
        middle = (low >> 1) + (above >> 1) + (low & above & 1)  # their sum may not fit 32 bits
        mass, count = measure(middle)
        found = enough(mass, count)
        return (
            jnp.where(found, middle, low),
            jnp.where(found, above, middle),
            jnp.where(found, count, count_low),
            jnp.where(found, count_above, count),
        )

    everything_R = jnp.full_like(low_R, 1 << 30)
    state = (low_R, above_R, everything_R, jnp.zeros_like(low_R))
    return jnp.where(active_R, jax.lax.while_loop(unfinished, halve, state)[0], low_R)


def _log_softmax(logits_RV: jax.Array) -> jax.Array:
    """float32 [R, V] log-probabilities of clean logits; all minus infinity where no logit is finite."""
    best_R1 = jnp.max(logits_RV, axis=1, keepdims=True)
    shifted_RV = logits_RV - jnp.where(jnp.isfinite(best_R1), best_R1, 0.0)
    total_R1 = jnp.sum(jnp.exp(shifted_RV), axis=1, keepdims=True)
    return shifted_RV - jnp.log(jnp.where(total_R1 > 0, total_R1, 1.0))


def _allowed(mask_RW: jax.Array, width: int) -> jax.Array:
    """bool [R, V] of a mask's bits; columns beyond it are not allowed."""
    bits = (mask_RW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(mask_RW.shape[0], -1)[:, :width].astype(jnp.bool_)
    return jnp.pad(allowed, ((0, 0), (0, width - allowed.shape[1])))


def _penalize(logits_RV: jax.Array, rows: FullRows, counts: TokenCounts) -> jax.Array:
    """Repetition over prompt and completion, then frequency and presence over the completion."""
    repetition_R1 = rows.repetition_penalty[:, None]
    repeated_RV = jnp.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = jnp.where(counts.seen, repeated_RV, logits_RV)
    logits_RV = logits_RV - rows.frequency_penalty[:, None] * counts.output.astype(jnp.float32)
    return logits_RV - rows.presence_penalty[:, None] * (counts.output > 0)
