"""The kernel for GPUs, interpreted: the same numbers as the portable path, over ragged plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax.attention import TILE, attend, attend_by_kernel
from ryzanstein_jax.batch import Bucket, StepLayout, attention_plan
from tests.support import make_plan

PAGE, LONGEST = 16, 512
#: Decode tokens by position, and prompt chunks by (first position, length).
STEPS = {
    "decodes": ([0, 511, 63, 64, 200], []),
    "chunks": ([], [(0, 5), (60, 70), (400, 100)]),
    "both": ([37, 250], [(0, TILE), (63, TILE + 1), (129, 1)]),
}


def run(step, *, slots, queries, head_dim, dtype=np.float32, window=None, softcap=None):
    """What the kernel and the portable path give for the step's tokens, and the tokens that are no padding."""
    decodes, chunks = step
    bucket = Bucket(8 if decodes else 0, 192 if chunks else 0, 4 if chunks else 0, 200)
    layout = StepLayout(bucket, PAGE, LONGEST // PAGE)
    rng = np.random.default_rng(len(decodes))
    count, width = len(decodes) + len(chunks), LONGEST // PAGE
    tables = rng.permutation(np.arange(1, 1 + count * width)).reshape(count, width)
    tokens = np.zeros(LONGEST, np.int32)
    plan = make_plan(
        [(tokens, tables[row], position) for row, position in enumerate(decodes)],
        [(tokens, tables[len(decodes) + row], begin, begin + size) for row, (begin, size) in enumerate(chunks)],
    )
    cache = (1 + count * width, slots, PAGE, head_dim)
    keys, values = (jnp.asarray(rng.standard_normal(cache), dtype) for _ in range(2))
    # Of a page that nobody owns, nothing may come through.
    keys, values = keys.at[0].set(jnp.nan), values.at[0].set(jnp.nan)
    q = jnp.asarray(rng.standard_normal((bucket.tokens, slots, queries, head_dim)), dtype)
    k, v = (jnp.asarray(rng.standard_normal((bucket.tokens, slots, head_dim)), dtype) for _ in range(2))

    def both(flat, q, k, v, keys, values):
        fields = attention_plan(layout.unpack(flat))
        settings = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
        out, keys, values = attend(q, k, v, keys.at[0].set(0), values.at[0].set(0), fields, **settings)
        # The pages as the portable path left them, but for the one that padding was written to.
        keys, values = keys.at[0].set(jnp.nan), values.at[0].set(jnp.nan)
        return attend_by_kernel(q, keys, values, fields, **settings, interpret=True), out

    found, wanted = jax.jit(both)(layout.pack(plan), q, k, v, keys, values)
    d, c = plan.num_decodes, plan.num_prefill_tokens
    real = [*range(d), *range(bucket.decodes, bucket.decodes + c)]
    return np.asarray(found, np.float32), np.asarray(wanted, np.float32), real


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("slots", "queries", "head_dim", "window", "softcap"),
    [(2, 4, 16, None, None), (1, 3, 32, 40, None), (2, 1, 16, None, 4.0), (1, 8, 16, 100, 30.0)],
)
def test_as_the_portable_path(step, slots, queries, head_dim, window, softcap):
    found, wanted, real = run(
        STEPS[step], slots=slots, queries=queries, head_dim=head_dim, window=window, softcap=softcap
    )
    np.testing.assert_allclose(found[real], wanted[real], atol=2e-5)
    padding = np.delete(found, real, axis=0)
    assert len(padding) and not padding.any(), "of padding the results are zero, whatever lies in page 0"
