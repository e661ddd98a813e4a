"""Which boxes of which tensors make up each parameter; everything is checked here, before anything is read."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ryzanstein_jax.checkpoint.layout import Layout, layout_of
from ryzanstein_jax.checkpoint.names import Spelling, harmless, prefix_of, spellings
from ryzanstein_jax.checkpoint.quantize import DTYPES, SCALE, ZERO, Rounding
from ryzanstein_jax.checkpoint.source import FLOATS, Box, WeightSource, extents, whole
from ryzanstein_jax.errors import WeightsError
from ryzanstein_jax.model.params import ParamSpec
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.sharding import PaddedSizes

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")

#: Parameters that one tensor of the same shape (but for padding) fills: path within a layer -> role, kind.
_WHOLE = {
    "attention_norm.scale": ("attention_norm", "weight"),
    "attention_post_norm.scale": ("attention_post_norm", "weight"),
    "mlp_norm.scale": ("mlp_norm", "weight"),
    "mlp_post_norm.scale": ("mlp_post_norm", "weight"),
    "attention.q_norm.scale": ("q_norm", "weight"),
    "attention.k_norm.scale": ("k_norm", "weight"),
    "attention.out.bias": ("out", "bias"),
    "mlp.down.kernel": ("down", "weight"),
    "mlp.down.bias": ("down", "bias"),
    "mlp.router": ("router", "weight"),
}


@dataclass(frozen=True)
class Part:
    """A box of a parameter that equals a box of a tensor.

    The two boxes have the same extents in the same order once those of 1 are left out. Parts of one `group`
    lie close together in their tensor: they are read in one piece.
    """

    target: Box
    tensor: str
    box: Box
    group: str = ""

    @cached_property
    def dims(self) -> tuple[tuple[int, int], ...]:
        """Pairs of (dimension of the parameter, dimension of the tensor) that run together."""
        targets = [d for d, extent in enumerate(extents(self.target)) if extent != 1]
        sources = [d for d, extent in enumerate(extents(self.box)) if extent != 1]
        assert [extents(self.target)[d] for d in targets] == [extents(self.box)[d] for d in sources], self
        return tuple(zip(targets, sources, strict=True))


@dataclass(frozen=True)
class Recipes:
    """Where all parameters come from.

    Attributes:
        parts: of every parameter, by its path; what no part covers is padding.
        to_quantize: float tensors of which kernels and scales are to be made: what `QuantizingSource` takes.
    """

    parts: dict[str, list[Part]]
    to_quantize: dict[str, Rounding]


def make_recipes(source: WeightSource, spec: ModelSpec, sizes: PaddedSizes, params: Mapping[str, ParamSpec]) -> Recipes:
    """The parts of every parameter.

    Raises:
        WeightsError: a tensor is missing, of another shape or of another kind, or one is left over that the model's
            configuration has no place for.
    """
    book = _Canonical(source) if source.dialect == "canonical" else _HuggingFace(source, spec)
    kernels = [path for path in params if path + SCALE in params]
    companions = {path + kind for path in kernels for kind in (SCALE, ZERO)}
    parts = {
        path: list(book.parts(path, layout_of(path, param, spec, sizes)))
        for path, param in params.items()
        if path not in companions
    }
    to_quantize: dict[str, Rounding] = {}
    for path in kernels:
        kernel = _Kernel(path, params[path], params[path + SCALE], spec)
        for kind in (SCALE, ZERO):
            if path + kind in params:
                parts[path + kind] = list(book.companion_parts(kind, kernel, parts[path], to_quantize))
    for path in params.keys() - companions - set(kernels):
        book.check_float(path, parts[path])
    book.check_left_over()
    return Recipes(parts, to_quantize)


class _Kernel:
    """What the scales of a quantized kernel go by.

    Attributes:
        inputs: dimensions of inputs that a scale is of; 0 where scales are of groups along the last one.
        held: values in such a group on a device.
        group: values in such a group in the kernel's canonical form.
        stored: values in such a group in a ready-made checkpoint; 0: it has none.
    """

    def __init__(self, path: str, param: ParamSpec, scale: ParamSpec, spec: ModelSpec):
        assert spec.quantization is not None
        self.path, self.dtype = path, param.dtype
        self.kind = next(kind for kind, dtype in DTYPES.items() if dtype == param.dtype)
        self.inputs = len(param.shape) - len(scale.shape)
        self.held, self.group, self.stored = 0, 0, 0
        self.ready_made = bool(spec.quantization.layout) and self.kind == spec.quantization.name
        if not self.inputs:
            self.held, self.stored = param.shape[-1] // scale.shape[-1], spec.quantization.group
            # Only an MLP's inputs are cut between devices: elsewhere the groups on a device are the canonical ones.
            self.group = self.stored if param.axes[-1] == "row_ffn" else self.held


class _Book(ABC):
    """Looks tensors up, checks their shape and remembers which were used."""

    def __init__(self, source: WeightSource):
        self.source = source
        self.names = set(source.names())
        self.used: set[str] = set()

    def use(self, name: str, shape: tuple[int, ...], path: str) -> str:
        if name not in self.names:
            raise WeightsError(
                f"the checkpoint lacks a tensor that {path} needs", file=self.source.path, tensor=name, expected=shape
            )
        info = self.source.info(name)
        if info.shape != shape:
            raise WeightsError(
                "a tensor's shape is not what the model's configuration says",
                file=info.file, tensor=name, expected=shape, found=info.shape,
            )  # fmt: skip
        self.used.add(name)
        return name

    @abstractmethod
    def parts(self, path: str, layout: Layout) -> Iterator[Part]:
        """The boxes that make up one parameter."""

    @abstractmethod
    def tensor_inputs(self, inputs: int) -> int:
        """How many of a tensor's last dimensions are those `inputs` of its parameter."""

    def companion_parts(
        self, kind: str, kernel: _Kernel, parts: list[Part], to_quantize: dict[str, Rounding]
    ) -> Iterator[Part]:
        """The parts of a quantized kernel's scales or zero points; float tensors go to `to_quantize`."""
        done = set()
        for part in parts:
            info, group, inputs = self.source.info(part.tensor), kernel.group, self.tensor_inputs(kernel.inputs)
            name, dtype = part.tensor + kind, info.dtype
            if dtype in FLOATS and not kernel.ready_made:
                to_quantize[part.tensor] = Rounding(kernel.kind, inputs, group)
            elif dtype == kernel.dtype or (kernel.kind, dtype) == ("int4", np.int8):  # files hold int4 as int8
                group = kernel.stored if kernel.ready_made and self.source.dialect == "huggingface" else group
            else:
                raise WeightsError(
                    "the checkpoint holds a kernel in another precision than its configuration says",
                    file=info.file, tensor=part.tensor, expected=f"{kernel.dtype.name} for {kernel.path}",
                    found=dtype.name,
                )  # fmt: skip
            lead = info.shape[: len(info.shape) - inputs] if kernel.inputs else info.shape[:-1]
            shape = lead if kernel.inputs else (*lead, -(-info.shape[-1] // group))
            plain = True
            if part.tensor not in to_quantize:
                plain = name not in self.names or self.source.info(name).shape != (*shape, 1) or bool(kernel.held)
                self.use(name, shape if plain else (*shape, 1), f"the {kind[1:]}s of {part.tensor}")
            for target, box in _of_groups(part, kernel, group) if kernel.held else [_of_outputs(part, kernel, inputs)]:
                if (target, box) not in done:  # heads along the inputs share their channels' scales
                    done.add((target, box))
                    yield Part(target, name, box if plain else (*box, (0, 1)), part.group)

    def check_float(self, path: str, parts: list[Part]) -> None:
        for part in parts:
            info = self.source.info(part.tensor)
            if info.dtype not in FLOATS:
                raise WeightsError(
                    f"the checkpoint holds {info.dtype.name} where the model computes in floats",
                    file=info.file, tensor=part.tensor, expected=f"floats for {path}", found=info.dtype.name,
                )  # fmt: skip

    def harmless(self, name: str) -> bool:
        return False

    def check_left_over(self) -> None:
        rest = sorted(name for name in self.names - self.used if not self.harmless(name))
        if rest:
            raise WeightsError(
                "the checkpoint holds tensors that the model's configuration has no place for; "
                "leaving them out would change what it computes",
                file=self.source.info(rest[0]).file,
                tensor=rest[0],
                found=f"{len(rest)} such tensors: {', '.join(rest[:4])}",
            )


class _Canonical(_Book):
    """A source that holds the parameters themselves, unpadded, under their own paths."""

    def parts(self, path: str, layout: Layout) -> Iterator[Part]:
        name = self.use(path, layout.canonical, path)
        if layout.cells is None or layout.axis is None or layout.trivial:
            yield Part(whole(layout.canonical), name, whole(layout.canonical))
            return
        heads = layout.canonical[layout.axis : layout.axis + layout.cells.ndim]
        for place, head in _cells(layout):
            cell = tuple(int(i) for i in np.unravel_index(head, heads))
            yield Part(_at(layout, layout.shape, place), name, _at(layout, layout.canonical, cell))

    def tensor_inputs(self, inputs: int) -> int:
        return inputs


class _HuggingFace(_Book):
    def __init__(self, source: WeightSource, spec: ModelSpec):
        super().__init__(source)
        self.spec = spec
        self.prefix, self.head = prefix_of(self.names)

    def tensor_inputs(self, inputs: int) -> int:
        return 1

    def harmless(self, name: str) -> bool:
        return harmless(name) or (self.spec.tie_embeddings and name in (self.head, self.head + SCALE))

    def parts(self, path: str, layout: Layout) -> Iterator[Part]:
        match = _LAYER.fullmatch(path)
        if match is None:
            yield self._top(path, layout)
            return
        layer, rest = int(match[1]), match[2]
        if rest in ("attention.qkv.kernel", "attention.qkv.bias"):
            yield from self._qkv(path, layout, layer, "weight" if rest.endswith("kernel") else "bias")
        elif rest == "attention.out.kernel" or (rest in _WHOLE and layout.cells is not None):
            yield from self._heads(path, layout, layer, *_WHOLE.get(rest, ("out", "weight")))
        elif rest in _WHOLE:
            role, kind = _WHOLE[rest]
            name = self.use(self._find(role, layer, kind).name, layout.canonical, path)
            yield Part(whole(layout.canonical), name, whole(layout.canonical))
        elif rest in ("mlp.gate_up.kernel", "mlp.gate_up.bias"):
            kind = "weight" if rest.endswith("kernel") else "bias"
            ffn, _, *rest_shape = layout.canonical
            for index, role in enumerate(("gate", "up")):
                name, box = self._projection(path, role, layer, kind, (ffn, *rest_shape))
                yield Part(((0, ffn), (index, index + 1), *whole(tuple(rest_shape))), name, box, role)
        elif rest in ("mlp.gate_up", "mlp.down"):
            yield from self._experts(path, layout, layer, rest == "mlp.down")
        else:
            raise WeightsError("no rule says where this parameter comes from", tensor=path)

    def _top(self, path: str, layout: Layout) -> Part:
        if path == "unembed.table":
            name = self.head
        else:
            role = {"embedding.table": "embedding", "final_norm.scale": "final_norm"}.get(path)
            if role is None:
                raise WeightsError("no rule says where this parameter comes from", tensor=path)
            name = self._find(role, 0, "weight").name
        return Part(whole(layout.canonical), self.use(name, layout.canonical, path), whole(layout.canonical))

    def _find(self, role: str, layer: int, kind: str) -> Spelling:
        known = list(spellings(role, layer, kind, self.spec.norms, self.prefix))
        # Where none is held, the commonest is the one to name as missing.
        return next((s for s in known if s.of_expert(0) in self.names), known[0])

    def _projection(self, path: str, role: str, layer: int, kind: str, shape: tuple[int, ...]) -> tuple[str, Box]:
        """A projection's tensor and its box there, which is less than the whole where it is fused."""
        spelling = self._find(role, layer, kind)
        start, rows = 0, shape[0]
        if spelling.segment:
            start, rows = self._segment(spelling.segment, shape[0])
        name = self.use(spelling.name, (rows, *shape[1:]), path)
        return name, ((start, start + shape[0]), *whole(shape[1:]))

    def _segment(self, segment: str, rows: int) -> tuple[int, int]:
        """First row of a segment and the rows of its whole fused tensor."""
        if segment in ("gate", "up"):
            return (0 if segment == "gate" else rows), 2 * rows
        spec = self.spec
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return {"q": 0, "k": query, "v": query + key}[segment], query + 2 * key

    def _qkv(self, path: str, layout: Layout, layer: int, kind: str) -> Iterator[Part]:
        spec = self.spec
        group, size = spec.queries_per_kv_head, spec.head_dim
        rest = layout.canonical[3:]
        boxes = {
            role: self._projection(path, role, layer, kind, (count * size, *rest))
            for role, count in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads))
        }
        for place, index in _cells(layout):
            kv_head, row = divmod(index, group + 2)
            role = "q" if row < group else "kv"[row - group]
            head = kv_head * group + row if row < group else kv_head
            name, box = boxes[role]
            first = box[0][0] + head * size
            yield Part(_at(layout, layout.shape, place), name, ((first, first + size), *box[1:]), role)

    def _heads(self, path: str, layout: Layout, layer: int, role: str, kind: str) -> Iterator[Part]:
        """A tensor with one dimension that runs over all heads' features: o_proj and OLMo-2's qk norms."""
        assert layout.axis is not None and layout.cells is not None
        before, dims = layout.canonical[: layout.axis], layout.cells.ndim
        size = layout.canonical[layout.axis + dims]
        count = math.prod(layout.canonical[layout.axis : layout.axis + dims])
        name = self.use(self._find(role, layer, kind).name, (*before, count * size), path)
        for place, head in _cells(layout):
            yield Part(_at(layout, layout.shape, place), name, (*whole(before), (head * size, (head + 1) * size)))

    def _experts(self, path: str, layout: Layout, layer: int, down: bool) -> Iterator[Part]:
        count = layout.canonical[0]
        shape = layout.canonical[1:] if down else layout.canonical[2:]
        for index, role in enumerate(("expert_down",) if down else ("expert_gate", "expert_up")):
            spelling = self._find(role, layer, "weight")
            start, rows = self._segment(spelling.segment, shape[0]) if spelling.segment else (0, shape[0])
            inner: Box = ((start, start + shape[0]), *whole(shape[1:]))
            middle: Box = () if down else ((index, index + 1),)
            for expert in range(count):
                one: Box = ((expert, expert + 1),)
                target = one + middle + whole(shape)
                if spelling.per_expert:
                    name = self.use(spelling.of_expert(expert), (rows, *shape[1:]), path)
                    yield Part(target, name, inner)
                else:
                    name = self.use(spelling.name, (count, rows, *shape[1:]), path)
                    # Read one expert at a time: together they may be gigabytes.
                    yield Part(target, name, one + inner, f"{role}{expert}")


def _of_outputs(part: Part, kernel: _Kernel, tensor_inputs: int) -> tuple[Box, Box]:
    """Where the scales of a part's outputs lie, and what box of the tensor's scales they are."""
    return part.target[: -kernel.inputs], part.box[:-tensor_inputs]


def _of_groups(part: Part, kernel: _Kernel, group: int) -> Iterator[tuple[Box, Box]]:
    """The same for groups along the last dimension: runs of a device's groups that follow each other in the tensor.

    A group of the device lies in one of the tensor's, whose scale it takes; several may lie in the same.
    """
    (start, stop), first = part.target[-1], part.box[-1][0]
    taken = [
        (place // kernel.held, (first + place - start) // group)
        for place in range(start // kernel.held * kernel.held, stop, kernel.held)
    ]
    begin = 0
    for index in range(1, len(taken) + 1):
        follows = index < len(taken) and taken[index][1] == taken[index - 1][1] + 1
        if not follows:
            (target, source), count = taken[begin], index - begin
            yield (*part.target[:-1], (target, target + count)), (*part.box[:-1], (source, source + count))
            begin = index


def _cells(layout: Layout) -> Iterator[tuple[tuple[int, ...], int]]:
    """(place, head) for each place of heads that is not padding."""
    assert layout.cells is not None
    for place, head in np.ndenumerate(layout.cells):
        if head >= 0:
            yield tuple(int(i) for i in place), int(head)


def _at(layout: Layout, shape: tuple[int, ...], place: tuple[int, ...]) -> Box:
    """The box of one head in a shape."""
    assert layout.axis is not None
    box = list(whole(shape))
    box[layout.axis : layout.axis + len(place)] = [(i, i + 1) for i in place]
    return tuple(box)
