"""Plans: sums, batches that fit, speedups, verdicts, and how a user asks for them."""

import dataclasses
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ryzanstein_jax import attention
from ryzanstein_jax.cli import app
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.memory import footprint
from ryzanstein_jax.model.families import spec_from_config
from ryzanstein_jax.planner import Step, plan, predict, roofline
from ryzanstein_jax.planner.calibration import Calibration, Measured, save_calibration
from ryzanstein_jax.planner.devices import DEVICES
from ryzanstein_jax.planner.shapes import SHAPES
from ryzanstein_jax.planner.targets import verdicts
from ryzanstein_jax.planner.usage import Setting, largest_batch, memory_use
from tests.orchestrator.fake_nvml import FakeGpu, FakeNvml
from tests.support import GOLDEN, golden_spec

#: Published parameter counts, in billions.
PUBLISHED = {
    "llama-3-8b": 8.03, "llama-3-70b": 70.55, "llama-3-405b": 405.85, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21,
    "qwen3-8b": 8.19, "qwen3-32b": 32.76, "mixtral-8x7b": 46.70,
}  # fmt: skip


def test_shapes_have_the_published_numbers_of_parameters():
    found = {name: round(spec_from_config(dict(shape)).num_parameters() / 1e9, 2) for name, shape in SHAPES.items()}
    assert found == PUBLISHED


def test_memory_by_hand():
    (row,) = plan("llama-3-8b", "h100", [1], [4], context=1024).rows
    assert row.memory.weights == 2 * 8_030_261_248
    # 128 KiB a token: 32 layers, 8 heads, 128 values of 2 bytes, twice; 4 bytes for its id; one page more is scratch.
    assert row.memory.kv_cache == (4 * 1024 + 16) * (131072 + 4)
    assert row.memory.card == 81559 << 20 and row.memory.budget == int(0.9 * (81559 << 20))
    assert row.memory.fits


def test_fewer_bits_by_hand():
    (plain,) = plan("llama-3-8b", "h100", [1], [4], context=1024).rows
    (row,) = plan("llama-3-8b", "h100", [1], [4], context=1024, kv_cache_dtype="fp8_e4m3", quantization="int8").rows
    # 32 layers, 8 heads, 128 bytes and a scale of 4, twice.
    assert row.memory.kv_cache == (4 * 1024 + 16) * (2 * 32 * 8 * 132 + 4)
    assert row.memory.weights == pytest.approx(plain.memory.weights / 2, rel=0.01)
    # A step reads of the weights all but the embedding, and waits for nothing else.
    assert row.step.weights == pytest.approx(plain.step.weights / 2, rel=0.01)
    assert row.step.kv == pytest.approx(plain.step.kv * 132 / 256)
    assert row.largest_batch > 2 * plain.largest_batch
    assert row.prefill.kv + row.prefill.weights < plain.prefill.kv + plain.prefill.weights


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("context", [100, 8192])
def test_the_largest_batch_fits_and_one_more_does_not(width, context):
    made = plan("llama-3-8b", "l40s", [width], [1], context=context, prompt=64)
    device, most = made.devices["l40s"], made.rows[0].largest_batch
    setting = Setting(context=context, prompt=64)
    use = [memory_use(made.spec, device, width, "bfloat16", batch, setting, 0.9) for batch in (most, most + 1)]
    assert use[0].fits and not use[1].fits
    assert largest_batch(made.spec, device, width, "float32", setting, 0.9) < most


def test_speedup_is_over_one_device_that_may_not_exist():
    rows = plan("llama-3-70b", "h100", [8], [1]).rows
    alone = plan("llama-3-70b", "h100", [1], [1]).rows[0]
    assert alone.largest_batch == 0 and not alone.memory.fits
    assert rows[0].speedup == pytest.approx(alone.step.total / rows[0].step.total)
    assert rows[0].efficiency == pytest.approx(rows[0].speedup / 8)
    assert rows[0].tokens_per_second == pytest.approx(1 / rows[0].step.total)
    assert rows[0].prefill_speedup == pytest.approx(alone.first_token / rows[0].first_token)


def test_a_prompt_is_computed_in_chunks():
    whole, halves = (
        plan("llama-3-8b", "h100", [1], [1], prompt=2048, max_num_batched_tokens=chunk).rows[0]
        for chunk in (2048, 1024)
    )
    # The same arithmetic; the weights and the host are waited for twice.
    assert halves.prefill.compute == pytest.approx(whole.prefill.compute, rel=0.01)
    assert halves.prefill.host == 2 * whole.prefill.host


def test_verdicts_name_what_is_met():
    made = plan("llama-3-8b", "h100", [1, 2, 8], [1, 32, 256])
    found = {(v.target.name, v.width): v for v in verdicts(made)}
    two = found["1.9x on 2 devices", 2]
    assert (two.met, two.missed, two.too_large) == ((32,), (1,), (256,))
    eight = found["7.9x on 8", 8]
    assert not eight.met and str(eight).startswith("no; best")
    best = eight.best
    # With communication cut to its budget the target is met exactly.
    budget = best.communication_budget(7.9)
    alone = best.speedup * best.step.total
    assert alone / (best.step.device - best.step.communication + budget) == pytest.approx(7.9)
    assert ("1.9x on 2 devices", 8) not in found
    assert found["a token in less than 50 ms", 1].met == (1, 32)
    for row in made.rows:
        assert row.speedup <= row.width * 1.001


def test_nothing_is_faster_than_ideal():
    for real, ideal in zip(
        plan("llama-3-8b", "h200").rows, plan("llama-3-8b", "h200", shares=(1.0, 1.0)).rows, strict=True
    ):
        assert ideal.step.total < real.step.total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "h1000"}, "device='h1000'.*h100"),
        ({"tensor_parallel_size": [0]}, "tensor_parallel_size=0"),
        ({"tensor_parallel_size": [True]}, "tensor_parallel_size=True"),
        ({"batch": [1 << 40]}, "batch="),
        ({"batch": []}, "batch="),
        ({"batch": list(range(1, 5000))}, "combinations"),
        ({"context": 1 << 20}, "limit is 131072"),
        ({"context": -1}, "context=-1"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"memory_fraction": 2}, "memory_fraction=2"),
        ({"max_num_batched_tokens": 15}, "max_num_batched_tokens=15"),
        ({"page_size": 0}, "page_size=0"),
        ({"sharding": "rows"}, "sharding='rows'.*megatron, output, sequence"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2'.*auto, int8, fp8"),
        ({"quantization": "int2"}, "quantization='int2'.*int8, int4, fp8"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan("llama-3-8b", **arguments)
    with pytest.raises(ConfigError, match="no/such-model"):
        plan("./no/such-model")


def test_planning_needs_no_jax():
    code = "from ryzanstein_jax.planner import plan; plan('llama-3-8b'); import sys; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_planned_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text((GOLDEN / "llama" / "config.json").read_text())
    made = plan(str(tmp_path), "cpu", [2], [3], context=32, prompt=16, dtype="float32")
    assert made.spec == golden_spec("llama").replace(max_position_embeddings=made.spec.max_position_embeddings)
    assert made.rows[0].memory.weights == 4 * footprint(made.spec, 2).weights


def test_the_command_prints_and_writes(tmp_path):
    picture = tmp_path / "plan.svg"
    asked = ["plan", "llama-3-8b", "--device", "h100,h200", "--tp", "1,8", "--batch", "1,16"]
    facts = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert [(row["device"], row["width"], row["batch"]) for row in facts["rows"]] == [
        (device, width, batch) for device in ("h100", "h200") for width in (1, 8) for batch in (1, 16)
    ]
    assert facts["rows"][0]["step"]["limit"] == "weights" and facts["devices"]["h100"]["sources"]
    shown = CliRunner().invoke(app, asked).stdout
    for text in ("H200 SXM", "reading weights", "7.9x on 8", "3,350 GB/s x 70%"):
        assert text in shown
    wrong = CliRunner().invoke(app, ["plan", "llama-3-8b", "--device", "h100", "--tp", "1,x"])
    assert isinstance(wrong.exception, ConfigError) and "tp='1,x'" in str(wrong.exception)
    assert CliRunner().invoke(app, [*asked, "--plot", str(picture)]).exit_code == 0
    assert "<svg" in picture.read_text()


def test_auto_is_the_gpu_that_is_here_or_else_what_was_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path))

    def planned(*cards):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*(FakeGpu(name=card) for card in cards)))
        return CliRunner().invoke(app, ["plan", "llama-3.2-1b", "--batch", "1", "--context", "64", "--json"])

    for card, name in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ):
        assert {row["device"] for row in json.loads(planned(card, card).stdout)["rows"]} == {name}
    # An H100 with another memory and other links is another device.
    for cards, why in ((["NVIDIA H100 PCIe"], "no NVIDIA H100 PCIe"), ([], "there is no GPU")):
        error = planned(*cards).exception
        assert isinstance(error, ConfigError)
        assert why in str(error) and "h100" in str(error) and "--calibrate" in str(error)
    one = Measured(1, 40e9, ((1, 20e9),), {}, 1e-4)
    save_calibration(Calibration("this machine", "cpu", "float32", 1 << 34, "now", {}, (one,)))
    assert {row["device"] for row in json.loads(planned().stdout)["rows"]} == {"this"}
    assert {row["device"] for row in json.loads(planned("NVIDIA B200").stdout)["rows"]} == {"b200"}


@pytest.mark.parametrize("device", ["h200", "rtx4090"])
def test_ways_to_shard_are_planned(device):
    rows = {
        name: plan("llama-3-8b", device, [8], [32], sharding=name).rows[0]
        for name in ("megatron", "output", "sequence")
    }
    assert len({row.memory.weights for row in rows.values()}) == 1
    # More collectives that wait, and for "output" more bytes too; arithmetic is the same.
    assert rows["megatron"].step.communication < rows["sequence"].step.communication
    assert rows["megatron"].step.communication < rows["output"].step.communication
    assert len({(row.step.weights, row.step.kv, row.step.compute) for row in rows.values()}) == 1
    assert rows["megatron"].prefill.communication < rows["output"].prefill.communication


def test_the_model_agrees_with_what_others_measured():
    """Llama-2-7B, one stream, gpt-fast on 8 A100s with NCCL: 80%, 61% and 39% efficiency on 2, 4 and 8."""
    spec = spec_from_config(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
            "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008, "torch_dtype": "bfloat16",
            "max_position_embeddings": 4096,
        }
    )  # fmt: skip
    a100 = DEVICES["a100"]
    a100 = dataclasses.replace(a100, link=dataclasses.replace(a100.link, kernel=None))
    times = {width: predict(spec, a100, Step(decodes=1, context=200), width=width).device for width in (1, 2, 4, 8)}
    found = {width: times[1] / times[width] / width for width in (2, 4, 8)}
    assert found == pytest.approx({2: 0.80, 4: 0.61, 8: 0.39}, abs=0.1)


def test_what_is_said_twice_is_the_same():
    """The planner cannot import what computes, because that imports JAX."""
    assert roofline.BLOCK == attention.BLOCK
