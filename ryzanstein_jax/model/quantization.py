"""Which kernels are computed in fewer bits, as data. No JAX here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: The linear layers of attention and MLP, the experts' too.
LINEAR = ("qkv", "out", "gate_up", "down")
#: The embedding and the output projection.
TABLES = ("embedding", "unembed")

#: Most inputs of a row-parallel kernel that must stay together for its scales: a device's part is padded to them.
GROUP_UNIT = 32


def array_bytes(shape: Iterable[int], dtype: np.dtype) -> int:
    """Bytes of an array on a device, where 4-bit values lie in pairs; NumPy gives each of them a byte."""
    bits = 4 if dtype.name == "int4" else 8 * dtype.itemsize
    return -(-math.prod(shape) * bits // 8)


@dataclass(frozen=True)
class Scheme:
    """How one kernel is held and multiplied; all of it is symmetric but for `zeros`.

    Attributes:
        kind: "int8": kernel and activations are, products are exact in int32. "int4": the kernel is, and is dequantized
            in its product. "fp8": the kernel is float8_e4m3fn; with one scale for each output, GPUs multiply it with
            activations that are too (one scale for each token), elsewhere it is dequantized in the product.
        digits: int8 digits of the activations.
        group: inputs that share a scale; 0: one scale for each output.
        zeros: each group has a zero point too, int8.
    """

    kind: str
    digits: int = 0
    group: int = 0
    zeros: bool = False

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.kind == "int4" else 8

    def kernel_bytes(self, outputs: int, inputs: int, last: int) -> int:
        """Bytes of a kernel with its scales and zero points; `last` is the size of its last dimension."""
        groups = inputs // self.held_group(last) if self.group else 1
        return -(-outputs * inputs * self.bits // 8) + outputs * groups * (4 + self.zeros)

    def held_group(self, inputs: int) -> int:
        """Inputs that share a scale on a device whose part of the kernel has `inputs` along its last dimension.

        It divides `group`, so that what lies in one group of a device lies in one of the checkpoint too.
        """
        return math.gcd(self.group, inputs)


@dataclass(frozen=True)
class Quantization:
    """One way of computing in fewer bits.

    Attributes:
        name: "int8", "int4" or "fp8": of the linear layers. The tables, where they take part, are int8 with each.
        roles: of the kernels that are: "qkv", "out", "gate_up", "down", "embedding" (and with it the output
            projection where the two are tied), "unembed". All else stays in the dtype of the activations.
        fine: those that are int8 whose activations take two int8 digits, the second for what the first leaves: more
            than one digit can show varies within a token there. It doubles the rows of that product, not its weights.
        group: of the linear layers, see `Scheme`.
        zeros: of the linear layers, see `Scheme`.
        layout: how a checkpoint stores them: "" as kernel and scales under their own names, or a key of
            `checkpoint.packed.LAYOUTS`.
        block: outputs that share a scale there, in the blocks of some fp8 checkpoints; 0: none do.
    """

    name: str
    roles: tuple[str, ...]
    fine: tuple[str, ...] = ()
    group: int = 0
    zeros: bool = False
    layout: str = ""
    block: int = 0

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Role -> how its kernels are computed."""
        return {role: self._scheme(role) for role in self.roles}

    def _scheme(self, role: str) -> Scheme:
        if self.name == "int8" or role in TABLES:
            return Scheme("int8", digits=2 if role in self.fine else 1)
        return Scheme(self.name, group=self.group, zeros=self.zeros)

    @property
    def ffn_unit(self) -> int:
        """What a device's part of an MLP must be a multiple of."""
        return math.gcd(self.group, GROUP_UNIT) if self.group and "down" in self.roles else 1


#: What `EngineConfig.quantization` stands for. Which kernels take part was decided by measurement:
#: docs/quantization.md.
QUANTIZATIONS = {
    "int8": Quantization("int8", (*LINEAR, *TABLES), fine=("qkv", "gate_up", "down", *TABLES)),
    "int4": Quantization("int4", (*LINEAR, *TABLES), fine=TABLES, group=32),
    "fp8": Quantization("fp8", (*LINEAR, *TABLES), fine=TABLES),
}
