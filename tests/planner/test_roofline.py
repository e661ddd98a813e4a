"""What a step moves, computes and sends, by hand, on a model of small round sizes."""

import dataclasses

import pytest

from ryzanstein_jax.communication import Collective
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.model.quantization import QUANTIZATIONS
from ryzanstein_jax.model.sizes import PaddedSizes
from ryzanstein_jax.planner.devices import DEVICES, Costs, Device, Link
from ryzanstein_jax.planner.roofline import (
    Step,
    StepTime,
    cost_units,
    predict,
    sampler_collectives,
    step_collectives,
    step_parts,
)
from tests.support import golden_spec

#: 2 layers of 100 features, 4 heads of 25 with 2 KV heads, 60 in the MLP, 80 tokens.
SPEC = spec_from_config(
    {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 80, "hidden_size": 100,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 26,
        "intermediate_size": 60, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }
)  # fmt: skip
#: Of one layer: q, k, v and o, the MLP and two norms.
LAYER = 100 * (4 + 2 + 2) * 26 + 4 * 26 * 100 + 3 * 100 * 60 + 2 * 100
SIMPLE = Device(
    "simple", "simple", 1 << 30, 100.0, {"float32": 1000.0}, Link(10, 10, start=1, hop=0), host_seconds=0,
    memory_share=1.0, compute_share=1.0,
)  # fmt: skip


def test_parts_by_hand():
    parts = step_parts(SPEC, PaddedSizes.of(SPEC, 1), Step(decodes=3, context=40), 4)
    assert parts["linear"].operations == 2 * 3 * 2 * LAYER
    # Weights, and beside them a little for each token's activations and its row of the embedding.
    least = 4 * 2 * LAYER
    assert least < parts["linear"].bytes < 1.5 * least
    # 3 x 40 positions of keys and values in 2 layers are read, 3 written: 2 heads of 26 values of 4 bytes.
    assert parts["attention"].bytes == 2 * 2 * (3 * 40 + 3) * 2 * 26 * 4
    # Scores and sums: 4 operations for each query head, position and feature.
    assert parts["attention"].operations == 2 * 4 * 3 * 40 * 4 * 26
    assert parts["head"].operations == 2 * 3 * 80 * 100
    assert parts["head"].bytes == 4 * 80 * 100 + 4 * 3 * 4 * 80


def test_a_prompt_attends_to_what_is_before_it():
    parts = step_parts(SPEC, PaddedSizes.of(SPEC, 1), Step(prefill=10, before=20), 4)
    attended = sum(20 + i + 1 for i in range(10))
    assert parts["attention"].operations == pytest.approx(2 * 4 * attended * 4 * 26)
    assert parts["head"].operations == 2 * 1 * 80 * 100  # the last token's logits only


def test_a_window_bounds_what_is_read():
    windowed = SPEC.replace(layers=tuple(type(SPEC.layers[0])(window=16) for _ in range(2)))
    sizes = PaddedSizes.of(SPEC, 1)
    read = step_parts(windowed, sizes, Step(decodes=1, context=400), 4)["attention"].bytes
    assert read == 2 * 2 * (16 + 1) * 2 * 26 * 4


def test_a_cache_of_8_bits_is_read_with_its_scales():
    sizes, step = PaddedSizes.of(SPEC, 1), Step(decodes=3, context=40)
    plain = step_parts(SPEC, sizes, step, 4)
    for cache in ("int8", "fp8"):
        parts = step_parts(SPEC, sizes, step, 4, cache)
        assert parts["attention"].bytes == 2 * 2 * (3 * 40 + 3) * 2 * (26 + 4)
        assert parts | {"attention": plain["attention"]} == plain
        slow = SIMPLE.shares(1e-3, 1.0)  # so that memory is what attention waits for
        times = [predict(SPEC, slow, step, dtype="float32", kv_cache_dtype=name).kv for name in ("auto", cache)]
        assert times[0] == pytest.approx(times[1] * 26 * 4 / (26 + 4))


@pytest.mark.parametrize(("name", "layer", "table"), [
    # A byte and 4 bytes a scale for each output: q, k and v, o, gate and up, down; two norms in float32.
    ("int8", 20800 + 4 * 208 + 10400 + 4 * 100 + 12000 + 4 * 120 + 6000 + 4 * 100 + 4 * 200, 80 * (100 + 4)),
    ("fp8", 20800 + 4 * 208 + 10400 + 4 * 100 + 12000 + 4 * 120 + 6000 + 4 * 100 + 4 * 200, 80 * (100 + 4)),
    # Half a byte; scales for groups of 32, or of what divides it and 100 inputs (4), a head of 26 (2) and 60 (4).
    (
        "int4",
        10400 + 4 * 208 * 25 + 5200 + 4 * 100 * 52 + 6000 + 4 * 120 * 25 + 3000 + 4 * 100 * 15 + 4 * 200,
        80 * (100 + 4),
    ),
])  # fmt: skip
def test_quantized_weights_are_read_as_they_are_stored(name, layer, table):
    spec = SPEC.replace(quantization=QUANTIZATIONS[name])
    step, plain = Step(decodes=3, context=40), step_parts(SPEC, PaddedSizes.of(SPEC, 1), Step(decodes=3, context=40), 4)
    sizes = dataclasses.replace(PaddedSizes.of(spec, 1), ffn=60)
    parts = step_parts(spec, sizes, step, 4)
    assert plain["linear"].bytes - parts["linear"].bytes == 2 * (4 * LAYER - layer)
    assert plain["head"].bytes - parts["head"].bytes == 4 * 80 * 100 - table
    assert parts["linear"].operations == plain["linear"].operations
    tied = dataclasses.replace(spec, tie_embeddings=True)
    assert step_parts(tied, sizes, step, 4) == parts, "the embedding is the output projection then"


def test_time_is_what_each_part_waits_for():
    step, sizes = Step(decodes=3, context=40), PaddedSizes.of(SPEC, 1)
    parts = step_parts(SPEC, sizes, step, 4)
    time = predict(SPEC, SIMPLE, step, dtype="float32")
    assert time.communication == 0
    waits = {name: (part.bytes / 100, part.operations / 1000) for name, part in parts.items()}
    assert time.device == pytest.approx(sum(max(pair) for pair in waits.values()))
    fast = predict(SPEC, SIMPLE.shares(1.0, 1e9), step, dtype="float32")
    assert fast.compute == 0 and fast.kv == pytest.approx(waits["attention"][0])
    assert fast.limit == "weights"
    with pytest.raises(ConfigError, match="dtype"):
        predict(SPEC, SIMPLE, step)


def test_collectives_and_their_time():
    sizes = PaddedSizes.of(SPEC, 2)
    step = Step(decodes=3, context=40)
    assert step_collectives(SPEC, sizes, step, 2) == [Collective("all-reduce", 3 * 100 * 2, 2, 5)]
    assert sampler_collectives(sizes, 3) == [Collective("all-gather", 3 * 80 * 4, 2, 1)]
    # Each all-reduce starts in 1 s and takes its bytes at 10 a second, the all-gather half of its.
    expected = 5 * (1 + 1200 / 10) + (1 + 480 / 10)
    assert predict(SPEC, SIMPLE, step, width=2, dtype="float32").communication == pytest.approx(expected)
    olmo = golden_spec("olmo2")
    assert step_collectives(olmo, PaddedSizes.of(olmo, 2), step, 2)[1] == Collective(
        "all-reduce", 2 * 3 * 4, 2, olmo.num_layers
    )


def test_limit_and_share():
    time = StepTime(weights=1, compute=2, kv=3, communication=4, host=5)
    assert (time.device, time.total, time.limit, time.communication_share) == (10, 10, "communication", 0.4)
    assert StepTime(1, 0, 0, 0, host=2).limit == "host" and StepTime(1, 0, 0, 0, host=2).total == 2


def test_measured_rates_are_interpolated():
    measured = Device("m", "m", 1, 1.0, {"float32": 9.0}, SIMPLE.link, rate_by_rows=((4, 100.0), (8, 300.0)))
    assert [measured.rate("float32", rows) for rows in (1, 4, 6, 8, 99)] == [100, 100, 200, 300, 300]


def test_costs_come_on_top_of_the_roofline():
    step = Step(decodes=3, context=140, prefill=10, before=20)
    sizes = PaddedSizes.of(SPEC, 2)
    units = cost_units(SPEC, sizes, step, 4)
    # Two blocks of 128 positions for each decode, keys and values of 26 features of the one KV head of a device.
    assert units.layer == 2 and units.cache == 2 * 2 * 3 * 2 * 128 * 26 * 4
    # A prompt token attends to what is before, and to half of the chunk and of a block.
    assert units.prompt == 2 * 4 * 10 * (20 + (10 + 128) / 2) * 2 * 26
    assert units.activation > 2 * 13 * 8 * 100 * 4
    plain = predict(SPEC, SIMPLE, step, width=2, dtype="float32")
    for name in ("layer", "activation", "prompt", "cache"):
        device = dataclasses.replace(SIMPLE, costs=Costs(**{name: 2.0}))
        slow = predict(SPEC, device, step, width=2, dtype="float32")
        assert slow.device - plain.device == slow.other == pytest.approx(2 * getattr(units, name))
    assert predict(SPEC, device, step, width=2, dtype="float32").limit == "other"


def test_a_cpu_is_its_own_host():
    step = Step(decodes=3, context=40)
    gpu, cpu = (dataclasses.replace(SIMPLE, host_seconds=1e9, platform=platform) for platform in ("gpu", "cpu"))
    beside, on_top = (predict(SPEC, device, step, dtype="float32") for device in (gpu, cpu))
    assert beside.total == 1e9 and on_top.total == 1e9 + beside.device
    assert beside.limit == on_top.limit == "host"


def test_the_ways_to_shard_send_what_they_say():
    sizes = {name: PaddedSizes.of(SPEC, 2, name) for name in ("megatron", "output", "sequence")}
    step = Step(decodes=4, context=40)
    found = {name: step_collectives(SPEC, one, step, 4) for name, one in sizes.items()}
    assert found["sequence"] == [
        Collective("reduce-scatter", 4 * 50 * 4, 2, 5),
        Collective("all-gather", 4 * 100 * 4, 2, 5),
    ]
    # Results, the heads before o and the MLP's inner values; 4 heads of 26 are 104 values.
    assert found["output"] == [
        Collective("all-reduce", 4 * 100 * 4, 2, 1),
        Collective("all-gather", 4 * 100 * 4, 2, 4),
        Collective("all-gather", 4 * 104 * 4, 2, 2),
        Collective("all-gather", 4 * 60 * 4, 2, 2),
    ]
    odd = Step(decodes=3, context=40)
    assert step_collectives(SPEC, sizes["sequence"], odd, 4) == step_collectives(SPEC, sizes["megatron"], odd, 4)
    times = {name: predict(SPEC, SIMPLE, step, width=2, dtype="float32", sharding=name) for name in sizes}
    # As many bytes; five collectives more, which start in a second each.
    assert times["sequence"].communication - times["megatron"].communication == pytest.approx(5)


def test_every_figure_has_a_source():
    for device in DEVICES.values():
        assert set(device.sources) == {
            "memory", "memory_bandwidth", "rates", "link", "collectives", "shares", "host_seconds",
        }  # fmt: skip
