"""GPUs made of numbers: their state, the ways between them, and what stands there."""

import struct
import sys

import pynvml
import pytest

from ryzanstein_jax.commands import bench
from ryzanstein_jax.doctor.finding import OK, PROBLEM, WARNING, Place, Section
from ryzanstein_jax.doctor.gpus import check_gpus
from ryzanstein_jax.doctor.topology import acs_bridges, read_topology
from tests.orchestrator.fake_nvml import FakeGpu, FakeNvml


class Connected(FakeNvml):
    """GPUs whose NVLinks lead to a far end each: another GPU's number, or "switch"."""

    def __init__(self, *gpus, ends=(), level=50, version=4, mig=(), names=()):
        super().__init__(*gpus)
        self.ends, self.level, self.version, self.mig, self.names = ends, level, version, mig, names

    def nvmlDeviceGetName(self, handle):
        return self.names[handle] if self.names else super().nvmlDeviceGetName(handle)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, device, link):
        end = self.ends[device][link]
        bus = b"00000000:F0:00.0" if end == "switch" else self.nvmlDeviceGetPciInfo(end).busId
        return pynvml.nvmlPciInfo_t(busId=bus)

    def nvmlDeviceGetNvLinkVersion(self, device, link):
        return self.version

    def nvmlDeviceGetTopologyCommonAncestor(self, one, other):
        return self.level

    def nvmlDeviceGetMigMode(self, device):
        if not self.mig:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(device in self.mig)] * 2

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"


def switched(count, links=18, **more):
    gpus = [FakeGpu(links=dict.fromkeys(range(links), 1)) for _ in range(count)]
    return Connected(*gpus, ends=[["switch"] * links] * count, **more)


def pcie(count, **more):
    return Connected(*[FakeGpu() for _ in range(count)], **more)


def look(nvml, tmp_path, environ=None):
    section = Section("gpus")
    check_gpus(section, Place(environ or {}, tmp_path), nvml)
    return section


def texts(section, status):
    return " | ".join(finding.text for finding in section.findings if finding.status == status)


def test_nvlink_through_switches(tmp_path):
    section = look(switched(4), tmp_path)
    assert "NVLink between all 4 GPUs (NV18), 450 GB/s a GPU in each direction" in texts(section, OK)
    assert not texts(section, WARNING) + texts(section, PROBLEM)
    topology = section.facts["topology"]
    assert topology["matrix"][1] == ("NV18", "X", "NV18", "NV18")
    assert (section.facts["driver"], section.facts["gpus"]) == ("580.65.06", 4)


def test_nvlink_from_gpu_to_gpu():
    gpus = [FakeGpu(links={0: 1, 1: 1, 2: 0}), FakeGpu(links={0: 1, 1: 1}), FakeGpu()]
    found = read_topology(Connected(*gpus, ends=[[1, 1, 1], [0, 0], []], level=30, version=3))
    assert found.matrix == (("X", "NV2", "PHB"), ("NV2", "X", "PHB"), ("PHB", "PHB", "X"))
    assert found.nvlink_gb_per_s == (50.0, 50.0, None)


def test_a_driver_that_tells_little_is_no_error(tmp_path):
    assert look(FakeNvml(FakeGpu(), FakeGpu()), tmp_path).facts["topology"]["matrix"] == (("X", "?"), ("?", "X"))
    unknown = read_topology(switched(2, version=99))
    assert unknown.nvlink_gb_per_s == (None, None)


def test_gpus_far_apart_and_an_iommu_between(tmp_path):
    (tmp_path / "sys/kernel/iommu_groups/0").mkdir(parents=True)
    warnings = texts(look(pcie(2), tmp_path), WARNING)
    assert "(SYS)" in warnings and "IOMMU" in warnings and "could not be read" in warnings
    assert "IOMMU" not in texts(look(switched(2), tmp_path), WARNING)
    assert texts(look(pcie(1), tmp_path), WARNING) == ""


def bridge(tmp_path, name, control, kind="0x060400"):
    folder = tmp_path / "sys/bus/pci/devices" / name
    folder.mkdir(parents=True)
    config = bytearray(4096)
    struct.pack_into("<I", config, 0x100, 0x0001 | 0x140 << 20)  # another capability, then Access Control Services
    struct.pack_into("<IHH", config, 0x140, 0x000D, 0, control)
    (folder / "class").write_text(kind)
    (folder / "config").write_bytes(config)
    return folder / "config"


def test_bridges_that_redirect_traffic_are_named(tmp_path):
    bridge(tmp_path, "0000:00:01.0", 0b0000)
    bridge(tmp_path, "0000:00:02.0", 0b0100)
    bridge(tmp_path, "0000:00:03.0", 0b1100, kind="0x030200")
    assert acs_bridges(Place({}, tmp_path)) == ["0000:00:02.0"]
    assert "ACS" in texts(look(pcie(2, level=30), tmp_path), WARNING)


def test_a_capability_list_without_end_or_cut_short(tmp_path):
    file = bridge(tmp_path, "0000:00:01.0", 0)
    config = bytearray(file.read_bytes())
    struct.pack_into("<I", config, 0x100, 0x0001 | 0x100 << 20)
    file.write_bytes(config)
    assert acs_bridges(Place({}, tmp_path)) == []
    file.write_bytes(bytes(config[:64]))  # what others than root get
    assert acs_bridges(Place({}, tmp_path)) is None


def test_divided_shared_and_unequal_gpus(tmp_path):
    assert "divided (MIG)" in texts(look(pcie(2, mig=(1,)), tmp_path), WARNING)
    environ = {"CUDA_MPS_PIPE_DIRECTORY": "x"}
    assert "MPS" in texts(look(pcie(1), tmp_path, environ), WARNING)
    unequal = look(switched(2, names=("NVIDIA A100", "NVIDIA H100")), tmp_path)
    assert "NVIDIA A100, NVIDIA H100" in texts(unequal, WARNING)


@pytest.mark.parametrize("change", [{"lost": True}, {"rows": (0, 0, 0, 1)}])
def test_a_broken_gpu_is_a_problem(tmp_path, change):
    section = look(Connected(FakeGpu(**change), FakeGpu()), tmp_path)
    assert "GPU 0" in texts(section, PROBLEM)


def test_without_nvml_the_driver_still_counts(tmp_path):
    nvml = FakeNvml()
    nvml.init_error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    assert "no GPU is seen" in texts(look(nvml, tmp_path), OK)
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    section = look(nvml, tmp_path)
    assert "1 GPUs are here" in texts(section, WARNING) and section.facts["gpus"] == 1


def test_nvml_is_left_as_it_was_found(tmp_path):
    nvml = switched(2)
    look(nvml, tmp_path)
    assert nvml.started == 0 and not nvml.open_sets


def test_the_link_of_a_benchmark_is_that_of_the_slowest_gpu(monkeypatch):
    gpus = [FakeGpu(links={0: 1, 1: 1}), FakeGpu(links={0: 1, 1: 0})]
    nvml = Connected(*gpus, ends=[["switch"] * 2] * 2)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert bench.nvlink() == 25.0
    monkeypatch.setitem(sys.modules, "pynvml", pcie(2))
    assert bench.nvlink() is None
