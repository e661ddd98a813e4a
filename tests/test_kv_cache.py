"""A KV cache of 8 bits: what rounding keeps, logits at every width, engines, programs of their own, killed ranks."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ryzanstein_jax import AsyncLLM
from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.cli import app
from ryzanstein_jax.config import KV_CACHE_DTYPES, EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.kv_cache import floats, quantize, write
from ryzanstein_jax.model.quantization import QUANTIZATIONS
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.sharding import collectives
from tests.faults import harness
from tests.faults.harness import (
    MODEL,
    OPTIONS,
    SETTINGS,
    Watch,
    events,
    kill,
    nothing_left_behind,
    requests,
    run_streams,
    same,
)
from tests.server.model import tiny_model
from tests.support import (
    GOLDEN,
    golden_expected,
    golden_logits,
    golden_spec,
    make_programs,
    open_engine,
    quick_compiles,
    serve,
    tokens_of,
)

FLOAT8 = jnp.dtype("float8_e4m3fn")
#: Half a step of what is largest in a vector, and for float8 half a step of each number itself, as shares.
ROUNDING = {"int8": (0.5 / 127, 0.0), "uint8": (0.5 / 448 / 2**9, 2.0**-4)}
BUCKET = Bucket(decodes=1, prefill_tokens=40, prefills=1, rows=41)


@settings(deadline=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=4, max_size=4), st.sampled_from(list(ROUNDING)),
    st.sampled_from([1e-30, 1.0, 1e-3]),
)  # fmt: skip
def test_a_vector_keeps_its_largest_number_and_the_rest_within_half_a_step(numbers, dtype, factor):
    x = np.asarray([[numbers]], np.float32) * np.float32(factor)
    found, scales = quantize(jnp.asarray(x), jnp.dtype(dtype))
    back = np.asarray(floats(found, jnp.float32)) * np.asarray(scales)
    largest = np.abs(x).max()
    assert np.isfinite(back).all()
    if largest < 1e-30:  # what processors take for zero may be zero
        return
    absolute, relative = ROUNDING[dtype]
    assert (np.abs(back - x) <= absolute * largest + relative * np.abs(x) + 1e-6 * largest).all()
    np.testing.assert_allclose(np.abs(back).max(), largest, rtol=1e-6)


def test_all_numbers_of_8_bits_are_read_exactly():
    every = np.arange(256, dtype=np.uint8)
    for dtype in ("float32", "bfloat16", "float16"):
        for stored, numbers in ((every.view(np.int8),) * 2, (every, every.view(FLOAT8))):
            real = np.isfinite(numbers.astype(np.float32))
            found = jax.jit(floats, static_argnums=1)(jnp.asarray(stored), jnp.dtype(dtype))
            assert found.dtype == dtype
            np.testing.assert_array_equal(
                np.asarray(found, np.float32)[real], numbers[real].astype(dtype).astype(np.float32)
            )


def test_what_is_no_number_harms_its_own_vector_only():
    programs = make_programs(golden_spec("llama"), 1, BUCKET, kv_cache_dtype="int8")
    pages = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), programs.cache_shapes).keys[0]
    slots, head_dim = pages.shape[1], pages.shape[3]
    new = np.ones((3, slots, head_dim), np.float32)
    new[1, 0, 0], new[2] = np.nan, 0.0
    pages = write(pages, jnp.asarray(new), jnp.asarray([4, 5, 6]))
    kept = np.asarray(pages.numbers[1], np.float32) * np.asarray(pages.scales[1])[..., None]
    assert np.isnan(kept[0, 1]).all(), "a broken key or value stays one"
    np.testing.assert_allclose(kept[:, 0], 1.0, rtol=1e-6)
    assert not kept[:, 2:].any() and np.isfinite(kept[1:]).all()


def distance(got, wanted):
    """Of the median token: where two experts are nearly as good as each other, rounding may choose the other one."""
    return float(np.median(np.sqrt(np.mean((got - wanted) ** 2, axis=1) / np.mean(wanted**2, axis=1))))


@pytest.mark.parametrize(
    ("family", "cache", "widths", "most"),
    [
        ("smollm2", "int8", (1, 2, 8), 0.02), ("smollm2", "fp8", (1, 3), 0.08), ("gemma2", "int8", (1, 4), 0.02),
    ],
)  # fmt: skip
def test_logits_are_close_to_those_of_a_float_cache_and_equal_at_every_width(family, cache, widths, most):
    spec = golden_spec(family)
    programs = [make_programs(spec, width, BUCKET, kv_cache_dtype=cache) for width in widths]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: golden_logits(one, family, (24, 16)), programs))
    expected = golden_expected(family)[1][:41]
    assert 1e-4 < distance(found[0], expected) < most, "rounded, and not by much"
    for got in found[1:]:  # a head has its scales wherever it lies; sums in another order may round a number otherwise
        assert distance(got, found[0]) < distance(found[0], expected) / 3
    for one in programs:
        reduces = sum(each.count for each in collectives(one.forwards[BUCKET]))
        assert reduces == (0 if one.mesh.size == 1 else 2 * spec.num_layers + 1), "scales are exchanged by nobody"


def test_an_engine_gives_the_same_tokens_with_cached_prefixes_and_preempted():
    """On int8 weights in bfloat16: a quantized cache goes with all of that."""
    config = dict(dtype="bfloat16", quantization="int8", max_model_len=64, page_size=4, max_num_seqs=3)
    prompt = golden_expected("smollm2")[2].tolist()
    asked = {
        str(number): (prompt[: 12 + 8 * number], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        for number in range(3)
    }
    with quick_compiles():
        engine, executor = open_engine(GOLDEN / "smollm2", tensor_parallel_size=2, kv_cache_dtype="int8", **config)
    assert "bfloat16, KV cache in int8;" in str(executor.report)
    memory, spec = executor.report.memory, executor.spec
    # 3 KV heads on two devices: two slots on each, their keys and values in 8 bits with a scale, and the ids.
    assert memory.page_bytes == 4 * (2 * spec.num_layers * 2 * (spec.head_dim + 4) + 4)
    device = executor.mesh.devices.flat[0]
    parts = (part for array in jax.tree.leaves(executor._runner._cache) for part in array.addressable_shards)
    assert sum(part.data.nbytes for part in parts if part.device == device) == memory.kv_cache
    first = tokens_of(serve(engine, asked))
    again = tokens_of(serve(engine, asked))
    assert engine.stats().num_prefix_hits > 0
    executor.limits = dataclasses.replace(executor.limits, num_pages=18)
    tight = Engine(executor, eos_token_ids=(), config=EngineConfig("m"))
    squeezed = tokens_of(serve(tight, asked))
    assert tight.stats().num_preemptions > 0
    assert first == again == squeezed
    engine.close()


def test_its_programs_are_found_under_keys_of_their_own():
    spec = golden_spec("llama")
    made = [make_programs(spec, 1, BUCKET, kv_cache_dtype=cache) for cache in KV_CACHE_DTYPES]
    for kind, size in (("forward", BUCKET), ("cache", 0)):
        assert len({one._key(kind, size) for one in made}) == len(made)


def test_streams_outlive_a_killed_rank(tmp_path, monkeypatch):
    """With the tokens of an undisturbed run: what is replayed is rounded as it was."""
    few = requests()[1:4]
    monkeypatch.setattr(harness, "requests", lambda: few)
    settings = SETTINGS | {"max_num_seqs": 2, "max_num_batched_tokens": 16}  # few programs
    with nothing_left_behind(tmp_path):
        options = {**OPTIONS, "log_dir": str(tmp_path)}
        llm = AsyncLLM(MODEL, executor="processes", orchestrator=options, kv_cache_dtype="fp8", **settings)
        try:
            expected = run_streams(llm)
            watch = Watch(30, lambda: kill(llm, 1))
            found = run_streams(llm, watch)
            assert watch.done and events(llm, "recovered")[-1]["requests"] > 0
            assert llm.report.kv_cache_dtype == "fp8"
        finally:
            llm.close()
    same(found, expected)


def test_names():
    assert EngineConfig("m").kv_cache_dtype == "auto"
    assert EngineConfig("m", kv_cache_dtype="fp8_e4m3") == EngineConfig("m", kv_cache_dtype="fp8")
    for wrong in ("", "fp8_e5m2", "int4", "bfloat16", None, 8, ["int8"]):
        with pytest.raises(ConfigError, match=r"^kv_cache_dtype=.* is invalid: use one of auto, int8, fp8$") as refused:
            EngineConfig("m", kv_cache_dtype=wrong)
        assert refused.value.field == "kv_cache_dtype"
    assert set(KV_CACHE_DTYPES) - {"auto"} < set(QUANTIZATIONS)


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "batch", "plan"])
def test_a_wrong_name_on_the_command_line_is_refused(command, tmp_path):
    more = {
        "generate": ["-p", "x"], "batch": [str(tmp_path / "in"), "-o", str(tmp_path / "out")],
        "plan": ["--device", "h100"],
    }  # fmt: skip
    arguments = [command, str(GOLDEN / "smollm2"), *more.get(command, []), "--kv-cache-dtype", "int2"]
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, ConfigError) and refused.field == "kv_cache_dtype", refused


def test_the_command_line_takes_it(tmp_path):
    small = ["--max-model-len", "64", "--max-num-seqs", "1", "-n", "4", "--temperature", "0"]
    arguments = ["generate", str(tiny_model(tmp_path)), "-p", "x", "--kv-cache-dtype", "fp8", *small]
    with quick_compiles():
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "KV cache in fp8" in done.output, done.output
