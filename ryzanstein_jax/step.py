"""The jitted step: forward over a bucket, then sampling; compiled ahead of time for every bucket.

A step is two programs. *forward* turns tokens into logits and writes the cache, which is donated; of prompts it also
gives the sums of hidden states that embeddings are made of. *sample* turns logits into tokens; its *full* variant also
knows penalties, bias, masks, targets and log-probabilities, and runs only when a row needs them. Sampled tokens stay on
the devices and are an input of the next forward, so a step can be dispatched before the last one's tokens are read.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ryzanstein_jax.batch import Bucket, FullRowLayout, RowLayout, StepLayout, attention_plan
from ryzanstein_jax.budget import resolve_kv_dtype
from ryzanstein_jax.executables import ExecutableStore, environment_of, program_key
from ryzanstein_jax.history import history_counts
from ryzanstein_jax.host_memory import return_host_memory
from ryzanstein_jax.kv_cache import KVCache
from ryzanstein_jax.memory import memory_analysis
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.model.decoder import Decoder
from ryzanstein_jax.model.params import param_specs
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.plan import StepPlan
from ryzanstein_jax.pooling import pool
from ryzanstein_jax.program_table import ProgramTable
from ryzanstein_jax.sampling import Bias, FullRows, Rows, SampleResult, full_sample, sample
from ryzanstein_jax.sharding import RULES, PaddedSizes, named_sharding

Params = tuple[jax.Array, ...]
_CPU_OPTIONS = {"xla_cpu_prefer_vector_width": 512}  # else XLA keeps to half of the widest vectors


@dataclass(frozen=True)
class StepShapes:
    """What fixes the shapes of all programs besides the model.

    Attributes:
        buckets: all buckets.
        num_pages, page_size: of the KV cache.
        table_width: pages of the longest sequence.
        num_logprobs: alternatives per row that the full sampler returns.
        max_bias: most biased tokens of a step.
        kv_cache_dtype: of `config.KV_CACHE_DTYPES`.
    """

    buckets: tuple[Bucket, ...]
    num_pages: int
    page_size: int
    table_width: int
    num_logprobs: int
    max_bias: int
    kv_cache_dtype: str = "auto"

    @property
    def max_rows(self) -> int:
        return max(bucket.sampled_rows for bucket in self.buckets)

    def layout(self, bucket: Bucket) -> StepLayout:
        return StepLayout(bucket, self.page_size, self.table_width)

    def full_layout(self, rows: int) -> FullRowLayout:
        return FullRowLayout(rows, self.table_width, self.max_bias)


class StepPrograms:
    """Lowers and compiles the programs of one model on one mesh, and keeps the compiled ones.

    Args:
        spec, sizes, dtype: the model as `Decoder` takes them.
        mesh: the devices.
        shapes: sizes of steps and cache.
        metrics: counts programs (`compiles`), and those of them that the store had (`executables_loaded`).
        store: keeps compiled programs for the next start; None keeps none.

    Attributes:
        quick: buckets to prefer to smaller ones. All processes of a mesh have to name the same: what each has loaded
            so far may differ, and steps of unlike buckets would mix up their collectives.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sizes: PaddedSizes,
        dtype: jnp.dtype,
        mesh: Mesh,
        shapes: StepShapes,
        *,
        metrics: Metrics | None = None,
        store: ExecutableStore | None = None,
    ):
        self.spec, self.sizes, self.dtype, self.mesh, self.shapes = spec, sizes, jnp.dtype(dtype), mesh, shapes
        rules = self.rules = RULES[sizes.sharding]
        self.metrics = metrics if metrics is not None else Metrics()
        self.store, self.quick = store, frozenset[Bucket]()
        self._environment = environment_of(mesh) if store is not None else {}
        self.replicated = NamedSharding(mesh, PartitionSpec())
        decoder = Decoder(spec, sizes, self.dtype)
        self._graph, state = nnx.split(decoder)
        self._variables = list(nnx.to_flat_state(state))
        self.param_specs = param_specs(decoder)
        self.param_paths = tuple(self.param_specs)
        self.param_shapes = tuple(
            jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=named_sharding(mesh, param.axes, rules))
            for param in self.param_specs.values()
        )
        self._make_tables()

    def _make_tables(self) -> None:
        shapes = self.shapes
        self.cache_shapes = KVCache.shapes(
            self.spec,
            self.sizes,
            self.mesh,
            num_pages=shapes.num_pages,
            page_size=shapes.page_size,
            dtype=resolve_kv_dtype(shapes.kv_cache_dtype, self.dtype),
        )
        self.forwards = self._table("forward", self.lower_forward)
        self.samplers = self._table("sample", self.lower_sample)
        self.full_samplers = self._table("full_sample", self.lower_full_sample)

    def _table(self, kind: str, lower: Callable[[Any], jax.stages.Lowered]) -> ProgramTable:
        return ProgramTable(lambda size, postponed: self._compiled(kind, size, lower, postponed=postponed))

    def with_pages(self, num_pages: int) -> StepPrograms:
        """The same programs for a cache of another size; none of them is compiled yet."""
        other = copy.copy(self)
        other.shapes = replace(self.shapes, num_pages=num_pages)
        other._make_tables()
        return other

    # --- the functions that are traced

    def _decoder(self, params: Params) -> Decoder:
        flat = [
            (path, variable.replace(value)) for (path, variable), value in zip(self._variables, params, strict=True)
        ]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def _forward(self, bucket: Bucket) -> Callable[..., Any]:
        layout = self.shapes.layout(bucket)

        def forward(params: Params, cache: KVCache, flat: jax.Array, previous: jax.Array) -> Any:
            """Logits float32 [sampled_rows, V], those of the step's rows first; cache; sums float32 [prefills, D]."""
            fields = layout.unpack(flat)
            decoder = self._decoder(params)
            # A negative id stands for the token that the previous step sampled at row -(id + 1).
            pending = jnp.take(previous, jnp.maximum(-fields["tokens"] - 1, 0), mode="clip")
            tokens = jnp.where(fields["tokens"] < 0, pending, fields["tokens"])
            hidden, cache = decoder(tokens, fields["positions"], cache, attention_plan(fields))
            logits = decoder.logits(jnp.take(hidden, fields["row_tokens"], axis=0, mode="clip"))
            pooled = pool(hidden[bucket.decodes :], fields["pools"])
            return jnp.pad(logits, ((0, bucket.sampled_rows - bucket.rows), (0, 0))), cache, pooled

        return forward

    def _sample(self, rows: int) -> Callable[..., Any]:
        layout = RowLayout(rows)

        def sample_step(logits: jax.Array, flat: jax.Array) -> jax.Array:
            """Tokens int32 [max_rows], those of the step first."""
            logits = jax.lax.with_sharding_constraint(logits, PartitionSpec())
            tokens = sample(logits, Rows(**layout.unpack(flat)), vocab_size=self.spec.vocab_size)
            return self._pad_rows(tokens)

        return sample_step

    def _full_sample(self, rows: int) -> Callable[..., Any]:
        layout = self.shapes.full_layout(rows)

        def full_sample_step(
            logits: jax.Array, flat: jax.Array, history: jax.Array, mask: jax.Array
        ) -> tuple[jax.Array, SampleResult]:
            """Tokens as `sample_step` gives them, and the full result of `rows` rows."""
            logits = jax.lax.with_sharding_constraint(logits, PartitionSpec())
            f = layout.unpack(flat)
            full_rows = FullRows(
                Rows(**{name: f[name] for name in Rows._fields}),
                *(f[name] for name in FullRows._fields if name != "rows"),
            )
            result = full_sample(
                logits,
                full_rows,
                vocab_size=self.spec.vocab_size,
                num_logprobs=self.shapes.num_logprobs,
                counts=history_counts(f, history, logits.shape[1]),
                bias=Bias(f["bias_row"], f["bias_token"], f["bias_value"]),
                mask=mask,
            )
            return self._pad_rows(result.tokens), result

        return full_sample_step

    def _pad_rows(self, tokens: jax.Array) -> jax.Array:
        return jnp.pad(tokens, (0, self.shapes.max_rows - tokens.shape[0]))

    # --- lowering and compiling

    def _array(self, *shape: int, dtype: Any = jnp.int32, sharding: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.replicated)

    def _logits_shape(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._array(
            rows, self.sizes.vocab, dtype=jnp.float32, sharding=named_sharding(self.mesh, (None, "vocab"), self.rules)
        )

    def lower_forward(self, bucket: Bucket) -> jax.stages.Lowered:
        """The forward of a bucket, lowered; the cache is donated."""
        cache = self.cache_shapes
        with self._context():
            jitted = jax.jit(
                self._forward(bucket),
                donate_argnums=(1,),
                out_shardings=(
                    self._logits_shape(1).sharding,
                    jax.tree.map(lambda s: s.sharding, cache),
                    self.replicated,
                ),
                compiler_options=_CPU_OPTIONS if self.mesh.devices.flat[0].platform == "cpu" else None,
            )
            return jitted.lower(
                self.param_shapes,
                cache,
                self._array(self.shapes.layout(bucket).size),
                self._array(self.shapes.max_rows),
            )

    def lower_sample(self, rows: int) -> jax.stages.Lowered:
        """The sampler of that many rows, lowered."""
        with self._context():
            jitted = jax.jit(self._sample(rows), out_shardings=self.replicated)
            return jitted.lower(self._logits_shape(rows), self._array(RowLayout(rows).size))

    def lower_full_sample(self, rows: int) -> jax.stages.Lowered:
        """The full sampler of that many rows, lowered."""
        with self._context():
            jitted = jax.jit(self._full_sample(rows), out_shardings=self.replicated)
            return jitted.lower(
                self._logits_shape(rows),
                self._array(self.shapes.full_layout(rows).size),
                self.cache_shapes.tokens,
                self._array(rows, self.mask_words, dtype=jnp.uint32),
            )

    @property
    def mask_words(self) -> int:
        return -(-self.spec.vocab_size // 32)

    def _context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        if self.dtype == jnp.float32:
            # Accelerators would round float32 operands to fewer bits.
            stack.enter_context(jax.default_matmul_precision("highest"))
        return stack

    def compile_all(
        self,
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        first: Collection[Bucket] | None = None,
        begin_thread: Callable[[], None] | None = None,
    ) -> list[tuple[ProgramTable, Any]]:
        """Compiles or loads every program that is not there yet, several at a time.

        Args:
            progress: called with how many are done, and of how many.
            first: where given, programs of other buckets that the store holds are postponed until they are wanted.
            begin_thread: called first in each thread that compiles or loads.

        Returns:
            Table and size of all that were postponed, the smallest first.
        """
        rows = sorted({bucket.sampled_rows for bucket in self.shapes.buckets})
        # The largest first, so that none of them is left alone at the end.
        buckets = sorted(self.shapes.buckets, reverse=True, key=lambda b: b.tokens)
        jobs: list[tuple[ProgramTable, str, Any]] = [(self.forwards, "forward", bucket) for bucket in buckets]
        for count in reversed(rows):
            jobs += [(self.full_samplers, "full_sample", count), (self.samplers, "sample", count)]
        wanted = {*(first or ()), *(bucket.sampled_rows for bucket in first or ())}
        now, later = [], []
        for table, kind, size in jobs:
            ready = first is not None and self.store is not None and self.store.holds(self._key(kind, size))
            # Who asks for the full sampler's many features is rare enough to wait for it.
            if size in table or not ready or (size in wanted and table is not self.full_samplers):
                now.append((table, size))
            else:
                table.postponed.add(size)
                later.append((table, size))
        if later:  # they count already: more `compiles` after start-up are a bug
            self.metrics.count("compiles", len(later))
            self.metrics.count("executables_loaded", len(later))
        done = len(later)
        progress(done, len(jobs))

        def compile_one(table: ProgramTable, size: Any) -> None:
            if size not in table:
                table.add(size)
            self.metrics.count("compiles")

        with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1)), initializer=begin_thread) as pool:
            for future in as_completed([pool.submit(compile_one, *job) for job in now]):
                future.result()
                done += 1
                progress(done, len(jobs))
        return later[::-1]

    def temporaries(self, bucket: Bucket) -> int:
        """Bytes that the forward of a bucket takes on a device besides its arguments and results.

        Compiles it, unless it was or the store knows; `compile_all` doesn't compile it again.

        Raises:
            MemoryBudgetError: this backend doesn't tell.
        """
        if bucket not in self.forwards:
            known = self.store.temporaries(self._key("forward", bucket)) if self.store is not None else None
            if known is not None:
                return known
            self.forwards.add(bucket)
        return int(memory_analysis(self.forwards[bucket]).temp_size_in_bytes)

    def make_cache(self) -> KVCache:
        """Allocates the KV cache on the devices; all zero."""
        cache: KVCache = self._compiled("cache", 0, lambda size: KVCache.zeros_of(self.cache_shapes).lower())()
        return cache

    def least(self, value: int) -> int:
        """The smallest of the values, int32, that the processes of the mesh give; each of them has to call it."""
        if jax.process_count() == 1:
            return value
        each = named_sharding(self.mesh, ("vocab",), self.rules)

        def lower(size: int) -> jax.stages.Lowered:
            return jax.jit(jnp.min, out_shardings=self.replicated).lower(self._array(size, sharding=each))

        given = jax.make_array_from_callback((self.mesh.size,), each, lambda index: np.full(1, value, np.int32))
        return int(self._compiled("least", self.mesh.size, lower)(given))

    def replicate(self, values: np.ndarray) -> jax.Array:
        """An array that every process gives alike, on all devices. For start-up: a step takes numpy arrays as they are.

        `jax.device_put` would compare it between the processes.
        """
        return jax.make_array_from_callback(values.shape, self.replicated, lambda index: values[index])

    def _compiled(
        self, kind: str, size: Any, lower: Callable[[Any], jax.stages.Lowered], *, postponed: bool = False
    ) -> jax.stages.Compiled:
        """A program from the store, or else compiled and put there; a postponed one was counted as loaded before."""
        if self.store is None:
            return lower(size).compile()
        key = self._key(kind, size)
        if postponed:
            return_host_memory()  # so that the load does not come on top of what steps left in pieces
        compiled = self.store.load(key, self.mesh)
        if compiled is None:
            if postponed:
                self.metrics.count("compiles")
            return self.store.compile(key, lower(size))
        if postponed:
            return_host_memory()  # nor the next step on top of what the load left
        else:
            self.metrics.count("executables_loaded")
        return compiled

    def _key(self, kind: str, size: object) -> str:
        program = {
            "kind": kind, "size": size, "spec": self.spec, "sizes": self.sizes, "dtype": self.dtype,
            "shapes": self.shapes, "rules": sorted(self.rules.items()),
        }  # fmt: skip
        return program_key(program, self._environment)

    def bucket_of(self, plan: StepPlan) -> Bucket:
        """The cheapest bucket that holds a plan; of the quick ones, if one does."""
        fitting = [bucket for bucket in self.shapes.buckets if bucket.holds(plan)]
        if fitting:
            return next((bucket for bucket in fitting if bucket in self.quick), fitting[0])
        raise ValueError(
            f"no bucket holds {plan.num_decodes} decodes, {plan.num_prefill_tokens} prompt tokens of "
            f"{plan.num_prefills} prompts and {len(plan.rows)} rows"
        )
