"""The memory plan: the sum adds up, and what a refusal advises does fit."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.budget import resolve_dtype, resolve_kv_dtype
from ryzanstein_jax.config import DTYPES
from ryzanstein_jax.errors import MemoryBudgetError
from ryzanstein_jax.kv_cache import bytes_per_page
from ryzanstein_jax.memory import MemoryPlan, device_bytes, footprint, host_peak_bytes, plan_memory, weight_bytes
from ryzanstein_jax.sharding import PaddedSizes
from tests.support import FAMILIES, golden_spec, make_programs

MIB = 1 << 20
SPEC = golden_spec("llama").replace(max_position_embeddings=4096)
F32 = jnp.dtype("float32")


def planned(width: int = 1, **settings: object) -> MemoryPlan:
    values = dict(
        spec=SPEC, sizes=PaddedSizes.of(SPEC, width), dtype=F32, total=1000 * MIB, memory_fraction=0.5,
        weights=100 * MIB, temporaries=20 * MIB, logits=5 * MIB, page_size=16, max_model_len=1024, max_num_seqs=4,
    )  # fmt: skip
    return plan_memory(**{**values, **settings})


@given(
    st.integers(0, 400 * MIB), st.integers(1, 2000), st.sampled_from([1, 2, 8]), st.sampled_from([1, 16, 64]),
    st.floats(0.05, 1.0),
)  # fmt: skip
def test_the_sum_stays_within_the_budget(weights, max_num_seqs, width, page_size, fraction):
    settings = dict(
        weights=weights, max_num_seqs=max_num_seqs, width=width, page_size=page_size, memory_fraction=fraction
    )
    try:
        plan = planned(**settings)
    except MemoryBudgetError:
        assert weights + 25 * MIB + (1024 // page_size + 1) * page_bytes(width, page_size) > 1000 * MIB * fraction - 1
        return
    assert plan.weights + plan.temporaries + plan.logits + plan.kv_cache <= plan.budget == int(1000 * MIB * fraction)
    most = max_num_seqs * 1024 // page_size + 1
    assert 1024 // page_size + 1 <= plan.num_pages <= most
    if plan.num_pages < most:  # not one page more would have fitted
        assert plan.weights + plan.temporaries + plan.logits + plan.kv_cache + plan.page_bytes > plan.budget
    assert plan.num_tokens == (plan.num_pages - 1) * page_size


def page_bytes(width: int, page_size: int) -> int:
    return bytes_per_page(SPEC, PaddedSizes.of(SPEC, width), page_size, F32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "cache"), [(1, "auto"), (4, "auto"), (1, "int8"), (4, "fp8")])
def test_bytes_are_those_of_the_arrays(family, width, cache):
    programs = make_programs(
        golden_spec(family), width, Bucket(1, 0, 0, 1), num_pages=10, page_size=8, kv_cache_dtype=cache
    )

    def local_bytes(shapes):
        return sum(
            jnp.dtype(s.dtype).itemsize * jnp.zeros(s.sharding.shard_shape(s.shape), jnp.int8).size
            for s in jax.tree.leaves(shapes)
        )

    spec, sizes = programs.spec, programs.sizes
    page = bytes_per_page(spec, sizes, 8, resolve_kv_dtype(cache, F32))
    assert 10 * page == local_bytes(programs.cache_shapes)
    assert weight_bytes(programs.param_shapes) == local_bytes(programs.param_shapes)
    print_of_width = footprint(spec, width)
    assert 4 * print_of_width.weights == weight_bytes(programs.param_shapes)
    if cache != "auto":
        assert page == 8 * (print_of_width.kv_8bit_bytes + 4)
    assert print_of_width.padding >= 0
    if width == 1:
        assert print_of_width.weights == spec.num_parameters() and print_of_width.padding == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_without_jax_is_that_of_the_arrays(family):
    """The leader counts with a formula, the ranks with the arrays' shapes: they have to agree to the byte."""
    spec = golden_spec(family)
    variants = [spec, spec.replace(qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=not spec.tie_embeddings)]
    for variant in variants:
        for width in range(1, 9):
            sizes, truth = PaddedSizes.of(variant, width), footprint(variant, width)
            assert sizes.parameters_per_device(variant) == truth.weights
            for dtype in (F32, jnp.dtype("bfloat16")):
                page = sizes.page_bytes(variant, 16, dtype.itemsize)
                assert page == 16 * (truth.kv_values * dtype.itemsize + 4)


def test_fewer_bits_make_more_pages_and_are_advised_where_they_help():
    spec = SPEC.replace(head_dim=64)
    counts = {}
    for cache in ("auto", "int8", "fp8"):
        plan = planned(spec=spec, max_num_seqs=10**6, kv_cache_dtype=cache)
        counts[cache] = plan.num_pages
        assert plan.kv_cache <= plan.budget - 125 * MIB < plan.kv_cache + plan.page_bytes
    # 4 x 64 bytes of a vector become 64 and a scale's 4.
    assert counts["int8"] == counts["fp8"] == pytest.approx(counts["auto"] * 256 / 68, rel=0.01)
    long = dict(spec=spec, max_model_len=2 * counts["auto"] * 16)
    with pytest.raises(MemoryBudgetError, match=r'or less, kv_cache_dtype="int8", a larger'):
        planned(**long)
    assert planned(**long, kv_cache_dtype="int8").num_pages > 2 * counts["auto"]
    for useless in (dict(long, max_model_len=9 * counts["auto"] * 16), dict(long, num_pages=40)):
        with pytest.raises(MemoryBudgetError, match="or less, a larger memory_fraction"):
            planned(**useless)


def test_dtypes_are_those_of_jax():
    for name in DTYPES[1:]:
        assert resolve_dtype(name, "float32", "gpu") == jnp.dtype(name)
    assert resolve_dtype("auto", "bfloat16", "gpu") == jnp.bfloat16
    assert resolve_dtype("auto", "bfloat16", "cpu") == F32
    assert resolve_kv_dtype("auto", F32) == F32
    assert resolve_kv_dtype("int8", F32) == jnp.int8 and resolve_kv_dtype("fp8", F32) == jnp.uint8


def test_an_exact_number_of_pages():
    assert planned(num_pages=300).num_pages == 300
    with pytest.raises(MemoryBudgetError, match="num_pages=1000000 takes") as refused:
        planned(num_pages=1_000_000)
    advised = int(re.search(r"Use num_pages=(\d+)", str(refused.value))[1])
    assert planned(num_pages=advised).num_pages == advised
    with pytest.raises(MemoryBudgetError):
        planned(num_pages=advised + 1)


def test_too_long_a_model_length():
    with pytest.raises(MemoryBudgetError, match="max_model_len=1024 needs 65 pages") as refused:
        planned(num_pages=40)
    advised = int(re.search(r"Use max_model_len=(\d+)", str(refused.value))[1])
    assert planned(num_pages=40, max_model_len=advised).num_pages == 40
    with pytest.raises(MemoryBudgetError):
        planned(num_pages=40, max_model_len=advised + 1)


def test_weights_too_big_for_one_device_but_not_for_several():
    big = SPEC.replace(vocab_size=2_000_000, hidden_size=64)  # 1 GB of weights
    weights = 4 * big.num_parameters()
    with pytest.raises(MemoryBudgetError, match=r"does not fit: .*MiB weights.*budget of 500\.0 MiB") as refused:
        planned(spec=big, weights=weights)
    width = int(re.search(r"Use tensor_parallel_size=(\d+)", str(refused.value))[1])
    assert width == 4
    assert planned(spec=big, weights=weights // width, width=width).weights == weights // width


def test_weights_too_big_for_the_share_but_not_for_the_device():
    with pytest.raises(MemoryBudgetError, match="Use ") as refused:
        planned(weights=50 * MIB, memory_fraction=0.05)
    if advice := re.search(r"Use memory_fraction=([0-9.]+)", str(refused.value)):
        assert planned(weights=50 * MIB, memory_fraction=float(advice[1])).num_pages > 64


def test_the_text_holds_the_sum():
    text = str(planned(num_pages=300))
    for part in ("100.0 MiB weights", "20.0 MiB temporaries", "5.0 MiB logits", "300 pages, 4784 tokens", "500.0 MiB"):
        assert part in text


def test_device_memory():
    cpu = jax.devices("cpu")[0]
    assert 0 < device_bytes(8, cpu) <= device_bytes(1, cpu) // 8 + 1
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 123 * MIB})
    assert device_bytes(8, gpu) == 123 * MIB
    assert host_peak_bytes() > 10 * MIB
