"""Head layouts, shardings, and what compiled programs communicate and copy."""

import logging
import os
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.sharding import (
    MEGATRON_RULES,
    Collective,
    HeadLayout,
    PaddedSizes,
    collectives,
    make_mesh,
    named_sharding,
    partition_spec,
)
from ryzanstein_jax.step import StepPrograms
from tests.support import FAMILIES, GOLDEN, QUICK, golden_spec, load, make_programs

#: Sizes that give no activation as many values as a kernel or a page array has: copies are told apart by that.
BUCKET = Bucket(decodes=2, prefill_tokens=17, prefills=2, rows=6)
#: The same for shardings that divide the tokens.
EVEN = Bucket(decodes=2, prefill_tokens=26, prefills=2, rows=6)
MANY = Bucket(decodes=0, prefill_tokens=512, prefills=2, rows=2)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 16))
def test_head_layout(num_kv_heads, group, width):
    layout = HeadLayout.of(num_kv_heads * group, num_kv_heads, width)
    slots = list(zip(layout.kv_heads, layout.query_heads, strict=True))
    assert len(slots) == layout.num_slots and layout.num_slots % width == 0
    assert all(len(queries) == layout.queries_per_slot for _, queries in slots)
    placed = [query for _, queries in slots for query in queries if query >= 0]
    assert sorted(placed) == list(range(num_kv_heads * group))
    counts = Counter(head for head, _ in slots if head >= 0)
    assert counts == dict.fromkeys(range(num_kv_heads), layout.repeats)
    for kv_head, queries in slots:
        assert all(query // group == kv_head for query in queries if query >= 0)
    primary = [head for (head, _), first in zip(slots, layout.primary_slots, strict=True) if first]
    assert primary == list(range(num_kv_heads))


def test_head_layout_costs_no_more_than_it_must():
    assert HeadLayout.of(32, 8, 8) == HeadLayout(32, 8, 8, 4, 1)
    assert HeadLayout.of(32, 8, 1) == HeadLayout(32, 8, 8, 4, 1)
    assert HeadLayout.of(64, 8, 16) == HeadLayout(64, 8, 16, 4, 2)
    smollm2 = HeadLayout.of(9, 3, 8)
    assert (smollm2.num_slots, smollm2.queries_per_slot) == (8, 2)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_padded_sizes_divide(width):
    for family in FAMILIES:
        spec = golden_spec(family)
        sizes = PaddedSizes.of(spec, width)
        for padded, real in ((sizes.vocab, spec.vocab_size), (sizes.ffn, spec.intermediate_size)):
            assert padded % width == 0 and real <= padded < real + width


def test_rules():
    assert partition_spec(("kv_slots", "heads_per_slot", "head_dim", "embed")) == PartitionSpec("tp", None, None, None)
    assert partition_spec((None, "vocab")) == PartitionSpec(None, "tp")
    with pytest.raises(ValueError, match="one mesh axis twice"):
        partition_spec(("ffn", "vocab"))
    with pytest.raises(KeyError):
        partition_spec(("no such axis",))


def test_too_few_devices():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=9 .*there are 8 cpu devices.*jax_num_cpu_devices"):
        make_mesh(9)
    assert make_mesh(3).devices.tolist() == jax.devices()[:3]


@pytest.mark.parametrize("family", ["olmo2", "mixtral", "qwen2"])
def test_parameters_lie_as_the_rules_say(family):
    programs = make_programs(golden_spec(family), 4, BUCKET)
    loaded = dict(zip(programs.param_paths, load(programs, GOLDEN / family), strict=True))
    for path, param in programs.param_specs.items():
        array = loaded[path]
        assert array.sharding.is_equivalent_to(named_sharding(programs.mesh, param.axes), array.ndim), path
        sharded = [i for i, axis in enumerate(param.axes) if axis is not None and MEGATRON_RULES[axis] == "tp"]
        for shard in array.addressable_shards:
            for dim, size in enumerate(shard.data.shape):
                assert size == array.shape[dim] // (4 if dim in sharded else 1), path
        if path.endswith(("qkv.kernel", "gate_up.kernel", "mlp.gate_up", "mlp.down", "table")):
            assert sharded == [0], path
        elif path.endswith(("out.kernel", "down.kernel")):
            assert sharded == [1], path
        elif "norm" in path and "attention." not in path:
            assert sharded == [], path


def compiled_forward(family: str, width: int, sharding: str = "megatron") -> tuple[StepPrograms, jax.stages.Compiled]:
    bucket = BUCKET if sharding == "megatron" else EVEN
    # Pages enough that one layer's cache is far larger than all else in the program.
    programs = make_programs(golden_spec(family), width, bucket, num_pages=4096, page_size=16, sharding=sharding)
    compiled = programs.lower_forward(bucket).compile(compiler_options=QUICK)
    check_no_copies(programs, compiled)
    return programs, compiled


@pytest.mark.parametrize(
    ("family", "width"), [("llama", 2), ("llama", 4), ("smollm2", 8), ("gemma2", 4), ("olmo2", 2), ("mixtral", 8)]
)
def test_two_all_reduces_a_layer(family, width):
    """After attention and after the MLP or the experts, and one of the embedding; nothing of the cache is copied."""
    programs, compiled = compiled_forward(family, width)
    spec = programs.spec
    activations = BUCKET.tokens * spec.hidden_size * 4
    expected = [Collective("all-reduce", activations, width, 2 * spec.num_layers + 1)]
    if spec.qk_norm == "all":  # OLMo-2: the sums of squares of q and k together, one number per token each
        expected.append(Collective("all-reduce", 2 * BUCKET.tokens * 4, width, spec.num_layers))
    assert sorted(collectives(compiled), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(("family", "width", "bucket"), [("llama", 4, EVEN), ("gemma2", 2, EVEN), ("llama", 2, MANY)])
def test_every_projection_sharded_by_output_gathers_four_times_a_layer(family, width, bucket):
    """The inputs of the two row products, and their results; only the embedding is still a sum over devices.

    With many tokens too, where XLA would gather the kernels, if it might, and have each device compute all of it.
    """
    spec = golden_spec(family)
    programs = make_programs(spec, width, bucket, num_pages=4096, page_size=16, sharding="output")
    compiled = programs.lower_forward(bucket).compile(compiler_options=QUICK)
    check_no_copies(programs, compiled)
    sizes = PaddedSizes.of(spec, width)
    heads = sizes.heads.num_slots * sizes.heads.queries_per_slot * spec.head_dim
    expected: Counter[tuple[str, int]] = Counter({("all-reduce", spec.hidden_size): 1})
    expected["all-gather", spec.hidden_size] += 2 * spec.num_layers
    expected["all-gather", heads] += spec.num_layers
    expected["all-gather", sizes.ffn] += spec.num_layers
    assert found_by_size(compiled, bucket) == expected


@pytest.mark.parametrize(("family", "width"), [("llama", 4), ("gemma2", 2)])
def test_token_shards_between_the_pairs_scatter_and_gather_twice_a_layer(family, width):
    _, compiled = compiled_forward(family, width, "sequence")
    spec = golden_spec(family)
    assert found_by_size(compiled) == {
        # After the embedding and after each pair.
        ("reduce-scatter", spec.hidden_size // width): 2 * spec.num_layers + 1,
        # Before each pair and before the logits.
        ("all-gather", spec.hidden_size): 2 * spec.num_layers + 1,
    }


def test_tokens_that_do_not_divide_stay_whole():
    odd = replace(EVEN, prefill_tokens=EVEN.prefill_tokens + 1)
    programs = make_programs(golden_spec("llama"), 2, odd, sharding="sequence")
    found = collectives(programs.lower_forward(odd).compile(compiler_options=QUICK))
    assert {collective.kind for collective in found} == {"all-reduce"}


def test_a_hidden_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"sharding='output'.*hidden size 48 does not divide by 5; use megatron"):
        PaddedSizes.of(golden_spec("llama"), 5, "output")


def found_by_size(compiled: jax.stages.Compiled, bucket: Bucket = EVEN) -> Counter[tuple[str, int]]:
    """Collectives by kind and float32 values for each token."""
    found: Counter[tuple[str, int]] = Counter()
    for collective in collectives(compiled):
        assert collective.bytes % (4 * bucket.tokens) == 0
        found[collective.kind, collective.bytes // (4 * bucket.tokens)] += collective.count
    return found


def test_no_communication_on_one_device():
    _, compiled = compiled_forward("llama", 1)
    assert collectives(compiled) == []


def check_no_copies(programs: StepPrograms, compiled: jax.stages.Compiled) -> None:
    leaves = jax.tree.leaves(programs.cache_shapes)
    local = [shape.sharding.shard_shape(shape.shape) for shape in leaves]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(4 * int(np.prod(shape)) for shape in local)
    assert memory.temp_size_in_bytes < 4 * int(np.prod(local[0])), "less than the keys of one layer"
    large = {int(np.prod(shape)) for shape in local}
    kernels = [s for p, s in zip(programs.param_paths, programs.param_shapes, strict=True) if "kernel" in p]
    large |= {int(np.prod(shape.sharding.shard_shape(shape.shape))) for shape in kernels}
    text = compiled.as_text()
    assert text is not None
    for dims, what in re.findall(r"= f32\[([0-9,]+)\]\S* (copy|transpose)\(", text):
        assert int(np.prod([int(dim) for dim in dims.split(",")])) not in large, f"{what} of f32[{dims}]"


@pytest.mark.parametrize("width", [2, 8])
def test_the_sampler_gathers_the_logits_once(width):
    programs = make_programs(golden_spec("llama"), width, BUCKET)
    for lower in (programs.lower_sample, programs.lower_full_sample):
        found = collectives(lower(BUCKET.rows).compile(compiler_options=QUICK))
        assert found == [Collective("all-gather", BUCKET.rows * programs.sizes.vocab * 4, width, 1)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%r = f32[2,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add", ("all-reduce", 64, 4)),
        ("%r = f32[2,8]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add", ("all-reduce", 64, 2)),
        ("%r = bf16[16]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}", ("all-gather", 32, 8)),
        ("%r = bf16[16]{0} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0)", ("all-gather", 32, 2)),
        ("%r = f32[4]{0} all-reduce-start(%p), replica_groups=mesh['axis_0'=8] {'axis_0'}", ("all-reduce", 16, 8)),
        ("%r = f32[4]{0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}", ("all-reduce", 16, 4)),
        ("%r = (f32[4]{0}, pred[8]{0}) all-reduce(%p, %q), replica_groups={{0,1}}", ("all-reduce", 24, 2)),
        ("%r = s8[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", ("collective-permute", 4, 2)),
        ("%r = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2}}", ("reduce-scatter", 16, 3)),
        (
            "%r = ((bf16[2,8]{1,0}), bf16[16,8]{1,0}) all-gather-start(%p), replica_groups=mesh['tp'=8] {'tp'}",
            ("all-gather", 256, 8),
        ),
        ("%r = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]", ("all-gather", 32, 8)),
        ("%r = ((f32[4]{0}), f32[4]{0}) all-reduce-start(%p), replica_groups={{0,1}}", ("all-reduce", 16, 2)),
        ("%r = (f32[4]{0}, f32[2]{0}) all-reduce-start(%p, %q), replica_groups={{0,1}}", ("all-reduce", 24, 2)),
        ("%r = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%p), replica_groups=[1,4]<=[4]", ("reduce-scatter", 8, 4)),
        (
            "%r = (s8[4]{0}, s8[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 4, 2),
        ),
        ("%r = f32[4]{0} all-reduce(%p), replica_groups={{0},{1}}", None),
        ("%r = f32[4]{0} all-reduce-done(%p)", None),
        ("%r = f32[4]{0} add(%all-reduce, %q)", None),
    ],
)
def test_collectives_are_read_from_any_spelling(line, expected):
    found = collectives(SimpleNamespace(as_text=lambda: f"ENTRY main {{\n  {line}\n  {line}\n}}"))
    assert found == ([] if expected is None else [Collective(*expected, count=2)])


@pytest.mark.parametrize("driver", [False, True])
def test_the_plugin_for_nvidia_complains_only_where_their_driver_is(monkeypatch, caplog, driver):
    monkeypatch.setattr(os.path, "exists", lambda path: driver and path == "/dev/nvidiactl")
    logger = logging.getLogger("jax._src.xla_bridge")  # as JAX writes it
    for module in ("jax_plugins.xla_cuda13", "jax_plugins.other"):
        logger.error("Jax plugin configuration error: Exception when calling %s.initialize()", module)
    assert ["cuda" in message for message in caplog.messages] == ([True, False] if driver else [False])
