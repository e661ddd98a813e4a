"""Sampling against numpy references, and that a row depends on nothing but itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzanstein_jax.sampling import Bias, FullRows, Rows, count_tokens, full_sample, sample

V = 300  # more than one block, and not a whole number of them
REAL = 290


def rows(count, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, position=None, key=(7, 9)):
    def full(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (count,)))

    return Rows(
        key=jnp.asarray(np.broadcast_to(np.asarray(key, np.uint32), (count, 2))),
        position=full(np.arange(count) if position is None else position, np.int32),
        temperature=full(temperature, np.float32),
        top_k=full(top_k, np.int32),
        top_p=full(top_p, np.float32),
        min_p=full(min_p, np.float32),
    )


def full_rows(base, *, repetition=1.0, presence=0.0, frequency=0.0, target=-1):
    count = len(base.position)

    def full(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (count,)))

    return FullRows(
        base,
        full(repetition, np.float32),
        full(presence, np.float32),
        full(frequency, np.float32),
        full(target, np.int32),
    )


jitted = jax.jit(sample, static_argnames="vocab_size")
jitted_full = jax.jit(full_sample, static_argnames=("vocab_size", "num_logprobs"))


def run(logits, base):
    """Samples in a batch of 512, whatever the number of rows, so that there is one program to compile."""
    count = len(base.position)
    padded = Rows(*(jnp.pad(x, ((0, 512 - count), *[(0, 0)] * (x.ndim - 1))) for x in base))
    logits = np.pad(np.asarray(logits), ((0, 512 - count), (0, 0)))
    return jitted(logits, padded, vocab_size=REAL)[:count]


def random_logits(count, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(size=(count, V)).astype(np.float32) * np.float32(scale)


def kept(logits, temperature, top_k, top_p, min_p):
    """The reference: which of a row's tokens may be drawn, by sorting, and their probabilities."""
    z = (logits.astype(np.float64) - logits.max()) / temperature
    weight = np.exp(z)
    keep = np.ones(len(z), bool)
    if 0 < top_k < len(z):
        keep &= logits >= np.sort(logits)[-top_k]
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        mass = np.cumsum(np.where(keep, weight, 0)[order])
        last = order[np.searchsorted(mass, top_p * mass[-1])]
        keep &= logits >= logits[last]
    keep &= weight >= min_p
    return keep, np.where(keep, weight, 0) / np.where(keep, weight, 0).sum()


def draws(logits, count=4096, **settings_):
    """Tokens of one row of logits at many positions."""
    out = []
    for start in range(0, count, 512):
        r = rows(512, position=np.arange(start, start + 512), **settings_)
        out.append(np.asarray(run(jnp.broadcast_to(jnp.asarray(logits), (512, V)), r)))
    return np.concatenate(out)


def test_greedy_takes_the_first_of_the_largest_and_no_padding():
    logits = random_logits(4)
    logits[:, REAL:] = 100
    logits[1, [40, 30, 270]] = 50
    logits[2] = 0
    logits[3] = -np.inf
    expected = [int(np.argmax(logits[0, :REAL])), 30, 0, 0]
    assert run(logits, rows(4, temperature=0.0)).tolist() == expected
    assert run(logits, rows(4, temperature=[0, 0, 0, 1])).tolist() == expected


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_distribution(setting):
    logits = random_logits(1, scale=1.5)[0]
    tokens = draws(logits, **setting)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | setting
    keep, probability = kept(logits[:REAL], **values)
    counts = np.bincount(tokens, minlength=REAL)
    assert not counts[~keep].any()
    # Pearson's statistic over the likely tokens, the others together as one.
    likely = probability * len(tokens) >= 10
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probability[likely], probability[~likely].sum()) * len(tokens)
    observed, expected = observed[expected > 1], expected[expected > 1]
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 4.0, 40.0]),
    grid=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 289, 290, 10_000]),
    top_p=st.sampled_from([1.0, 0.01, 0.3, 0.7, 0.95, 0.999]),
)
def test_kept_sets_equal_the_sorted_reference(seed, scale, grid, temperature, top_k, top_p):
    logits = random_logits(1, seed, scale)[0]
    if grid:  # many ties, -0 and both signs
        logits = np.round(logits * 2) / np.float32(2)
    keep, probability = kept(logits[:REAL], temperature, top_k, top_p, 0.0)
    tokens = np.asarray(
        run(jnp.broadcast_to(logits, (512, V)), rows(512, temperature=temperature, top_k=top_k, top_p=top_p))
    )
    smallest = logits[:REAL][keep].min()
    # A share within rounding of top_p may fall on either side.
    slack = 0 if top_p == 1 else 1e-5
    looser, _ = kept(logits[:REAL], temperature, top_k, min(top_p + slack, 1.0), 0.0)
    assert looser[tokens].all()
    if keep.sum() <= 3:
        likely = np.flatnonzero(probability > 0.05)
        assert set(likely) <= set(tokens.tolist())
        assert (logits[likely] >= smallest).all()


def test_a_row_does_not_depend_on_the_others():
    logits = random_logits(8)
    setting = {
        "temperature": [0, 1, 1, 1, 1, 0.7, 2, 1e-5], "top_k": [0, 0, 5, 0, 9, 0, 0, 0],
        "top_p": [1, 1, 1, 0.6, 0.9, 1, 0.5, 1], "min_p": [0, 0, 0, 0, 0, 0.1, 0, 0],
    }  # fmt: skip
    base = rows(8, position=np.arange(8) * 11, key=[(1, i) for i in range(8)], **setting)
    together = np.asarray(run(logits, base))
    for i in range(8):
        alone = Rows(*(jnp.broadcast_to(x[i], (512, *x.shape[1:])) for x in base))
        assert (np.asarray(run(np.broadcast_to(logits[i], (512, V)), alone)) == together[i]).all()
        single = Rows(*(x[i : i + 1] for x in base))  # another shape, another program
        assert jitted(logits[i : i + 1], single, vocab_size=REAL).tolist() == [together[i]]


def test_the_draw_is_a_function_of_key_and_position():
    logits = np.zeros((64, V), np.float32)
    first = run(logits, rows(64)).tolist()
    assert first == run(logits, rows(64)).tolist()
    assert first != run(logits, rows(64, position=np.arange(64) + 64)).tolist()
    assert first != run(logits, rows(64, key=(7, 10))).tolist() and first != run(logits, rows(64, key=(8, 9))).tolist()
    key = jax.random.wrap_key_data(jnp.array([7, 9], jnp.uint32))
    bits = [np.asarray(jax.random.bits(jax.random.fold_in(key, p), (V,)))[:REAL] for p in (0, 1)]
    assert first[:2] == [int(np.argmin(b)) for b in bits], "all equally likely: the smallest number wins"


def test_the_draw_hardly_depends_on_the_rounding_of_the_logits():
    """A replay computes the same logits in other shapes: of thousands of draws, not one may come out otherwise."""
    generator, width = np.random.default_rng(5), 20_000
    logits = generator.normal(size=(16, width)).astype(np.float32)
    moved = (logits * (1 + generator.normal(size=logits.shape) * 1e-5)).astype(np.float32)
    assert (moved != logits).any()
    differing = 0
    for step in range(128):
        settings = rows(16, position=np.arange(16) + 16 * step, temperature=0.8)
        drawn = [np.asarray(jitted(values, settings, vocab_size=width)) for values in (logits, moved)]
        differing += int((drawn[0] != drawn[1]).sum())
    assert differing == 0


@pytest.mark.parametrize("setting", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 1.0}, {"temperature": 0.0}], ids=str)
def test_extreme_logits_give_valid_tokens(setting):
    logits = np.zeros((8, V), np.float32)
    logits[1] = np.nan
    logits[2, ::2] = np.nan
    logits[3] = np.inf
    logits[4, 5] = np.inf
    logits[5] = -np.inf
    logits[6] = -np.inf
    logits[6, 77] = -3.0
    logits[7] = np.linspace(-3e38, 3e38, V)
    tokens = np.asarray(run(logits, rows(8, **setting)))
    assert ((tokens >= 0) & (tokens < REAL)).all()
    assert tokens[2] % 2 == 1 and tokens[4] == 5 and tokens[6] == 77 and tokens[7] == REAL - 1


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-42])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = random_logits(16)
    expected = np.argmax(logits[:, :REAL], axis=1)
    assert (np.asarray(run(logits, rows(16, temperature=temperature))) == expected).all()


def history():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, REAL, (3, 40)).astype(np.int32)
    tokens[:, :6] = tokens[:, 20:26]
    valid, is_output = rng.random((3, 40)) < 0.8, np.arange(40) >= 20
    tokens[~valid] = -5
    return tokens, valid, np.broadcast_to(is_output, (3, 40))


def test_count_tokens():
    tokens, valid, is_output = history()
    counts = count_tokens(jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(is_output), width=V)
    for r in range(3):
        assert (counts.output[r] == np.bincount(tokens[r][valid[r] & is_output[r]], minlength=V)).all()
        assert (counts.seen[r] == (np.bincount(tokens[r][valid[r]], minlength=V) > 0)).all()


def test_penalties_bias_and_mask_against_numpy():
    logits = random_logits(3)
    counts = count_tokens(*map(jnp.asarray, history()), width=V)
    repetition, frequency, presence = np.array([1.3, 1, 2]), np.array([0.5, 1, -0.2]), np.array([0.3, -1, 1.5])
    bias = Bias(
        jnp.array([0, 0, 1, 2, 3, 3]), jnp.array([4, 4, 8, 9, 0, 289]), jnp.array([2.0, 3, 40, -np.inf, 1e9, 1e9])
    )
    allowed = np.random.default_rng(5).random((3, 320)) < 0.7
    allowed[1, 8] = True
    mask = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    reference = np.where(allowed[:, :V], logits, -np.inf)
    reference[0, 4] += 5
    reference[1, 8] += 40
    reference[2, 9] = -np.inf
    seen, output = np.asarray(counts.seen), np.asarray(counts.output)
    repeated = np.where(reference > 0, reference / repetition[:, None], reference * repetition[:, None])
    reference = np.where(seen, repeated, reference) - frequency[:, None] * output - presence[:, None] * (output > 0)

    penalized = full_rows(rows(3, temperature=0.0), repetition=repetition, presence=presence, frequency=frequency)
    call = functools.partial(jitted_full, logits, vocab_size=REAL, num_logprobs=4, counts=counts, bias=bias, mask=mask)
    result = call(penalized)
    assert result.tokens.tolist() == np.argmax(reference[:, :REAL], axis=1).tolist()
    assert result.tokens[1] == 8
    # Drawn tokens follow the adjusted logits too: the top three of each row.
    third = np.sort(reference[:, :REAL], axis=1)[:, -3]
    for position in range(20):
        tokens = np.asarray(call(penalized._replace(rows=rows(3, top_k=3, position=position))).tokens)
        assert (reference[np.arange(3), tokens] >= third - 1e-4).all()
    # Log-probabilities are those of the logits as they came.
    raw = logits[:, :REAL] - np.log(np.exp(logits[:, :REAL].astype(np.float64)).sum(1, keepdims=True))
    order = np.argsort(-raw, axis=1)[:, :4]
    assert (np.asarray(result.top_tokens) == order).all()
    np.testing.assert_allclose(result.top_logprobs, np.take_along_axis(raw, order, 1), rtol=1e-5)
    chosen = np.asarray(result.tokens)
    np.testing.assert_allclose(result.logprobs, raw[np.arange(3), chosen], rtol=1e-5)
    assert result.ranks.tolist() == (1 + (raw > raw[np.arange(3), chosen][:, None]).sum(1)).tolist()


def test_targets_are_scored_and_neutral_settings_change_nothing():
    logits = random_logits(32)
    logits[31] = -np.inf
    base = rows(32, temperature=np.where(np.arange(32) % 2, 1.0, 0.0), top_p=0.9)
    target = np.where(np.arange(32) % 4 == 0, 17, -1)
    counts = count_tokens(jnp.zeros((32, 1), jnp.int32), jnp.ones((32, 1), bool), jnp.ones((32, 1), bool), width=V)
    result = jitted_full(logits, full_rows(base, target=target), vocab_size=REAL, counts=counts)
    assert result.tokens.tolist() == np.where(target >= 0, 17, np.asarray(run(logits, base))).tolist()
    assert result.top_tokens.shape == (32, 0) and (np.asarray(result.logprobs) < 0).all()
