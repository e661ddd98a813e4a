"""RMSNorm by a kernel: the same numbers as numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax import native
from ryzanstein_jax.native import calls
from ryzanstein_jax.sharding import make_mesh
from tests.native.processors import PROCESSORS, on


@pytest.mark.parametrize("lanes", PROCESSORS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 64), (8, 576), (9, 80), (5, 2, 3, 64)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_numpy(dtype, shape, offset, lanes):
    rng = np.random.default_rng(len(shape))
    x = jnp.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, (*shape[:-1], 1)), dtype)
    x = x.at[-1].set(0)
    scale = jnp.asarray(rng.standard_normal(shape[-1]), dtype)
    with on(lanes), jax.set_mesh(make_mesh(1)):
        y = jax.jit(lambda x, scale: calls.norm(x, scale, 1e-5, offset))(x, scale)
    assert y.dtype == dtype and y.shape == shape and not np.asarray(y[-1]).any()
    wide = np.asarray(x, np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * (np.asarray(scale, np.float64) + offset)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2e-6 if dtype == "float32" else 2**-8, atol=1e-7)


def test_nan_stays_in_its_row():
    x = jnp.ones((10, 64)).at[3, 5].set(jnp.nan)
    with jax.set_mesh(make_mesh(1)):
        y = np.asarray(calls.norm(x, jnp.ones(64), 1e-5, 0.0))
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all()


def test_what_it_does_not_take(monkeypatch):
    x, scale = jnp.ones((2, 64)), jnp.ones(64)
    assert calls.norm(x, scale, 1e-5, 0.0) is None, "no mesh: nobody says that it is for a CPU"
    with jax.set_mesh(make_mesh(2)):
        assert calls.norm(x, scale, 1e-5, 0.0) is None
    with jax.set_mesh(make_mesh(1)):
        assert calls.norm(x, scale.astype("bfloat16"), 1e-5, 0.0) is None
        assert calls.norm(x[:, :63], scale[:63], 1e-5, 0.0) is None
        assert calls.norm(x[:0], scale, 1e-5, 0.0) is None
        monkeypatch.setenv(native.KERNELS_VARIABLE, "portable")
        assert calls.norm(x, scale, 1e-5, 0.0) is None
