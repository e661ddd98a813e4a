"""`LocalExecutor`: this process owns the devices. For notebooks, scripts and tests."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ryzanstein_jax.batch import Bucket, bucket_ladder
from ryzanstein_jax.budget import resolve_dtype, resolve_fraction
from ryzanstein_jax.cache import cache_dir
from ryzanstein_jax.checkpoint.assemble import LoadReport, load_params, with_recipes
from ryzanstein_jax.checkpoint.converted import ConvertedWeights
from ryzanstein_jax.checkpoint.dummy import dummy_params
from ryzanstein_jax.checkpoint.files import SNAPSHOT_POOLING, ModelFiles, open_source
from ryzanstein_jax.checkpoint.source import WeightSource
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.open import open_model, save_tokenizer
from ryzanstein_jax.engine.process import prepare_process, step_back
from ryzanstein_jax.engine.profiled import ProfiledRunner, profile_folder
from ryzanstein_jax.engine.report import RankUsage, SetupReport
from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.engine.usage import UsageMeter
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.host_memory import memory_ranges, return_host_memory, settle_host_memory, use_huge_pages
from ryzanstein_jax.memory import device_bytes, plan_memory, weight_bytes
from ryzanstein_jax.metrics import Metrics
from ryzanstein_jax.model.decoder import Decoder
from ryzanstein_jax.model.params import ParamSpec, param_specs
from ryzanstein_jax.model.quantization import Quantization
from ryzanstein_jax.model.quantized_checkpoints import quantization_config
from ryzanstein_jax.model.spec import ModelSpec
from ryzanstein_jax.plan import StepPlan, StepResult, most_prompt_tokens
from ryzanstein_jax.program_table import BackgroundLoader
from ryzanstein_jax.request import MAX_STOPS
from ryzanstein_jax.sharding import Collective, PaddedSizes, collectives, make_mesh
from ryzanstein_jax.step import StepPrograms, StepShapes

Progress = Callable[[str, int, int], None]


class LocalExecutor:
    """Compiles, loads and runs a model on devices of this process.

    In a job of several processes (`jax.distributed`) the mesh spans the devices of all: every process makes one
    executor of the same configuration and submits the same plans in the same order, and each gets the whole result.

    Args:
        config: the settings.
        files: the model, as `resolve_model` found it.
        spec: what it computes, as `spec_from_config` read it.
        progress: called with what is going on, how much is done, and of how much.
        first: the steps that will come first, as (decode tokens, prompt tokens) each: their programs are loaded
            before the executor is ready. Others that earlier starts left on disk are loaded when a step wants
            them, or while there are no steps.
        hurry: run steps in the buckets of `first`, where they fit, rather than wait until their own are loaded; see
            `in_haste`. They round otherwise, so two runs may differ in the last bits of a log-probability.
        pause: for a process that shall be ready, and not in the way until it is needed. Programs are loaded with low
            priority; then this is called, and when it returns, weights and cache take their memory.

    Raises:
        ConfigError: there are too few devices.
        MemoryBudgetError: the model does not fit; nothing was loaded.
        WeightsError: the weights are missing or broken.
    """

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        spec: ModelSpec,
        *,
        progress: Progress = lambda what, done, total: None,
        first: Collection[tuple[int, int]] = ((0, 1), (1, 0)),
        hurry: bool = False,
        pause: Callable[[], None] | None = None,
    ):
        store = prepare_process(config)
        mesh = make_mesh(config.tensor_parallel_size)
        if not mesh.local_devices:
            remedy = f"process {jax.process_index()} has none of the first devices; start fewer processes, or widen"
            raise ConfigError("tensor_parallel_size", config.tensor_parallel_size, remedy)
        profile = profile_folder(config.profile_dir) if config.profile_dir else None
        # Of a mesh over several processes this one sees and measures its own devices only.
        device = mesh.local_devices[0]
        self.metrics = Metrics()
        self.spec, self.mesh = spec, mesh
        dtype = resolve_dtype(config.dtype, spec.dtype, device.platform)
        sizes = PaddedSizes.of(spec, config.tensor_parallel_size, config.sharding)
        max_model_len = config.max_model_len or spec.max_position_embeddings

        began = time.perf_counter()
        prompt_tokens = most_prompt_tokens(config.max_num_batched_tokens, config.max_num_seqs, max_model_len)
        buckets = bucket_ladder(config.max_num_seqs, prompt_tokens)
        max_rows = max(bucket.sampled_rows for bucket in buckets)
        shapes = StepShapes(
            buckets=tuple(buckets),
            # As few pages as there can be until it is known how many fit.
            num_pages=config.num_pages or 2,
            page_size=config.page_size,
            table_width=-(-max_model_len // config.page_size),
            num_logprobs=min(config.max_logprobs, sizes.vocab),
            max_bias=max_rows * (config.max_logit_bias + MAX_STOPS + len(spec.eos_token_ids)),
            kv_cache_dtype=config.kv_cache_dtype,
        )

        programs = StepPrograms(spec, sizes, dtype, mesh, shapes, metrics=self.metrics, store=store)
        progress("measuring memory", 0, 1)
        temporaries = programs.temporaries(buckets[-1])
        progress("measuring memory", 1, 1)
        memory = plan_memory(
            spec=spec,
            sizes=sizes,
            dtype=dtype,
            total=device_bytes(sum(d.process_index == jax.process_index() for d in mesh.devices.flat), device),
            memory_fraction=resolve_fraction(config.memory_fraction, device.platform),
            weights=weight_bytes(programs.param_shapes),
            temporaries=temporaries,
            # Of two steps, and copies made whole for the sampler.
            logits=4 * max_rows * sizes.vocab * 4,
            page_size=config.page_size,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            num_pages=config.num_pages,
            kv_cache_dtype=config.kv_cache_dtype,
        )
        if config.num_pages is None:
            memory = dataclasses.replace(memory, num_pages=programs.least(memory.num_pages))
            programs = programs.with_pages(memory.num_pages)

        with ThreadPoolExecutor(1) as loader:
            load = partial(_load, config, files, spec, sizes, programs)
            loading = loader.submit(load) if pause is None else None
            needed = {_bucket_for(buckets, *step) for step in first}
            self._quick = frozenset(needed) if hurry else frozenset()
            postponed = programs.compile_all(
                lambda done, total: progress("compiling", done, total),
                first=needed,
                begin_thread=step_back if pause is not None else None,
            )
            compile_seconds = time.perf_counter() - began
            if pause is not None:
                return_host_memory()
                pause()
            progress("loading weights", 0, 1)
            loaded = loading.result() if loading is not None else load()
            progress("loading weights", 1, 1)
        if device.platform == "cpu":
            settle_host_memory()
        self._programs = programs
        runner = Runner(programs, loaded.params, max_model_len=max_model_len)
        self._runner = ProfiledRunner(runner, profile, config.profile_steps) if profile else runner
        self.limits = self._runner.limits
        self.report = SetupReport(
            device=f"{mesh.size} x {device.platform} ({device.device_kind})",
            dtype=str(dtype),
            memory=memory,
            load={} if loaded.report is None else dataclasses.asdict(loaded.report),
            load_seconds=loaded.seconds,
            compile_seconds=compile_seconds,
            num_programs=self.metrics.counter("compiles"),
            num_loaded=self.metrics.counter("executables_loaded"),
            kv_cache_dtype=config.kv_cache_dtype,
        )
        self._last_step = time.monotonic()

        # Asked now: a step gives the cache's memory to other arrays.
        places = memory_ranges(runner.arrays()) if device.platform == "cpu" else []

        def afterwards() -> None:
            use_huge_pages(places)
            if loaded.keep is not None:
                loaded.keep()

        self._background = BackgroundLoader(postponed, afterwards, self._idle_seconds)
        self._meter = UsageMeter(programs, runner, mesh.local_devices)

    @property
    def has_loaded(self) -> bool:
        """Whether all programs are loaded, so that there is no reason for haste any more."""
        return self._background.has_loaded

    def stop_loading(self) -> None:
        """Loads no further program before a step wants it."""
        self._background.stop()

    def in_haste(self, hasty: bool) -> None:
        """Whether the steps that follow prefer the buckets of `first`. The same on all processes, or they hang."""
        self._programs.quick = self._quick if hasty else frozenset()

    def submit(self, plan: StepPlan) -> None:
        self._last_step = time.monotonic()
        self._runner.submit(plan)

    def collect(self) -> StepResult:
        result = self._runner.collect()
        self._last_step = time.monotonic()
        return result

    def _idle_seconds(self) -> float:
        return 0.0 if self._runner.num_in_flight else time.monotonic() - self._last_step

    def usage(self) -> list[RankUsage]:
        """What the devices of this process hold and have communicated, at most a second ago."""
        return self._meter.latest

    def close(self) -> None:
        self._meter.stop()
        self.stop_loading()
        self._runner.close()

    def collectives(self) -> dict[str, list[Collective]]:
        """What each compiled forward and sampler communicates, by program."""
        self._background.load_all()
        found = {f"forward, {bucket}": collectives(program) for bucket, program in self._programs.forwards.items()}
        found |= {f"sample, {rows} rows": collectives(program) for rows, program in self._programs.samplers.items()}
        return found


def _bucket_for(buckets: list[Bucket], decodes: int, prompt_tokens: int) -> Bucket:
    """The cheapest bucket for so many tokens, or the largest."""
    fit = (b for b in buckets if b.decodes >= decodes and b.prefill_tokens >= prompt_tokens)
    return next(fit, buckets[-1])


def snapshot_model(config: EngineConfig, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Loads a model's weights, sharded as configured, and writes them as a snapshot.

    Raises:
        ConfigError, UnsupportedModelError, WeightsError: as `LocalExecutor`; or the folder exists.
    """
    # Imported here because Orbax takes longer to import than all the rest of this package.
    from ryzanstein_jax.checkpoint.snapshot_writer import save_snapshot

    prepare_process(config)
    opened = open_model(config)
    files, spec = opened.files, opened.spec
    mesh = make_mesh(config.tensor_parallel_size)
    dtype = resolve_dtype(config.dtype, spec.dtype, mesh.devices.flat[0].platform)
    sizes = PaddedSizes.of(spec, config.tensor_parallel_size)
    params = param_specs(Decoder(spec, sizes, dtype))
    arrays, _ = load_params(open_source(files), spec, sizes, params, mesh)
    with tempfile.TemporaryDirectory() as scratch:
        extra = [file for file in (files.tokenizer_config, files.chat_template) if file is not None]
        if files.tokenizer is not None and files.tokenizer.suffix == ".gguf":
            assert opened.tokenizer is not None
            extra = save_tokenizer(opened.tokenizer, Path(scratch))
        elif files.tokenizer is not None:
            extra.append(files.tokenizer)
        if files.pooling_config:
            extra.append(Path(scratch) / SNAPSHOT_POOLING)
            extra[-1].write_text(json.dumps(files.pooling_config))
        stored = dict(files.config)
        if spec.quantization is not None:
            stored["quantization_config"] = quantization_config(spec.quantization)
        return save_snapshot(folder, arrays, params, spec, sizes, config=stored, files=extra, overwrite=overwrite)


def _load(
    config: EngineConfig, files: ModelFiles, spec: ModelSpec, sizes: PaddedSizes, programs: StepPrograms
) -> _Loaded:
    began = time.perf_counter()
    params: dict[str, ParamSpec] = programs.param_specs
    load = keep = None
    if files.kind == "dummy":
        arrays = dummy_params(spec, sizes, params, programs.mesh, seed=config.seed)
    else:
        source, keep = _fastest_source(
            config, files, programs.dtype, spec.quantization, lambda it: with_recipes(it, spec, sizes, params)[0]
        )
        arrays, load = load_params(source, spec, sizes, params, programs.mesh)
    ordered = tuple(arrays[path] for path in programs.param_paths)
    jax.block_until_ready(ordered)
    return _Loaded(ordered, load, time.perf_counter() - began, keep)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    params: tuple[jax.Array, ...]
    report: LoadReport | None
    seconds: float
    keep: Callable[[], object] | None  # what makes the next start faster, to be called once there is time


def _fastest_source(
    config: EngineConfig,
    files: ModelFiles,
    dtype: np.dtype,
    quantization: Quantization | None = None,
    quantized: Callable[[WeightSource], WeightSource] = lambda source: source,
) -> tuple[WeightSource, Callable[[], object] | None]:
    if files.kind != "gguf" or not config.weights_cache_gib:
        return open_source(files), None
    room = int(config.weights_cache_gib * 2**30)
    converted = ConvertedWeights(cache_dir() / "weights", files.path, dtype, room, quantization)
    source = converted.open()
    if source is not None:
        return source, None
    source = quantized(open_source(files))
    # One process writes for all of this job.
    keep = partial(converted.write, source) if jax.process_index() == 0 and converted.pays(source) else None
    return source, keep
