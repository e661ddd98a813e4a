"""Attention over pages on a CPU: pages are read where they lie, each once for all the query heads of its slot.

A task is a tile, queries of one sequence that follow each other, for one KV slot. A decode token is a tile of one
query: its scores of a few positions fill one vector. Tiles of prompts are products of small matrices: keys are
transposed block by block, so that positions lie in lanes, and a few rows of queries are kept in registers.

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
    DECODE_TABLES,
    HEIGHT,
    KEY_SCALES,
    KEYS,
    LENS,
    MASKED,
    NOTHING,
    OPERANDS,
    OUT,
    STARTS,
    VALUE_SCALES,
    VALUES,
    Q,
    Task,
)  # fmt: skip
from ryzanstein_jax.native.emit import F32, I32, Code
from ryzanstein_jax.native.prompt_attention import PromptTask
from ryzanstein_jax.native.xla import Buffers, add_handler


@dataclass(frozen=True)
class Attention:
    """One layer's attention, as far as its code depends on it.

    Attributes:
        head_dim, queries, page_size: sizes; head_dim and page_size are multiples of the lanes.
        tile: most queries of a prompt's tile.
        dtype: of queries and results: "float32" or "bfloat16".
        pages: dtype of keys and values: the same, or "int8" with a scale for each position (`kv_cache.QuantizedPages`).
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

    def runs_with(self, lanes: int) -> bool:
        """Whether vectors of so many numbers divide pages and heads, and a task fits the stack of a thread."""
        divided = self.page_size % lanes == 0 and self.head_dim % lanes == 0
        known = self.dtype in ("float32", "bfloat16") and self.pages in (self.dtype, "int8")
        return divided and known and self.stack_bytes(lanes) <= MOST_STACK_BYTES

    def span(self, lanes: int) -> int:
        """Positions of a block of transposed keys: whole pairs of vectors, and so never a part of a page's vector."""
        return max(1, min(128, BLOCK_BYTES // (4 * self.head_dim)) // (2 * lanes)) * 2 * lanes

    def stack_bytes(self, lanes: int) -> int:
        """What a task takes of its thread's stack, but for a few variables."""
        rows, span = self.tile * self.queries + HEIGHT, self.span(lanes)
        blocks = self.head_dim * span + HEIGHT * (self.head_dim + span)
        return 4 * (rows * (self.head_dim + 2) + blocks + self.queries * lanes)

    def add_to(self, module: ir.Module, name: str, lanes: int) -> None:
        """Adds the function; operands are those of `attention.attend_by_native`."""

        def task(code: Code, buffers: Buffers, number: Any) -> None:
            _Task(self, code, buffers).write(number)

        add_handler(module, name, lanes, OPERANDS + 2 * (self.pages == "int8"), 1, _count, task)


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
            self._decode(code.calc(number, "%", self.decodes), code.calc(number, "/", self.decodes))
            code.ret_void()
        self._clear(tiles)

    # --- one query

    def _decode(self, seq: Any, slot: Any) -> None:
        code, kernel, lanes = self.code, self.kernel, self.code.lanes
        length = code.get(self.data[DECODE_LENS], seq, I32)
        begin = code.int(0) if kernel.window is None else code.most(code.calc(length, "-", kernel.window), 0)
        first_row = code.calc(seq, "*", self.slots, "+", slot, "*", kernel.queries)
        query = [
            [code.fmul(part, code.vec(kernel.scale)) for part in self.query(code.calc(first_row, "+", i))]
            for i in range(kernel.queries)
        ]
        table = code.at(self.data[DECODE_TABLES], code.calc(seq, "*", self.buffers.dim(DECODE_TABLES, 1)), I32)
        maximum = [code.variable(code.num(NOTHING)) for _ in query]
        total = [code.variable(code.num(0.0)) for _ in query]
        values = [[code.variable(code.vec(0.0)) for _ in range(self.parts)] for _ in query]
        weights = code.room(F32, kernel.queries * lanes)
        with code.loop(code.calc(begin, "/", lanes), code.calc(length, "+", lanes - 1, "/", lanes)) as group:
            position = code.calc(group, "*", lanes)
            row = self.page_row(table, slot, position)
            # The pages lie anywhere, and no processor guesses which is next.
            soon = self.page_row(table, slot, code.least(code.calc(position, "+", lanes), code.calc(length, "-", 1)))
            products: list[list[Any]] = [[] for _ in query]
            for lane in range(lanes):
                key = self.row(self.data[KEYS], code.calc(row, "+", lane))
                for part in range(self.parts):
                    index = code.calc(soon, "+", lane, "*", kernel.head_dim, "+", part * lanes)
                    for pages in (KEYS, VALUES):
                        code.prefetch(self.data[pages], index, self.element)
                for i, parts in enumerate(query):
                    products[i].append(self.dot(parts, key))
            seen = self.between(position, begin, length)
            for i in range(kernel.queries):
                counted = self.scaled(code.sums(products[i]), KEY_SCALES, row)
                scores = code.select(seen, self.capped(counted), code.vec(MASKED))
                weight = self._soften(scores, maximum[i], total[i], values[i])
                code.write(self.scaled(weight, VALUE_SCALES, row), weights, i * lanes)
            with code.loop(0, code.least(code.calc(length, "-", position), lanes)) as lane:
                value = self.row(self.data[VALUES], code.calc(row, "+", lane))
                for i in range(kernel.queries):
                    weight = code.splat(code.get(weights, code.calc(lane, "+", i * lanes)))
                    for part, place in zip(value, values[i], strict=True):
                        code.store(code.multiply_add(weight, part, code.load(place)), place)
        for i in range(kernel.queries):
            factor = code.splat(code.fdiv(code.num(1.0), code.larger(code.load(total[i]), code.num(1e-30))))
            for part, place in enumerate(values[i]):
                index = code.calc(first_row, "+", i, "*", kernel.head_dim, "+", part * lanes)
                code.write(code.fmul(code.load(place), factor), self.data[OUT], index, kernel.dtype)

    def _soften(self, scores: Any, maximum: Any, total: Any, values: list[Any]) -> Any:
        """Adds scores, a vector, to a running softmax; gives their weights."""
        code = self.code
        old = code.load(maximum)
        new = code.larger(old, code.largest_of(scores))
        weight = code.exp(code.fsub(scores, code.splat(new)))
        decay = code.exp_scalar(code.fsub(old, new))
        code.store(new, maximum)
        code.store(code.fadd(code.fmul(code.load(total), decay), code.sum_of(weight)), total)
        for place in values:
            code.store(code.fmul(code.load(place), code.splat(decay)), place)
        return weight

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
