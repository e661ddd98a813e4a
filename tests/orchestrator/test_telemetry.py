"""GPU telemetry over a fake driver whose names, structs and errors are held against the real library."""

import inspect
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

import pynvml
import pytest

from ryzanstein_jax.orchestrator import telemetry as telemetry_module
from ryzanstein_jax.orchestrator.gpu_problems import XIDS, Finding, FindingKind, problems
from ryzanstein_jax.orchestrator.telemetry import MAX_XIDS, GpuTelemetry, NvLink, normal_bus_id
from tests.orchestrator.fake_nvml import FakeGpu, FakeNvml

NOT_SUPPORTED, NO_PERMISSION = pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION
COUNTER = "nvmlDeviceGetNvLinkErrorCounter"
SOURCE = Path(telemetry_module.__file__).read_text(encoding="utf-8")
FUNCTIONS = {name: value for name, value in vars(FakeNvml).items() if name.startswith("nvml")}


def open_fake(*gpus: FakeGpu) -> tuple[GpuTelemetry, FakeNvml]:
    nvml = FakeNvml(*gpus)
    return GpuTelemetry(nvml), nvml


def test_every_name_is_one_of_the_real_library():
    names = set(re.findall(r"\b(?:nvml(?:[A-Z]\w+)|NVML_\w+)\b", SOURCE))
    assert len(names) > 40
    assert {name for name in names if not hasattr(pynvml, name)} == set()
    called = {name for name in names if name.startswith("nvml") and callable(getattr(pynvml, name))}
    assert called == FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_fake_takes_what_the_real_library_takes(name):
    fake = list(inspect.signature(FUNCTIONS[name]).parameters)[1:]
    real = [p.name for p in inspect.signature(getattr(pynvml, name)).parameters.values() if p.default is p.empty]
    assert fake == real


def test_all_that_a_gpu_tells():
    gpu = FakeGpu(
        "GPU-abc", processes=[(42, 1 << 20), (43, None)], ecc={0: 5, 1: 1}, rows=(1, 2, 1, 0), pages_pending=1,
        links={0: 1, 3: 0}, link_errors={(0, pynvml.NVML_NVLINK_ERROR_DL_CRC_FLIT): 9},
        reasons=pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwThermalSlowdown | 1,
    )  # fmt: skip
    telemetry, _ = open_fake(gpu)
    assert telemetry.available and telemetry.reason == ""
    (sample,) = telemetry.sample().gpus
    assert vars(sample) == dict(
        index=0, uuid="GPU-abc", name="NVIDIA H100", pci_bus_id="0000:0a:00.0", lost=False, reset_required=False,
        temperature=50, slowdown_temperature=90, memory_used=1 << 30, memory_total=80 << 30,
        processes=((42, 1 << 20), (43, None)), utilization=77, power=123.456, power_limit=700.0, ecc_corrected=5,
        ecc_uncorrected=1, pages_pending=True, rows_pending=True, rows_failed=False,
        nvlinks=(NvLink(0, True, {"replay": 0, "recovery": 0, "crc flit": 9, "crc data": 0}), NvLink(3, False, {})),
        throttle_reasons=("power cap", "hardware thermal slowdown"), pcie_generation=5, pcie_width=16,
        pcie_max_width=16, pcie_replays=3, xids=(),
    )  # fmt: skip
    assert telemetry.sample().monotonic <= telemetry.sample().monotonic


@pytest.mark.parametrize("error", [NOT_SUPPORTED, NO_PERMISSION, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, 999])
def test_what_is_missing_is_none_and_hurts_nothing_else(error):
    for function in FUNCTIONS:
        if not function.startswith("nvmlDevice") or function.endswith(("GetCount", "HandleByIndex")):
            continue
        telemetry, nvml = open_fake(FakeGpu(missing={function: error}), FakeGpu())
        broken, sound = telemetry.sample().gpus
        missing = {name for name, value in vars(broken).items() if value is None}
        assert not broken.lost and len(missing) <= 2 and None not in vars(sound).values()
        telemetry.close()
        assert not nvml.open_sets


def test_nothing_is_told_at_all():
    telemetry, _ = open_fake(
        FakeGpu(missing=dict.fromkeys((f for f in FUNCTIONS if "HandleBy" not in f), NOT_SUPPORTED))
    )
    (sample,) = telemetry.sample().gpus
    assert {name for name, value in vars(sample).items() if value is not None} == {
        "index", "lost", "reset_required", "nvlinks", "xids"
    }  # fmt: skip
    assert problems(telemetry.sample(), telemetry.sample(), own_processes=()) == []


def test_an_old_driver_knows_the_older_name_of_the_clock_reasons():
    gpu = FakeGpu(missing={"nvmlDeviceGetCurrentClocksEventReasons": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})
    gpu.reasons = pynvml.nvmlClocksEventReasonHwSlowdown
    telemetry, _ = open_fake(gpu)
    assert telemetry.sample().gpus[0].throttle_reasons == ("hardware slowdown",)


def test_a_gpu_falls_off_the_bus():
    gpus = FakeGpu(), FakeGpu()
    telemetry, nvml = open_fake(*gpus)
    before = telemetry.sample()
    gpus[0].lost = True
    gpus[0].xids.append(79)
    after = telemetry.sample()
    lost, sound = after.gpus
    assert lost.lost and lost.uuid == "GPU-0" and lost.xids == (79,) and lost.temperature is None
    assert not sound.lost and sound.temperature == 50
    found = problems(after, before)
    assert {finding.kind for finding in found} == {FindingKind.XID, FindingKind.LOST}
    assert all(finding.severity == "fatal" and finding.unusable and finding.gpu == 0 for finding in found)
    assert problems(telemetry.sample(), after) == []  # told once
    telemetry.close()
    assert not nvml.open_sets and nvml.started == 0


def test_a_gpu_that_comes_back_is_seen_again_with_its_events():
    gpus = FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b")
    telemetry, nvml = open_fake(*gpus)
    gpus[0].lost = True
    for _ in range(3):
        assert [gpu.lost for gpu in telemetry.sample().gpus] == [True, False]
    gpus[0].xids.append(79)
    assert telemetry.sample().gpus[0].xids == (79,), "also while nothing else can be asked of it"
    gpus[0].lost = False
    gpus[0].uuid = "GPU-c"
    assert telemetry.sample().gpus[0].lost, "another one by its number is not it"
    gpus[0].uuid = "GPU-a"
    back = telemetry.sample().gpus[0]
    assert (back.lost, back.uuid, back.temperature) == (False, "GPU-a", 50)
    gpus[0].xids.append(31)
    assert telemetry.sample().gpus[0].xids == (31,)
    assert len(nvml.open_sets) == 2, "none is left of the looks in between"
    telemetry.close()
    assert not nvml.open_sets


def test_a_gpu_is_lost_in_the_middle_of_a_sample():
    telemetry, _ = open_fake(FakeGpu(missing={"nvmlDeviceGetPcieReplayCounter": pynvml.NVML_ERROR_GPU_IS_LOST}))
    (sample,) = telemetry.sample().gpus
    assert sample.lost and sample.temperature is None


def test_a_gpu_is_lost_from_the_start_and_one_is_not_ours():
    telemetry, _ = open_fake(
        FakeGpu(lost=True), FakeGpu(missing={"nvmlDeviceGetHandleByIndex": NO_PERMISSION}), FakeGpu()
    )
    assert [(gpu.index, gpu.lost) for gpu in telemetry.sample().gpus] == [(0, True), (2, False)]


def test_xids_are_taken_without_waiting_and_bounded():
    gpu = FakeGpu(xids=deque([31, 31, 13]))
    telemetry, _ = open_fake(gpu)
    assert telemetry.sample().gpus[0].xids == (31, 31, 13) and telemetry.sample().gpus[0].xids == ()
    gpu.xids.extend([94] * 1000)
    assert len(telemetry.sample().gpus[0].xids) == MAX_XIDS


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_a_driver_it_is_not_available(error):
    nvml = FakeNvml(FakeGpu())
    nvml.init_error = error
    telemetry = GpuTelemetry(nvml)
    assert not telemetry.available and "NVML does not start" in telemetry.reason
    assert telemetry.sample().gpus == () and problems(telemetry.sample()) == []
    telemetry.close()


def test_without_the_library_or_a_gpu_it_is_not_available():
    code = (
        "import sys; sys.modules['pynvml'] = None\n"
        "from ryzanstein_jax.orchestrator.telemetry import GpuTelemetry\n"
        "telemetry = GpuTelemetry(); print(telemetry.available, telemetry.reason, telemetry.sample().gpus)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False the package nvidia-ml-py is not installed ()\n"
    telemetry, nvml = open_fake()
    assert not telemetry.available and telemetry.reason == "there is no GPU"
    telemetry.close()
    telemetry.close()
    assert nvml.started == 0 and telemetry.sample().gpus == ()


def test_the_real_library_is_asked_on_this_machine():
    """With a GPU it tells something; without one it says why not."""
    telemetry = GpuTelemetry()
    sample = telemetry.sample()
    assert telemetry.available == bool(sample.gpus) == (not telemetry.reason)
    assert all(gpu.lost or gpu.memory_total for gpu in sample.gpus)
    telemetry.close()


def test_bus_ids_are_written_as_cuda_does():
    assert normal_bus_id("00000000:3B:00.0") == normal_bus_id("0000:3b:00.0") == "0000:3b:00.0"
    assert normal_bus_id("00010001:3B:00.0") == "00010001:3b:00.0" and normal_bus_id("") == ""


def found_after(change: dict, *, before: dict | None = None, first: bool = False, own=None) -> list[Finding]:
    """What is found when a GPU changes; twice, so that what lasts shows as told once."""
    gpu = FakeGpu(links={0: 1, 1: 1})
    vars(gpu).update(before or {})
    telemetry, _ = open_fake(gpu)
    previous = telemetry.sample()
    vars(gpu).update(change)
    sample = telemetry.sample()
    assert problems(telemetry.sample(), sample, own_processes=own) == []
    return problems(sample, None if first else previous, own_processes=own)


def test_a_sound_gpu_has_no_problems():
    assert found_after({}) == found_after({}, first=True) == found_after({}, first=True, own=()) == []
    assert found_after({"reasons": pynvml.nvmlClocksEventReasonSwPowerCap}) == []  # busy, not ill
    assert found_after({"ecc": {0: 9, 1: 0}}) == []  # corrected
    assert found_after({"links": {0: 0, 1: 0}}, first=True) == []  # no bridge
    replays = {"link_errors": {(1, pynvml.NVML_NVLINK_ERROR_DL_REPLAY): 4}}
    assert found_after(replays, before={"links": {0: 1, 1: 0}}) == []  # of a time when nobody looked
    assert found_after({**replays, "missing": {}}, before={"missing": {COUNTER: NOT_SUPPORTED}}) == []


@pytest.mark.parametrize(
    ("change", "kind", "severity", "unusable", "words"),
    [
        ({"ecc": {0: 0, 1: 2}}, "ecc_uncorrected", "fatal", True, "2 uncorrected memory errors, new"),
        ({"rows": (0, 1, 1, 0)}, "memory_repair_pending", "warning", False, "waits for a reset"),
        ({"pages_pending": 1}, "memory_repair_pending", "warning", False, "waits for a reset"),
        ({"rows": (0, 1, 0, 1)}, "memory_repair_failed", "fatal", True, "could not remap"),
        ({"temperature": 90}, "hot", "warning", False, "90 °C"),
        ({"reasons": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown}, "slowed", "warning", False, "power brake"),
        ({"links": {0: 1, 1: 0}}, "nvlink_down", "fatal", True, "lost NVLink 1"),
        ({"link_errors": {(1, pynvml.NVML_NVLINK_ERROR_DL_REPLAY): 4}}, "nvlink_errors", "warning", False, "4 x rep"),
        ({"pcie_width": 8}, "pcie_narrow", "warning", False, "8 of 16"),
        (
            {"missing": {"nvmlDeviceGetTemperature": pynvml.NVML_ERROR_RESET_REQUIRED}},
            "reset_required", "fatal", True, "after a reset only",
        ),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told_once(change, kind, severity, unusable, words):
    (finding,) = found_after(change)
    assert (finding.kind, finding.severity, finding.unusable) == (kind, severity, unusable)
    assert words in finding.text and finding.text.startswith("GPU 0 (NVIDIA H100, 0000:0a:00.0) ") and finding.remedy


def test_history_before_the_first_sample_is_a_warning():
    (ecc,) = found_after({"ecc": {0: 0, 1: 2}}, first=True)
    assert (ecc.severity, ecc.unusable) == ("warning", False) and "since the driver was loaded" in ecc.text
    (down,) = found_after({"links": {0: 1, 1: 0}}, first=True)
    assert (down.kind, down.severity) == ("nvlink_down", "warning") and "1 of 2 NVLinks down: 1" in down.text
    assert found_after({"link_errors": {(1, pynvml.NVML_NVLINK_ERROR_DL_REPLAY): 4}}, first=True) == []


def test_only_new_uncorrected_errors_count():
    assert found_after({"ecc": {0: 0, 1: 7}}, before={"ecc": {0: 0, 1: 7}}) == []
    (more,) = found_after({"ecc": {0: 0, 1: 9}}, before={"ecc": {0: 0, 1: 7}})
    assert "has 2 uncorrected" in more.text
    (anew,) = found_after({"ecc": {0: 0, 1: 1}}, before={"ecc": {0: 0, 1: 7}})  # the driver was loaded again
    assert "has 1 uncorrected" in anew.text and anew.severity == "fatal"


def test_memory_of_other_processes():
    mine, other = (1, 60 << 30), (2, 5 << 30)
    assert found_after({"processes": [mine, other]}) == []  # not asked
    (taken,) = found_after({"processes": [mine, other]}, own={1})
    assert taken.kind == "memory_taken" and "5.00 GiB of its memory taken by other processes (2)" in taken.text
    assert found_after({"processes": [mine]}, own={1}) == found_after({"processes": [(3, None)]}, own={1}) == []
    (unseen,) = found_after({"used": 9 << 30}, own=())  # of another container, before our ranks run
    assert "8.00 GiB of its memory taken by other processes (unknown)" in unseen.text
    assert found_after({"used": 9 << 30}, own={1}) == []


@pytest.mark.parametrize("number", [13, 31, 48, 63, 64, 74, 79, 92, 94, 95, 119, 31337])
def test_xids_have_a_meaning(number):
    (finding,) = problems(open_fake(FakeGpu(xids=deque([number, number])))[0].sample())
    assert finding.kind == "xid" and f"Xid {number}, 2 times: " in finding.text
    assert finding.unusable == (number in (48, 64, 74, 79, 95, 119))
    assert (finding.severity == "fatal") == (number in (13, 31, 48, 64, 74, 79, 94, 95, 119))


def test_a_killed_process_is_no_fatal_finding():
    assert XIDS[45].severity == "warning" and not XIDS[45].unusable


def test_fatal_findings_come_first():
    telemetry, nvml = open_fake(FakeGpu(temperature=95), FakeGpu(ecc={0: 0, 1: 0}))
    before = telemetry.sample()
    nvml.gpus[1].ecc[1], nvml.gpus[0].pcie_width = 3, 4
    assert [finding.gpu for finding in problems(telemetry.sample(), before)] == [1, 0]
