"""Sizes of a model's arrays, padded so that any mesh width works. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.model.spec import ModelSpec


@dataclass(frozen=True)
class HeadLayout:
    """How heads are laid out over a mesh so that any width works for any model.

    Attention is sharded by *KV slot*: a slot holds one KV head and `queries_per_slot` query heads.
    With fewer KV heads than devices a KV head is repeated in several slots and its query heads are
    dealt out among them; slots and query places left over are zero, and add nothing to the sum.
    """

    num_heads: int
    num_kv_heads: int
    num_slots: int
    queries_per_slot: int
    repeats: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, width: int) -> HeadLayout:
        """The layout over `width` devices with the smallest KV cache, then the fewest query heads."""
        group = num_heads // num_kv_heads
        candidates = []
        for repeats in range(1, group + 1):
            slots = -(-num_kv_heads * repeats // width) * width
            candidates.append((slots, slots * -(-group // repeats), repeats))
        # Ties in both go to the fewest copies, which costs the least to load.
        slots, queries, repeats = min(candidates)
        return cls(num_heads, num_kv_heads, slots, queries // slots, repeats)

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """KV head of each slot, [num_slots]; -1 where the slot is padding."""
        heads = [slot // self.repeats for slot in range(self.num_kv_heads * self.repeats)]
        return tuple(heads + [-1] * (self.num_slots - len(heads)))

    @cached_property
    def query_heads(self) -> tuple[tuple[int, ...], ...]:
        """Query heads of each slot, [num_slots][queries_per_slot]; -1 where the place is padding."""
        group = self.num_heads // self.num_kv_heads
        table = []
        for slot, kv_head in enumerate(self.kv_heads):
            first = (slot % self.repeats) * self.queries_per_slot
            places = range(first, first + self.queries_per_slot)
            real = kv_head >= 0
            table.append(tuple(kv_head * group + p if real and p < group else -1 for p in places))
        return tuple(table)

    @cached_property
    def primary_slots(self) -> tuple[bool, ...]:
        """Whether a slot is the first with its KV head, [num_slots]: each KV head counts once."""
        return tuple(h >= 0 and slot % self.repeats == 0 for slot, h in enumerate(self.kv_heads))


@dataclass(frozen=True)
class PaddedSizes:
    """How a model lies on a mesh: the sizes of its arrays, padded for the width, and the name of the rules.

    Attributes:
        width: devices.
        sharding: key of `sharding.RULES`.
    """

    width: int
    heads: HeadLayout
    vocab: int
    ffn: int
    experts: int
    sharding: str = "megatron"

    @classmethod
    def of(cls, spec: ModelSpec, width: int, sharding: str = "megatron") -> PaddedSizes:
        """Raises ConfigError where the rules can't cut this model so."""
        if sharding == "output" and spec.hidden_size % width:
            remedy = f"the hidden size {spec.hidden_size} does not divide by {width}; use megatron"
            raise ConfigError("sharding", sharding, remedy)

        if sharding == "output" and spec.quantization is not None:
            raise ConfigError("sharding", sharding, "a quantized model takes megatron or sequence")

        def pad(size: int, unit: int = 1) -> int:
            return -(-size // (width * unit)) * width * unit

        return cls(
            width=width,
            heads=HeadLayout.of(spec.num_heads, spec.num_kv_heads, width),
            vocab=pad(spec.vocab_size),
            # Each device's part of a kernel whose inputs are in groups must hold whole ones, or equal parts of them.
            ffn=pad(spec.intermediate_size, spec.quantization.ffn_unit if spec.quantization else 1),
            experts=pad(spec.moe.num_experts) if spec.moe else 0,
            sharding=sharding,
        )

    def parameters_per_device(self, spec: ModelSpec) -> int:
        """Parameters on one device, exactly: each sharded dimension divides by the width, the others are repeated."""
        return spec.count_parameters(**self._per_device())

    def weight_bytes_per_device(self, spec: ModelSpec, itemsize: int) -> int:
        """Bytes of the weights on one device, exactly; those that are not quantized take `itemsize` bytes each."""
        return spec.count_bytes(itemsize, **self._per_device())

    def _per_device(self) -> dict[str, int]:
        slots = self.heads.num_slots // self.width
        return {
            "vocab": self.vocab // self.width,
            "query_heads": slots * self.heads.queries_per_slot,
            "kv_heads": slots,
            "ffn": self.ffn // self.width,
            "experts": self.experts // self.width,
        }

    def page_bytes(self, spec: ModelSpec, page_size: int, itemsize: int) -> int:
        """Bytes that one page of KV cache, of all layers and with its tokens' ids, takes on one device.

        Args:
            itemsize: bytes of a cached number.
        """
        slots = self.heads.num_slots // self.width
        return page_size * (2 * spec.num_layers * slots * vector_bytes(spec.head_dim, itemsize) + 4)


def vector_bytes(head_dim: int, itemsize: int) -> int:
    """Bytes that the key or value of a token takes in one slot: 8-bit numbers have a float32 scale beside them."""
    return head_dim * itemsize + (4 if itemsize == 1 else 0)
