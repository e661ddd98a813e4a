"""Attention over pages on a CPU: pages are read where they lie, each once for all the query heads of its slot.

A task is a tile, queries of one sequence that follow each other, for one KV slot (`prompt_attention`), or one decode
token for one slot (`decode_attention`).

Names in the code: H head_dim, Q query heads per slot, row one query head of one query of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ryzanstein_jax.native import MOST_STACK_BYTES
from ryzanstein_jax.native.attention_parts import (
    BLOCK_BYTES,
    DECODE_LENS,
    HEIGHT,
    KEYS,
    LENS,
    OPERANDS,
    OUT,
    STARTS,
    Q,
    Task,
)  # fmt: skip
from ryzanstein_jax.native.decode_attention import DECODE_SPAN, DecodeTask
from ryzanstein_jax.native.emit import ELEMENTS, I8, I32, Code
from ryzanstein_jax.native.prompt_attention import PromptTask
from ryzanstein_jax.native.xla import Buffers, add_handler


@dataclass(frozen=True)
class Attention:
    """One layer's attention, as far as its code depends on it.

    Attributes:
        head_dim, queries, page_size: sizes; head_dim and page_size are multiples of the lanes.
        tile: most queries of a prompt's tile.
        dtype: of queries and results: "float32" or "bfloat16".
        pages: dtype of keys and values: the same, or "int8", or "uint8" for the bits of float8_e4m3fn, both with a
            scale for each position (`kv_cache.QuantizedPages`).
        scale, window, softcap: as `attention.attend` takes them.
    """

    head_dim: int
    queries: int
    page_size: int
    tile: int
    dtype: str
    pages: str
    scale: float
    window: int | None
    softcap: float | None

    @property
    def has_scales(self) -> bool:
        """Whether numbers of the pages take 8 bits."""
        return ELEMENTS.get(self.pages) is I8

    def runs_with(self, lanes: int) -> bool:
        """Whether vectors of so many numbers divide pages and heads, and a task fits the stack of a thread."""
        divided = self.page_size % lanes == 0 and self.head_dim % lanes == 0
        known = self.dtype in ("float32", "bfloat16") and (self.has_scales or self.pages == self.dtype)
        return divided and known and self.stack_bytes(lanes) <= MOST_STACK_BYTES

    def span(self, lanes: int) -> int:
        """Positions of a block of transposed keys: whole pairs of vectors, and so never a part of a page's vector."""
        return max(1, min(128, BLOCK_BYTES // (4 * self.head_dim)) // (2 * lanes)) * 2 * lanes

    def stack_bytes(self, lanes: int) -> int:
        """What a task takes of its thread's stack, but for a few variables."""
        rows, span = self.tile * self.queries + HEIGHT, self.span(lanes)
        blocks = self.head_dim * span + HEIGHT * (self.head_dim + span)
        return 4 * (rows * (self.head_dim + 2) + blocks + self.queries * DECODE_SPAN)

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        """Adds the function; operands are those of `attention.attend_by_native`."""

        def task(code: Code, buffers: Buffers, number: Any) -> None:
            _Task(self, code, buffers).write(number)

        add_handler(module, name, lanes, OPERANDS + 2 * self.has_scales, 1, _count, task)


def _count(code: Code, buffers: Buffers) -> Any:
    decodes = buffers.dim(DECODE_LENS, 0)
    tasks = code.calc(buffers.dim(STARTS, 0), "+", decodes, "*", buffers.dim(KEYS, 1))
    # Where there are prompts, one more clears what belongs to no tile.
    return code.calc(tasks, "+", code.least(code.calc(buffers.dim(Q, 0), "-", decodes), 1))


class _Task(Task):
    """The task of a number: a tile, a decode token, or what belongs to neither."""

    def write(self, task: Any) -> None:
        code, buffers = self.code, self.buffers
        tiles = buffers.dim(STARTS, 0)
        prompt_tasks = code.calc(tiles, "*", self.slots)
        tasks = code.calc(self.decodes, "*", self.slots, "+", prompt_tasks)
        # The longest tasks first. Neighbours have the slot in common, and with it pages that their sequences share.
        with code.if_then(code.icmp_signed("<", task, prompt_tasks)):
            tile = code.calc(task, "%", tiles)
            with code.if_then(code.icmp_signed(">", code.get(self.data[LENS], tile, I32), code.int(0))):
                PromptTask(self.kernel, code, buffers).write(tile, code.calc(task, "/", tiles))
            code.ret_void()
        with code.if_then(code.icmp_signed("<", task, tasks)):
            number = code.calc(task, "-", prompt_tasks)
            decode = DecodeTask(self.kernel, code, buffers)
            decode.write(code.calc(number, "%", self.decodes), code.calc(number, "/", self.decodes))
            code.ret_void()
        self._clear(tiles)

    def _clear(self, tiles: Any) -> None:
        """Zeros for the tokens behind those of the last tile."""
        code = self.code
        end = code.variable(code.int(0))
        with code.loop(0, tiles) as tile:
            last = code.calc(code.get(self.data[STARTS], tile, I32), "+", code.get(self.data[LENS], tile, I32))
            code.store(code.most(code.load(end), last), end)
        heads = code.calc(self.slots, "*", self.kernel.queries * self.kernel.head_dim)
        first = code.calc(code.calc(self.decodes, "+", code.load(end)), "*", heads)
        with code.loop(first, code.calc(self.buffers.dim(Q, 0), "*", heads), code.lanes) as index:
            code.write(code.vec(0.0), self.data[OUT], index, self.kernel.dtype)
