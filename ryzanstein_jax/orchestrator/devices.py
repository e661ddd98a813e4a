"""`DeviceReport`: a device as the rank that owns it describes it to the leader."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
from dataclasses import dataclass

from ryzanstein_jax.errors import ConfigError

MAX_REPORT = 4096  # bytes of JSON
_PLATFORM = re.compile(r"[a-z][a-z0-9_]{0,31}")
_PCI_BUS_ID = re.compile(r"([0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]")


@dataclass(frozen=True)
class DeviceReport:
    """One device.

    Attributes:
        index: among the devices of its rank's process.
        platform: "cpu", "gpu", "tpu": JAX's name of it.
        kind: the model, such as "NVIDIA H100 80GB HBM3".
        memory_bytes: what a program may take of it. For a CPU device that of the whole host (or its control
            group): the devices of a host share it, and `ResourceAllocator` divides it.
        host: name of the machine.
        rank: of the process that owns it.
        pci_bus_id: "0000:3b:00.0"; "" for what has none.

    Raises:
        ConfigError: a field is of the wrong type or out of bounds.
    """

    index: int
    platform: str
    kind: str
    memory_bytes: int
    host: str
    rank: int
    pci_bus_id: str = ""

    def __post_init__(self) -> None:
        for name, low, high in (("index", 0, 4095), ("rank", 0, 4095), ("memory_bytes", 1, 1 << 50)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"device.{name}", _short(value), f"use a whole number from {low} to {high}")
        for name, most in (("kind", 128), ("host", 255)):
            value = getattr(self, name)
            if type(value) is not str or not 0 < len(value) <= most or not value.isprintable():
                raise ConfigError(f"device.{name}", _short(value), f"use 1 to {most} printable characters")
        if type(self.platform) is not str or not _PLATFORM.fullmatch(self.platform):
            raise ConfigError("device.platform", _short(self.platform), "use a platform's name, such as cpu or gpu")
        if type(self.pci_bus_id) is not str or (self.pci_bus_id and not _PCI_BUS_ID.fullmatch(self.pci_bus_id)):
            raise ConfigError("device.pci_bus_id", _short(self.pci_bus_id), "use a bus id as 0000:3b:00.0, or none")

    def to_json(self) -> str:
        """One line of JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> DeviceReport:
        """Reads what another process sent.

        Raises:
            ConfigError: it is too long, not JSON, or not a report.
        """
        if len(text) > MAX_REPORT:
            raise ConfigError("device", f"{len(text)} bytes", f"a report has at most {MAX_REPORT}")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("device", _short(text), "send a report as JSON") from error
        names = {field.name for field in dataclasses.fields(cls)}
        if type(fields) is not dict or fields.keys() != names:
            raise ConfigError("device", _short(fields), f"send an object of {', '.join(sorted(names))}")
        return cls(**fields)


def cuda_bus_id(ordinal: int) -> str:
    """The PCI bus id, as "0000:3b:00.0", of a device that CUDA has in use in this process; "" where it does not tell.

    JAX has the number by which CUDA counts, which is not NVML's; the bus id is what both know.
    """
    text = ctypes.create_string_buffer(32)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetPCIBusId(text, len(text), ordinal)
    except (OSError, AttributeError):
        return ""
    found = text.value.decode("ascii", "replace").lower()
    return found if not failed and _PCI_BUS_ID.fullmatch(found) else ""


def _short(value: object) -> str:
    """Something hostile, short enough for an error's text."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits
        return f"<{type(value).__name__}>"
    return shown if len(shown) <= 80 else shown[:77] + "..."
