"""Devices to a mesh and pages: exact sums, the widest mesh that fits, refusals whose advice holds, hostile reports."""

import json
import re

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.errors import ConfigError, MemoryBudgetError
from ryzanstein_jax.memory import footprint, plan_memory
from ryzanstein_jax.orchestrator.devices import MAX_REPORT, DeviceReport
from ryzanstein_jax.orchestrator.resources import ResourceAllocator
from ryzanstein_jax.sharding import PaddedSizes
from tests.support import FAMILIES, golden_spec

MIB = 1 << 20
#: 77 MiB of float32 weights at width 1, most of it the vocabulary.
BIG = golden_spec("llama").replace(vocab_size=300_000, hidden_size=64, tie_embeddings=True, dtype="float32")


def gpu(slot: int = 0, memory: int = 1000 * MIB, kind: str = "H100") -> DeviceReport:
    return DeviceReport(0, "gpu", kind, memory, "node", slot, f"0000:{slot:02x}:00.0")


def allocator(spec=BIG, **settings) -> ResourceAllocator:
    defaults = dict(tensor_parallel_size=8, max_model_len=64, memory_fraction=1.0, max_num_seqs=4)
    return ResourceAllocator(spec, EngineConfig("m", **{**defaults, **settings}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "cache"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")])
def test_the_sum_is_that_of_a_rank(family, dtype, cache):
    spec = golden_spec(family)
    made = allocator(spec, dtype=dtype, kv_cache_dtype=cache)
    itemsize = jnp.dtype(dtype).itemsize
    for width in range(1, 9):
        memory = made.place([gpu(slot, 5 * MIB) for slot in range(8)], width).memory
        assert memory == plan_memory(
            spec=spec, sizes=PaddedSizes.of(spec, width), dtype=jnp.dtype(dtype), total=5 * MIB, memory_fraction=1.0,
            weights=footprint(spec, width).weights * itemsize, temporaries=0, logits=0, page_size=16,
            max_model_len=64, max_num_seqs=4, kv_cache_dtype=cache,
        )  # fmt: skip
        assert made.page_budget(width) == made.page_budget(width, 5 * MIB, "gpu") == memory.num_pages > 4


def test_a_mesh_of_the_first_devices():
    placement = allocator(tensor_parallel_size=2).place([gpu(slot) for slot in range(4)])
    assert placement.slots == (0, 1) and placement.width == 2 and placement.memory_bytes == 1000 * MIB
    assert placement.note == "slot 2 (H100): not needed; slot 3 (H100): not needed"


def test_one_kind_of_device_and_the_most_memory():
    devices = [
        gpu(0, kind="A100"),
        gpu(1),
        gpu(2, 500 * MIB),
        gpu(3),
        DeviceReport(0, "cpu", "cpu", 1 << 40, "node", 9),
    ]
    made = allocator(tensor_parallel_size=2)
    placement = made.place(devices)
    assert placement.slots == (1, 3)
    assert placement.note == (
        "slot 0 (A100): of another kind than H100; slot 2 (H100): not needed; slot 4 (cpu): of another kind than H100"
    )
    cpus = [DeviceReport(0, "cpu", "cpu", 1 << 40, "node", rank) for rank in range(4)]
    assert made.place([*cpus, gpu(0)], 1).slots == (4,)
    assert made.place([gpu(0, 300 * MIB), gpu(1, 200 * MIB)]).memory_bytes == 200 * MIB


def test_too_few_devices():
    made = allocator(tensor_parallel_size=4)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size=4 .*: 2 usable devices of one kind are left of 2 x H100; use at"
    ):
        made.place([gpu(0), gpu(1)])
    made.exclude(1, "Xid 79")
    with pytest.raises(ConfigError, match=r"without slot 1: Xid 79"):
        made.place([gpu(0), gpu(1)], 2)
    with pytest.raises(ConfigError, match="no device was seen yet"):
        allocator().degraded_width()
    with pytest.raises(ConfigError, match="from 1 to tensor_parallel_size=4"):
        made.place([gpu(slot) for slot in range(8)], 5)


def test_degrading_leaves_out_what_is_excluded_and_takes_any_width():
    made = allocator()
    made.place([gpu(slot) for slot in range(8)])
    made.exclude(2, "it died three times")
    placement = made.degraded_width()
    assert placement.slots == (0, 1, 3, 4, 5, 6, 7) and placement.width == 7
    assert placement.note == "slot 2 (H100): it died three times"
    assert made.degraded_width(3).slots == (0, 1, 3) and made.excluded == {2: "it died three times"}
    with pytest.raises(ConfigError, match="7 usable"):
        made.degraded_width(least=8)
    made.restore(2)
    assert made.degraded_width().width == 8 and made.usable == tuple(range(8))
    for slot in range(8):
        made.exclude(slot, "gone")
    with pytest.raises(ConfigError, match="0 usable"):
        made.degraded_width()
    assert not made.fits(1)
    made.restore()
    assert made.fits(1) and not made.fits(9)


def test_degrading_never_exceeds_the_configured_width():
    made = allocator(tensor_parallel_size=2)
    made.place([gpu(slot) for slot in range(8)])
    assert made.degraded_width(8).width == 2


def test_no_narrower_mesh_than_the_model_fits():
    made = allocator()
    made.place([gpu(slot, 45 * MIB) for slot in range(8)])  # the weights are 73 MiB
    assert [width for width in range(1, 9) if made.fits(width)] == [2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(
        MemoryBudgetError, match=r"width 1 does not fit; at 1: the model does not fit: 7\d\.\d MiB weights"
    ) as no:
        made.degraded_width(1)
    for part in (
        "budget of 45.0 MiB",
        "memory_fraction=1 of 45.0 MiB",
        "KV cache takes at least",
        "Use tensor_parallel_size=2",
    ):
        assert part in str(no.value)
    made.learn(2, 20 * MIB, 1 * MIB)
    assert not made.fits(2)


def test_a_mesh_that_padding_spoils_is_passed_over():
    """2 KV heads on 3 devices take as many slots as on 4: width 3 holds more per device than 2 does of the cache."""
    spec = golden_spec("llama").replace(num_heads=2, num_kv_heads=2, head_dim=64, max_position_embeddings=1 << 16)
    made = allocator(spec, tensor_parallel_size=8, max_model_len=None, max_num_seqs=1)
    needs = {}
    for width in range(1, 9):
        placement = made.place([gpu(slot, 1 << 40) for slot in range(8)], width)
        needs[width] = placement.memory.weights + placement.memory.kv_cache
    for have in range(2, 9):
        for room in sorted(needs.values()):
            made._devices = tuple(gpu(slot, room) for slot in range(8))
            fitting = [width for width in range(1, have + 1) if needs[width] <= room]
            if fitting:
                assert made.degraded_width(have).width == max(fitting)
            else:
                with pytest.raises(MemoryBudgetError, match=f"no width from 1 to {have} fits; at {have}: ") as refused:
                    made.degraded_width(have)
                with pytest.raises(MemoryBudgetError) as widest:
                    made._place(have)
                assert str(refused.value).endswith(str(widest.value))


def test_the_advice_of_a_refusal_holds():
    devices = [gpu(slot, 45 * MIB) for slot in range(8)]
    with pytest.raises(MemoryBudgetError) as refused:
        allocator().place(devices, 1)
    assert allocator().place(devices, int(re.search(r"tensor_parallel_size=(\d+)", str(refused.value))[1]))
    with pytest.raises(MemoryBudgetError) as refused:
        allocator(max_model_len=1 << 20).place(devices, 2)
    advised = int(re.search(r"max_model_len=(\d+), or less", str(refused.value))[1])
    assert allocator(max_model_len=advised).place(devices, 2)
    with pytest.raises(MemoryBudgetError):
        allocator(max_model_len=advised + 1).place(devices, 2)


def test_what_a_start_measured_counts_and_scales():
    made = allocator()
    made.place([gpu(slot) for slot in range(8)])
    assert made._measured(4) == (0, 0)
    made.learn(8, 10 * MIB, 3 * MIB)
    made.learn(8, 8 * MIB, 4 * MIB)  # the larger ones stay
    assert made._measured(8) == (10 * MIB, 4 * MIB)
    assert made._measured(4) == (20 * MIB, 4 * MIB) and made._measured(1) == (80 * MIB, 4 * MIB)
    made.learn(2, 30 * MIB, 4 * MIB)
    assert made._measured(1) == (60 * MIB, 4 * MIB) and made._measured(3) == (30 * MIB, 4 * MIB)
    memory = made.degraded_width(2).memory
    assert (memory.temporaries, memory.logits) == (30 * MIB, 4 * MIB)
    for bad in ((0, 1, 1), (1, -1, 1), (1, 1, -1)):
        with pytest.raises(ConfigError):
            made.learn(*bad)


def test_an_exact_number_of_pages_gives_way_only_when_degraded():
    devices = [gpu(slot, 45 * MIB) for slot in range(8)]
    most = allocator(max_num_seqs=4096, max_model_len=64).place(devices).memory.num_pages
    made = allocator(num_pages=most)
    assert made.place(devices).memory.num_pages == most
    placement = made.degraded_width(2)
    assert 5 <= placement.memory.num_pages < most
    assert placement.note.endswith(f"{placement.memory.num_pages} pages instead of num_pages={most}: no more fit")
    with pytest.raises(MemoryBudgetError, match="num_pages="):
        allocator(num_pages=10 * most).place(devices)
    assert allocator(num_pages=6).place(devices, 4).memory.num_pages == 6


def test_cpu_devices_of_a_host_share_its_memory():
    def devices(hosts):
        return [DeviceReport(0, "cpu", "cpu", 1000 * MIB, host, rank) for rank, host in enumerate(hosts)]

    made = allocator(memory_fraction=None)
    assert made.place(devices("aaaa"), 4).memory_bytes == 250 * MIB
    assert made.place(devices("aaaa"), 2).memory_bytes == 500 * MIB
    assert made.place(devices("aaab"), 4).memory_bytes == 1000 * MIB // 3
    assert made.place(devices("aaaa"), 2).memory.budget == 125 * MIB  # a quarter of a CPU's, 0.9 of a GPU's
    assert made.place([gpu(0)], 1).memory.budget == int(900 * MIB)
    assert allocator(dtype="auto", spec=BIG.replace(dtype="bfloat16")).weight_bytes(1, "cpu") == made.weight_bytes(
        1, "cpu"
    )


def test_slots_are_checked():
    for slot in (-1, True, "0"):
        with pytest.raises(ConfigError, match="slot"):
            allocator().exclude(slot, "")


def test_a_report_survives_the_journey():
    report = gpu(3)
    assert DeviceReport.from_json(report.to_json()) == report
    assert DeviceReport.from_json(report.to_json().encode()) == report


GOOD = json.loads(gpu(3).to_json())


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "[" * 4000, b"\xff\xfe\xff", "9" * 4090, "x" * (MAX_REPORT + 1), b"x" * 5000,
        json.dumps({**GOOD, "more": 1}), json.dumps({k: v for k, v in GOOD.items() if k != "rank"}), json.dumps([GOOD]),
        *(
            json.dumps({**GOOD, name: value})
            for name in GOOD for value in (None, True, -1, 1.5, "", "x\ny", [], {}, 1 << 60, float("nan"), "x" * 300)
            if (name, value) != ("pci_bus_id", "")
        ),
    ],
)  # fmt: skip
def test_hostile_reports_are_refused_in_few_words(text):
    with pytest.raises(ConfigError, match="device") as refused:
        DeviceReport.from_json(text)
    assert len(str(refused.value)) < 400


def test_a_report_that_is_too_long_is_not_read():
    with pytest.raises(ConfigError, match="at most 4096"):
        DeviceReport.from_json(gpu(3).to_json() + " " * MAX_REPORT)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_end_in_a_typed_error(text):
    with pytest.raises(ConfigError):
        DeviceReport.from_json(text)
