"""What accelerators can do: published figures, each with its source, and what share of them programs reach."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ryzanstein_jax.errors import ConfigError

GB = 1e9
TERA = 1e12
MICRO = 1e-6


@dataclass(frozen=True)
class Link:
    """How the devices of one machine reach each other, and what a collective costs there.

    Attributes:
        bandwidth: bytes a second that a device sends, at best, while it receives as many.
        bus_bandwidth: the same in a large all-reduce, as nccl-tests defines it; a switch that adds makes it more.
        start: seconds that a library's collective takes, however small and however few devices.
        hop: seconds of each message that has to wait for another one.
        kernel: seconds that a collective takes that is one kernel reading its peers' memory; None: there is none.
        measured: collective -> (seconds of any size, seconds a byte of the larger of a device's two buffers). Where
            there is one, it stands for all of the above.
    """

    bandwidth: float
    bus_bandwidth: float
    start: float
    hop: float
    kernel: float | None = None
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """What the engine's steps took beyond their roofline, where they were measured.

    Attributes:
        layer: seconds of each layer, however little it computes.
        activation: seconds for each byte of activations: norms, rotations, gates, sums.
        prompt: seconds for each operation of a prompt's attention.
        cache: seconds for each byte of the KV cache that decodes read, in whole blocks.
    """

    layer: float = 0.0
    activation: float = 0.0
    prompt: float = 0.0
    cache: float = 0.0


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name, title: for the command line and for people.
        memory: bytes that a driver offers to programs.
        memory_bandwidth: bytes a second, nominal.
        rates: dtype -> operations a second in dense matrix products, nominal.
        link: to its peers in one machine.
        host_seconds: that the host needs for each step: scheduling, packing, dispatch, reading tokens.
        memory_share, compute_share: of the nominal figures that good programs reach.
        sources: field -> where its figure comes from.
        rate_by_rows: (rows, operations a second) of measured matrix products; they then stand for `rates`.
        costs: of measured devices; those of the table have none.
        platform: "gpu" or "cpu". A CPU is its own host: what that needs is no time beside the device's.
    """

    name: str
    title: str
    memory: int
    memory_bandwidth: float
    rates: dict[str, float]
    link: Link
    host_seconds: float = 1e-3
    memory_share: float = 0.7
    compute_share: float = 0.6
    sources: dict[str, str] = field(default_factory=dict)
    rate_by_rows: tuple[tuple[int, float], ...] = ()
    costs: Costs = field(default_factory=Costs)
    platform: str = "gpu"

    def bandwidth(self) -> float:
        """Bytes a second that a good program reads."""
        return self.memory_bandwidth * self.memory_share

    def rate(self, dtype: str, rows: int) -> float:
        """Operations a second of a matrix product with that many rows; between measured ones it is interpolated.

        Raises:
            ConfigError: there is no figure for the dtype.
        """
        if dtype not in self.rates:
            raise ConfigError("dtype", dtype, f"{self.title} has figures for {', '.join(self.rates)}")
        if not self.rate_by_rows:
            return self.rates[dtype] * self.compute_share
        at, found = np.asarray(self.rate_by_rows, np.float64).T
        return float(np.interp(rows, at, found))

    def shares(self, memory: float, compute: float) -> Device:
        """The same device with programs that reach other shares of the nominal figures."""
        return replace(self, memory_share=memory, compute_share=compute)


def _rates(half: float, single: float, eight: float | None = None) -> dict[str, float]:
    rates = {"bfloat16": half * TERA, "float16": half * TERA, "float32": single * TERA}
    return rates if eight is None else {**rates, "float8": eight * TERA}


_DATASHEET = "NVIDIA's data sheet, dense rates"
_DRIVER = "total memory as nvidia-smi shows it"
_NCCL_H100 = (
    "others' measurements on 8 H100s: NCCL 20-25 us up to 1 MiB, one-shot kernels 6-8 us, bus bandwidth 480 GB/s"
)
_SCALED = "assumed: 80% of the link, latencies as on H100"
_PCIE = "assumed: 60% of PCIe, NCCL through host memory"
_SHARES = "memory 0.7: gpt-fast's single stream on A100; compute 0.6: assumed"


def _sources(memory: str, bandwidth: str, rates: str, link: str, collectives: str) -> dict[str, str]:
    return {
        "memory": memory, "memory_bandwidth": bandwidth, "rates": rates, "link": link, "collectives": collectives,
        "shares": _SHARES, "host_seconds": "assumed; measure it with --calibrate",
    }  # fmt: skip


def _nvlink(one_way: float, bus: float) -> Link:
    return Link(one_way * GB, bus * GB, start=12 * MICRO, hop=1.5 * MICRO, kernel=6.5 * MICRO)


_PCIE_4 = Link(32 * GB, 19 * GB, start=15 * MICRO, hop=5 * MICRO)

#: The table. GPUs of a kind are all of one machine: 8 on one NVSwitch, or on PCIe.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "a100", "A100 SXM 80GB", 81920 << 20, 2039 * GB, _rates(312, 19.5), _nvlink(300, 240),
            sources=_sources(_DRIVER, _DATASHEET, _DATASHEET, f"{_DATASHEET}: NVLink 600 GB/s both ways", _SCALED),
        ),
        Device(
            "h100", "H100 SXM 80GB", 81559 << 20, 3350 * GB, _rates(989.4, 67, 1979), _nvlink(450, 480),
            sources=_sources(_DRIVER, _DATASHEET, _DATASHEET, f"{_DATASHEET}: NVLink 900 GB/s both ways", _NCCL_H100),
        ),
        Device(
            "h200", "H200 SXM 141GB", 143771 << 20, 4800 * GB, _rates(989.4, 67, 1979), _nvlink(450, 480),
            sources=_sources(_DRIVER, _DATASHEET, _DATASHEET, f"{_DATASHEET}: NVLink 900 GB/s both ways", _NCCL_H100),
        ),
        Device(
            "b200", "B200 SXM 180GB", 183359 << 20, 8000 * GB, _rates(2250, 75, 4500), _nvlink(900, 720),
            sources=_sources(_DRIVER, _DATASHEET, _DATASHEET, f"{_DATASHEET}: NVLink 1.8 TB/s both ways", _SCALED),
        ),
        Device(
            "l40s", "L40S 48GB", 46068 << 20, 864 * GB, _rates(362, 91.6, 733), _PCIE_4,
            sources=_sources(_DRIVER, _DATASHEET, _DATASHEET, "PCIe 4.0 x16: 32 GB/s each way", _PCIE),
        ),
        Device(
            "rtx4090", "GeForce RTX 4090", 24564 << 20, 1008 * GB, _rates(165.2, 82.6, 330.3), _PCIE_4,
            sources=_sources(
                _DRIVER, _DATASHEET, "NVIDIA's Ada architecture paper: products summed in float32",
                "PCIe 4.0 x16: 32 GB/s each way", _PCIE,
            ),
        ),
        Device(
            "cpu", "2 cores of a Zen 5 server CPU", 16 << 30, 50 * GB,
            {"float32": 0.18 * TERA, "bfloat16": 0.35 * TERA, "float16": 0.18 * TERA},
            Link(5 * GB, 2 * GB, start=150 * MICRO, hop=20 * MICRO),
            memory_share=0.7, compute_share=1.0, platform="cpu",
            sources=dict.fromkeys(
                ("memory", "memory_bandwidth", "rates", "link", "collectives", "shares", "host_seconds"),
                "measured once on such a machine, in float32; each of yours differs: --calibrate",
            ),
        ),
    )
}  # fmt: skip


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        ConfigError: it isn't there.
    """
    key = name.lower().replace("-", "").replace("_", "").removeprefix("nvidia")
    if key not in DEVICES:
        raise ConfigError("device", name, f"use one of {', '.join(DEVICES)}, or this for the calibrated machine")
    return DEVICES[key]


#: What drivers call the cards of the table. Others of the same family (PCIe, NVL, less memory) are other devices.
_CARDS = {
    "A100-SXM4-80GB": "a100", "A100-SXM-80GB": "a100", "H100 80GB HBM3": "h100", "H200": "h200", "B200": "b200",
    "L40S": "l40s", "GeForce RTX 4090": "rtx4090",
}  # fmt: skip


def device_of_card(name: str) -> Device | None:
    """The table's device for a card that a driver calls so; None if it is none of them."""
    return DEVICES.get(_CARDS.get(name.strip().removeprefix("NVIDIA "), ""))
