"""Quantized models end to end: close to float32 at every width, two all-reduces a layer, refusals, memory."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.config import QUANTIZATIONS as NAMES
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.local import snapshot_model
from ryzanstein_jax.engine.open import open_model
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.memory import footprint, weight_bytes
from ryzanstein_jax.model.quantization import LINEAR, QUANTIZATIONS, Quantization
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.sharding import Collective, collectives
from tests.support import (
    FAMILIES,
    GOLDEN,
    QUICK,
    golden_expected,
    golden_logits,
    golden_spec,
    make_programs,
    open_engine,
    quick_compiles,
    serve,
    tokens_of,
)

INT8 = QUANTIZATIONS["int8"]
BUCKET = Bucket(decodes=1, prefill_tokens=40, prefills=1, rows=41)
#: Root of the mean square of what a precision changes in a token's logits, over that of the logits. The golden models
#: are random and narrow, so less averages out than in a trained model (docs/quantization.md has one).
TOLERANCE = {"int8": 0.05, "int4": 0.5, "fp8": 0.15}


def distance(got, wanted):
    """Of the median token: where two experts are nearly as good as each other, rounding may choose the other one."""
    return float(np.median(np.sqrt(np.mean((got - wanted) ** 2, axis=1) / np.mean(wanted**2, axis=1))))


@pytest.mark.parametrize(
    ("name", "family", "widths"),
    [
        *(("int8", family, (1, 2, 8)) for family in ("smollm2", "phi3", "gemma2", "qwen3_moe", "olmo2")),
        ("int4", "smollm2", (1, 3)),
        ("int4", "qwen3_moe", (1, 8)),
        ("fp8", "smollm2", (1, 3)),
    ],
)
def test_logits_are_close_to_those_of_float32_at_every_width(name, family, widths):
    spec = golden_spec(family).replace(quantization=QUANTIZATIONS[name])
    programs = [make_programs(spec, width, BUCKET) for width in widths]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: golden_logits(one, family), programs))
    expected = golden_expected(family)[1][:41]
    for got in found:
        assert 1e-4 < distance(got, expected) < TOLERANCE[name], "quantized, and not by much"
    for got in found[1:]:  # the same weights; parts of a token have scales of their own
        assert distance(got, found[0]) < TOLERANCE["int8"] / 2


@pytest.mark.parametrize(("family", "width"), [("llama", 2), ("smollm2", 8), ("mixtral", 4)])
@pytest.mark.parametrize(
    ("dtype", "name"), [("float32", "int8"), ("bfloat16", "int8"), ("float32", "int4"), ("float32", "fp8")]
)
def test_two_all_reduces_a_layer(family, width, dtype, name):
    """As without quantization: scales of activations cost no collective, nor does looking int8 embeddings up."""
    spec = golden_spec(family).replace(quantization=QUANTIZATIONS[name])
    programs = make_programs(spec, width, BUCKET, dtype=dtype)
    found = collectives(programs.lower_forward(BUCKET).compile(compiler_options=QUICK))
    assert {(one.kind, one.group) for one in found} == {("all-reduce", width)}
    assert sum(one.count for one in found) == 2 * spec.num_layers + 1
    if dtype == "float32":
        assert found == [Collective("all-reduce", BUCKET.tokens * spec.hidden_size * 4, width, 2 * spec.num_layers + 1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "quantization",
    [
        *QUANTIZATIONS.values(), Quantization("int8", LINEAR), Quantization("int8", ("down",)),
        Quantization("int4", LINEAR, group=16, zeros=True), Quantization("int4", LINEAR, zeros=True),
        Quantization("fp8", LINEAR, group=128),
    ],
    ids=lambda one: f"{one.name}-{one.group}-{len(one.roles)}",
)  # fmt: skip
def test_the_sum_without_jax_is_that_of_the_arrays(family, quantization):
    for width in (1, 3, 8):
        for dtype in ("float32", "bfloat16"):
            spec = golden_spec(family).replace(quantization=quantization)
            programs = make_programs(spec, width, BUCKET, dtype=dtype)
            counted = programs.sizes.weight_bytes_per_device(spec, jnp.dtype(dtype).itemsize)
            assert counted == weight_bytes(programs.param_shapes)
        if quantization in QUANTIZATIONS.values():
            counted = programs.sizes.weight_bytes_per_device(spec, 4)
            assert vars(footprint(spec, width))[f"{quantization.name}_bytes"] == counted
            assert footprint(spec, width) == footprint(spec.replace(quantization=None), width)


@pytest.mark.parametrize("name", ["int2", "fp4", "awq", "", 8, True, ["int8"]])
def test_other_names_are_refused_with_those_that_are_known(name):
    with pytest.raises(ConfigError, match=rf"^quantization=.* is invalid: use one of {', '.join(NAMES)}$"):
        EngineConfig("m", quantization=name)
    assert set(NAMES) == set(QUANTIZATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_runs_it_and_a_snapshot_remembers(name, tmp_path):
    prompt = golden_expected("smollm2")[2].tolist()
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    config = EngineConfig(str(GOLDEN / "smollm2"), quantization=name, tensor_parallel_size=2, compilation_cache_dir="")
    folder = snapshot_model(config, tmp_path / name)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "ryzanstein_jax"
    assert open_model(EngineConfig(str(folder))).spec.quantization == QUANTIZATIONS[name]
    found = []
    for model, settings in ((GOLDEN / "smollm2", {"quantization": name}), (folder, {})):
        with quick_compiles():
            engine, executor = open_engine(model, **settings)
        found.append(tokens_of(serve(engine, {"a": (prompt, greedy)})))
        assert executor.report.memory.weights == vars(footprint(executor.spec, 1))[f"{name}_bytes"]
        assert executor.report.load["bytes_on_devices"] == executor.report.memory.weights
        engine.close()
    assert found[0] == found[1]
