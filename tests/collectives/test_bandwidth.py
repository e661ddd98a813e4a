"""Bandwidths are those of nccl-tests, and fits find what a time was made of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzanstein_jax.collectives import bus_factor, fit_alpha_beta
from ryzanstein_jax.collectives.bandwidth import OPERATIONS, first_values, repeated
from ryzanstein_jax.errors import ConfigError


def test_bus_factors_are_those_of_nccl_tests():
    # doc/PERFORMANCE.md's summary, for 8 ranks
    factors = {name: bus_factor(name, 8) for name in OPERATIONS}
    assert factors == {
        "all-reduce": 14 / 8,
        "all-gather": 7 / 8,
        "reduce-scatter": 7 / 8,
        "all-to-all": 7 / 8,
        "broadcast": 1.0,
        "send-recv": 1.0,
    }
    with pytest.raises(ConfigError, match="gossip"):
        bus_factor("gossip", 8)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-7, 1e-2), st.floats(1e-13, 1e-8))
def test_a_fit_finds_the_line_that_times_came_from(alpha, beta):
    sizes = [1024 * 4**i for i in range(10)]
    fit = fit_alpha_beta(sizes, [alpha + beta * size for size in sizes])
    assert fit.error < 1e-6
    assert fit.seconds(1 << 20) == pytest.approx(alpha + beta * (1 << 20), rel=1e-6)


def test_a_fit_weighs_small_sizes_like_large_ones():
    sizes = [1 << 10, 1 << 20, 1 << 30]
    times = [10e-6 * 1.1, 20e-6, (10e-6 + 1e-11 * (1 << 30)) * 0.9]
    assert fit_alpha_beta(sizes, times).alpha == pytest.approx(10e-6, rel=0.25)


def test_a_fit_is_never_negative():
    falling = fit_alpha_beta([1, 1000], [2.0, 1.0])
    steep = fit_alpha_beta([1, 2, 1000], [1e-6, 1.0, 500.0])
    assert (falling.beta, steep.alpha) == (0.0, 0.0)
    assert falling.alpha > 0 < steep.beta


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [([], []), ([1], [1]), ([8, 8], [1, 2]), ([1, 2], [1]), ([1, 2], [0, 1]), ([1, 2], [1, np.nan]), ([-1, 2], [1, 1])],
)
def test_a_fit_of_too_little_or_nonsense_is_refused(sizes, seconds):
    with pytest.raises(ConfigError):
        fit_alpha_beta(sizes, seconds)


def test_what_devices_hold_after_each_collective():
    state = first_values(range(3), 3, np.arange(2), 2)
    everyone = {name: repeated(name, state, 1) for name in OPERATIONS}
    np.testing.assert_array_equal(everyone["all-reduce"], np.broadcast_to(state.sum(0), state.shape))
    np.testing.assert_array_equal(everyone["all-gather"][2], state[:, 0])
    np.testing.assert_array_equal(everyone["reduce-scatter"][1, 0], state[:, 1].sum(0))
    np.testing.assert_array_equal(everyone["reduce-scatter"][1, 1:], state[1, 1:])
    np.testing.assert_array_equal(everyone["all-to-all"][0, 2], state[2, 0])
    np.testing.assert_array_equal(everyone["broadcast"][2], state[0])
    np.testing.assert_array_equal(everyone["send-recv"], state[[2, 0, 1]])
    np.testing.assert_array_equal(repeated("send-recv", state, 3), state)
    assert len(np.unique(state)) > 3, "a check of equal values would find nothing"
