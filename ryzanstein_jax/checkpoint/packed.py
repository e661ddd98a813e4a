"""Ready-made quantized checkpoints, read as kernels, scales and zero points under the names of the unquantized ones.

Of each quantized module X a source shows `X.weight` (int4, less 8, or float8; [outputs, inputs]), `X.weight_scale`
(float32, [outputs] or [outputs, groups]) and, where the layout has them, `X.weight_zero` (int8, less 8, like the
scales), with weight = (kernel - zero) * scale. What is stored beneath, eight 4-bit values to an int32:

    pack-quantized   weight_packed [O, I/8], weight_scale [O, G], weight_zero_point [O/8, G], weight_shape [2]
    awq              qweight [I, O/8], scales [G, O], qzeros [G, O/8]; values of a word in the order 0 2 4 6 1 3 5 7
    gptq, gptq_v2    qweight [I/8, O], scales [G, O], qzeros [G, O/8], g_idx [I]; qzeros of the first are less 1
    fp8              weight [O, I], weight_scale or weight_scale_inv: one value, [O], [O, 1] or one for each block

Only what a box needs is read. Scales of fp8 activations (`input_scale`) are left: activations are scaled as they come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np

from ryzanstein_jax.checkpoint.quantize import SCALE, ZERO
from ryzanstein_jax.checkpoint.source import FLOATS, Box, TensorInfo, WeightSource, whole
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.quantization import Quantization

INT4, FP8 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.float8_e4m3fn)
_WEIGHT = ".weight"
_PER_WORD = 8
#: Place in a word of AWQ's of each of the eight columns that it holds.
_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


class PackedSource:
    """Another source, its quantized modules decoded.

    Args:
        source: a Hugging Face checkpoint.
        quantization: with the layout of it.

    Raises:
        WeightsError: a module lacks a tensor, or one has another shape, dtype or order of inputs than its layout.
    """

    dialect = "huggingface"

    def __init__(self, source: WeightSource, quantization: Quantization):
        self.source, self.path = source, Path(source.path)
        held = set(source.names())
        self._modules: dict[str, _Module] = {}
        used: set[str] = set()
        layout, marker = LAYOUTS[quantization.layout]
        for name in sorted(held):
            base = name.removesuffix(marker)
            if base != name and (marker != _WEIGHT or source.info(name).dtype == FP8):
                module = self._modules[base] = layout(source, base, quantization)
                used |= module.used
        self._rest = held - used

    def names(self) -> Iterable[str]:
        yield from self._rest
        for base, module in self._modules.items():
            yield from (base + _WEIGHT + kind for kind in module.kinds)

    def info(self, name: str) -> TensorInfo:
        module, kind = self._find(name)
        return self.source.info(name) if module is None else module.info(kind)

    def read(self, name: str, box: Box) -> np.ndarray:
        module, kind = self._find(name)
        return self.source.read(name, box) if module is None else module.kinds[kind](box)

    def release(self, name: str) -> None:
        module, kind = self._find(name)
        if module is None:
            self.source.release(name)
        elif not kind:
            self.source.release(module.kernel)

    def _find(self, name: str) -> tuple[_Module | None, str]:
        for kind in (SCALE, ZERO, ""):
            base = name.removesuffix(_WEIGHT + kind)
            if base != name and base in self._modules and kind in self._modules[base].kinds:
                return self._modules[base], kind
        return None, ""


class _Module(ABC):
    """One quantized module: `kinds` maps "", SCALE and, of int4 only, ZERO to what reads a box of each."""

    def __init__(self, source: WeightSource, base: str, quantization: Quantization):
        self.source, self.base, self.quantization = source, base, quantization
        self.used: set[str] = set()
        self.kernel = ""
        self.shape: tuple[int, ...] = ()
        self.dtype = INT4
        self.kinds: dict[str, Callable[[Box], np.ndarray]] = {"": self.weights, SCALE: self.scales}
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Checks the module's tensors and sets what is known of them."""

    @abstractmethod
    def weights(self, box: Box) -> np.ndarray:
        """int4 or float8 values [outputs, inputs] of a box."""

    @abstractmethod
    def scales(self, box: Box) -> np.ndarray:
        """float32 scales of a box: [outputs, groups], or [outputs] where an output has one."""

    @property
    def groups(self) -> int:
        group = self.quantization.group
        return -(-self.shape[1] // group) if group else 1

    def info(self, kind: str) -> TensorInfo:
        file = self.source.info(self.kernel).file
        if not kind:
            return TensorInfo(self.shape, self.dtype, file)
        shape = (self.shape[0], self.groups) if self.quantization.group else self.shape[:1]
        return TensorInfo(shape, np.dtype(np.int8 if kind == ZERO else np.float32), file)

    def use(self, suffix: str, shape: tuple[int, ...] | None, *dtypes: np.dtype) -> str:
        """The name of a tensor of this module, which must be there with this shape and one of these dtypes."""
        name = self.base + suffix
        if not self.has(suffix):
            raise WeightsError(
                "the checkpoint lacks a tensor of a quantized module", file=self.source.path, tensor=name
            )
        info = self.source.info(name)
        if info.dtype not in dtypes or (shape is not None and info.shape != shape):
            wanted = f"{shape or 'any shape'} of {' or '.join(dtype.name for dtype in dtypes)}"
            self.wrong(name, "a tensor of a quantized module is not what its layout says", wanted)
        self.used.add(name)
        return name

    def has(self, suffix: str) -> bool:
        try:
            self.source.info(self.base + suffix)
        except KeyError:
            return False
        return True

    def wrong(self, name: str, problem: str, expected: object = None) -> NoReturn:
        info = self.source.info(name)
        raise WeightsError(
            problem, file=info.file, tensor=name, expected=expected, found=f"{info.shape} of {info.dtype.name}"
        )

    def two_dimensions(self, name: str) -> tuple[int, int]:
        shape = self.source.info(name).shape
        if len(shape) != 2:
            self.wrong(name, "a kernel of a quantized module has not two dimensions")
        return shape[0], shape[1]

    def group_box(self, box: Box) -> Box:
        """A box of scales, its groups stated: they are one where each output has one scale."""
        return box if self.quantization.group else (*box, (0, 1))

    def nibbles(self, name: str, box: Box, axis: int, places: np.ndarray | None = None) -> np.ndarray:
        """uint8 0..15 of a box of 4-bit values, eight of which are in a word along `axis`; shaped like the box."""
        start, stop = box[axis]
        words = list(box)
        words[axis] = (start // _PER_WORD, -(-stop // _PER_WORD))
        found = np.ascontiguousarray(self.source.read(name, tuple(words)).astype("<i4", copy=False))
        octets = found.view(np.uint8).reshape(*found.shape, 4)
        values = np.empty((*found.shape, _PER_WORD), np.uint8)
        values[..., 0::2], values[..., 1::2] = octets & 15, octets >> 4
        if places is not None:
            values = values[..., places]
        values = np.moveaxis(values, -1, axis + 1)
        values = values.reshape(*found.shape[:axis], -1, *found.shape[axis + 1 :])
        index = [slice(None)] * values.ndim
        index[axis] = slice(start % _PER_WORD, start % _PER_WORD + stop - start)
        return values[tuple(index)]


class _Int4Module(_Module):
    """Values in groups, with zero points where the quantization has some."""

    def __init__(self, source: WeightSource, base: str, quantization: Quantization):
        super().__init__(source, base, quantization)
        if quantization.zeros:
            self.kinds[ZERO] = self.zeros

    @abstractmethod
    def zeros(self, box: Box) -> np.ndarray:
        """int8 zero points of a box [outputs, groups]; asked for only where the quantization has some."""


class _PackQuantized(_Int4Module):
    def open(self) -> None:
        word = np.dtype("<i4")
        self.kernel = self.use(".weight_packed", None, word)
        outputs, words = self.two_dimensions(self.kernel)
        stated = self.source.read(self.use(".weight_shape", (2,), np.dtype("<i8"), word), ((0, 2),))
        self.shape = tuple(int(size) for size in stated)
        if self.shape[0] != outputs or -(-self.shape[1] // _PER_WORD) != words:
            self.wrong(self.kernel, "weight_shape is not that of weight_packed", self.shape)
        self.scale = self.use(".weight_scale", (outputs, self.groups), *FLOATS)
        if self.quantization.zeros:
            self.zero = self.use(".weight_zero_point", (-(-outputs // _PER_WORD), self.groups), word)

    def weights(self, box: Box) -> np.ndarray:
        return _int4(self.nibbles(self.kernel, box, 1))

    def scales(self, box: Box) -> np.ndarray:
        found = self.source.read(self.scale, self.group_box(box)).astype(np.float32)
        return found if self.quantization.group else found[:, 0]

    def zeros(self, box: Box) -> np.ndarray:
        found = self.nibbles(self.zero, self.group_box(box), 0).astype(np.int8) - np.int8(8)
        return found if self.quantization.group else found[:, 0]


class _Columns(_Int4Module):
    """What AWQ and GPTQ share: scales and zero points by [group, output], the latter packed along the outputs."""

    places: np.ndarray | None = None
    less = 0  # what zero points are stored less

    def tables(self, outputs: int) -> None:
        self.scale = self.use(".scales", (self.groups, outputs), *FLOATS)
        self.zero = self.use(".qzeros", (self.groups, outputs // _PER_WORD), np.dtype("<i4"))

    def scales(self, box: Box) -> np.ndarray:
        if not self.quantization.zeros and np.any(self._zeros(box)):
            self.wrong(self.zero, "the checkpoint is said to be symmetric, and has zero points other than 8")
        found = self.source.read(self.scale, self.group_box(box)[::-1]).T.astype(np.float32)
        return found if self.quantization.group else found[:, 0]

    def zeros(self, box: Box) -> np.ndarray:
        found = self._zeros(box)
        return found if self.quantization.group else found[:, 0]

    def _zeros(self, box: Box) -> np.ndarray:
        stored = self.nibbles(self.zero, self.group_box(box)[::-1], 1, self.places).T
        return ((stored + np.uint8(self.less)) & 15).astype(np.int8) - np.int8(8)


class _Awq(_Columns):
    places = _AWQ_PLACES

    def open(self) -> None:
        self.kernel = self.use(".qweight", None, np.dtype("<i4"))
        inputs, words = self.two_dimensions(self.kernel)
        self.shape = (words * _PER_WORD, inputs)
        self.tables(self.shape[0])

    def weights(self, box: Box) -> np.ndarray:
        return _int4(self.nibbles(self.kernel, box[::-1], 1, self.places).T)


class _GptqV2(_Columns):
    def open(self) -> None:
        self.kernel = self.use(".qweight", None, np.dtype("<i4"))
        words, outputs = self.two_dimensions(self.kernel)
        self.shape = (outputs, words * _PER_WORD)
        if outputs % _PER_WORD:
            self.wrong(self.kernel, "outputs must come in eights", _PER_WORD)
        self.tables(outputs)
        if self.has(".g_idx"):
            name = self.use(".g_idx", (self.shape[1],), np.dtype("<i4"))
            group = self.quantization.group or self.shape[1]
            if not np.array_equal(self.source.read(name, whole((self.shape[1],))), np.arange(self.shape[1]) // group):
                self.wrong(name, "the groups are not in the order of the inputs (desc_act), which is not read")

    def weights(self, box: Box) -> np.ndarray:
        return _int4(self.nibbles(self.kernel, box[::-1], 0).T)


class _Gptq(_GptqV2):
    less = 1


class _Fp8(_Module):
    def open(self) -> None:
        self.dtype = FP8
        self.kernel = self.use(_WEIGHT, None, FP8)
        self.shape = self.two_dimensions(self.kernel)
        outputs = self.shape[0]
        self.scale = self.use(".weight_scale_inv" if self.has(".weight_scale_inv") else ".weight_scale", None, *FLOATS)
        self.used |= {self.base + suffix for suffix in (".input_scale", ".activation_scale") if self.has(suffix)}
        block, found = self.quantization.block, self.source.info(self.scale).shape
        wanted: list[tuple[int, ...]] = [(), (1,), (1, 1), (outputs,), (outputs, 1)]
        if block:
            wanted = [(-(-outputs // block), self.groups)]
        if found not in wanted:
            self.wrong(self.scale, "a tensor of a quantized module is not what its layout says", wanted)

    def weights(self, box: Box) -> np.ndarray:
        return self.source.read(self.kernel, box)

    def scales(self, box: Box) -> np.ndarray:
        block, shape = self.quantization.block, self.source.info(self.scale).shape
        first, last = box[0]
        if block:
            rows = (first // block, -(-last // block))
            found = self.source.read(self.scale, (rows, box[1])).astype(np.float32)
            return found[np.arange(first, last) // block - rows[0]]
        values = self.source.read(self.scale, whole(shape)).astype(np.float32).reshape(-1)
        return np.broadcast_to(values, self.shape[:1])[first:last]


def _int4(values: np.ndarray) -> np.ndarray:
    """int4 of 4-bit values 0..15, less 8."""
    return (values.astype(np.int8) - np.int8(8)).astype(INT4)


#: Layout -> what reads a module of it, and the end of the name that tells such modules.
LAYOUTS: dict[str, tuple[type[_Module], str]] = {
    "pack-quantized": (_PackQuantized, ".weight_packed"),
    "awq": (_Awq, ".qweight"),
    "gptq": (_Gptq, ".qweight"),
    "gptq_v2": (_GptqV2, ".qweight"),
    "fp8": (_Fp8, _WEIGHT),
}
