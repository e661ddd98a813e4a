"""Starts an engine: from the settings of a user to an engine on an executor, in this process or in others."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from ryzanstein_jax.budget import size_text
from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.open import OpenModel, open_model
from ryzanstein_jax.engine.report import SetupReport
from ryzanstein_jax.errors import ConfigError, RyzansteinError
from ryzanstein_jax.nccl import NcclConfig
from ryzanstein_jax.orchestrator.slots import visible_gpus
from ryzanstein_jax.progress import ProgressBars, progress_bars, say

if TYPE_CHECKING:
    from ryzanstein_jax.engine.local import LocalExecutor
    from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator

#: Where the devices are.
EXECUTORS = ("local", "processes")

#: vLLM's names of settings that have another name here.
_RENAMED = {
    "gpu_memory_utilization": "memory_fraction",
    "block_size": "page_size",
    "num_gpu_blocks_override": "num_pages",
    "tokenizer_revision": "revision",
}


def make_config(model: str, settings: dict[str, Any]) -> EngineConfig:
    """An `EngineConfig` of keyword settings.

    Raises:
        ConfigError: there is no such setting; the message names the nearest.
    """
    known = {field.name for field in fields(EngineConfig)}
    for name, value in settings.items():
        if name not in known:
            remedy = (
                f"use {_RENAMED[name]}" if name in _RENAMED else f"there is no such setting; known: {sorted(known)}"
            )
            raise ConfigError(name, value, remedy)
    return EngineConfig(model, **settings)


def start_engines(
    config: EngineConfig, progress: bool, executor: str, orchestrator: OrchestratorConfig | Mapping[str, Any] | None
) -> tuple[OpenModel, list[tuple[LocalExecutor | MultiGPUOrchestrator, Engine]]]:
    """Opens a model, makes an executor and an engine for each replica, and says what that cost.

    Raises:
        ConfigError: there is no such executor, the orchestrator's settings are for another one, or replicas can't be
            had in this way.
    """
    options = check_start(config, executor, orchestrator)
    opened = open_model(config)
    with progress_bars(progress) as bars:
        made: Sequence[LocalExecutor | MultiGPUOrchestrator]
        if executor == "processes":
            made = _start_groups(config, opened, options or OrchestratorConfig(), bars)
        else:
            # Imported here so that importing this module starts no JAX; with processes, this one never does.
            from ryzanstein_jax.engine.local import LocalExecutor

            made = [LocalExecutor(config, opened.files, opened.spec, progress=bars)]
    if progress:
        say(str(made[0].report))
        if len(made) > 1:
            say(sum_of_replicas(config, [one.report for one in made]))
    numbers = itertools.count()
    return opened, [(one, _make_engine(config, opened, one, numbers)) for one in made]


def _make_engine(
    config: EngineConfig, opened: OpenModel, executor: LocalExecutor | MultiGPUOrchestrator, numbers: Iterator[int]
) -> Engine:
    ends = opened.eos_token_ids
    return Engine(executor, tokenizer=opened.tokenizer, eos_token_ids=ends, config=config, numbers=numbers)


def check_start(
    config: EngineConfig, executor: str, orchestrator: OrchestratorConfig | Mapping[str, Any] | None
) -> OrchestratorConfig | None:
    """The orchestrator's settings; None without one. Nothing is started or looked up for it but this machine's GPUs.

    Raises:
        ConfigError: as `start_engines`.
    """
    if executor not in EXECUTORS:
        raise ConfigError("executor", executor, f"use one of {', '.join(EXECUTORS)}")
    replicas = config.data_parallel_size
    if executor != "processes":
        if orchestrator is not None:
            raise ConfigError("orchestrator", orchestrator, 'set executor="processes" too')
        if replicas > 1:
            raise ConfigError("data_parallel_size", replicas, 'set executor="processes" too')
        return None
    options = orchestrator if isinstance(orchestrator, OrchestratorConfig) else _options(orchestrator or {})
    if replicas > 1:
        for field in ("listen", "cluster", "local_devices"):
            value = getattr(options, field)
            if value is not None:
                raise ConfigError(field, value, "replicas (data_parallel_size) are on this machine: leave it out")
        if not options.process_per_device:
            raise ConfigError(
                "process_per_device", False, "replicas (data_parallel_size) take single devices: use True"
            )
        width, gpus = config.tensor_parallel_size, visible_gpus()
        if gpus and replicas * width > gpus:
            remedy = f"with tensor_parallel_size={width} it takes {replicas * width} GPUs, and {gpus} are here"
            raise ConfigError("data_parallel_size", replicas, f"{remedy}; use at most {max(1, gpus // width)}")
    return options


def _start_groups(
    config: EngineConfig, opened: OpenModel, options: OrchestratorConfig, progress: ProgressBars
) -> list[MultiGPUOrchestrator]:
    """The process groups of all replicas. The first one compiles what the others then find."""
    from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator

    count, is_compiled = config.data_parallel_size, threading.Event()

    def note(replica: int) -> Callable[[str, int, int], None]:
        def told(what: str, done: int, total: int) -> None:
            progress(what if count == 1 else f"{what} ({replica})", done, total)
            if what == "compiling" and done == total:
                is_compiled.set()

        return told

    def start(group: MultiGPUOrchestrator, replica: int) -> None:
        if replica:
            is_compiled.wait()
        group.initialize()
        group.load_distributed_model()
        is_compiled.set()

    groups = [
        MultiGPUOrchestrator(config, opened.spec, options, replica=number, progress=note(number))
        for number in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        starts = [pool.submit(start, group, number) for number, group in enumerate(groups)]
        try:
            for one in starts:
                one.result()
        except BaseException:
            for group in groups:
                with suppress(RyzansteinError):
                    group.cleanup()
            is_compiled.set()
            raise
    return groups


def sum_of_replicas(config: EngineConfig, reports: Sequence[SetupReport]) -> str:
    """What all replicas take together, for people."""
    width, plans = config.tensor_parallel_size, [report.memory for report in reports]
    taken = [plan.weights + plan.temporaries + plan.logits + plan.kv_cache for plan in plans]
    budget, tokens = sum(plan.budget for plan in plans), sum(plan.num_tokens for plan in plans)
    return (
        f"{len(plans)} replicas of {width} device{'s' if width > 1 else ''}: {size_text(width * sum(taken))} of "
        f"{size_text(width * budget)} budget, {tokens} tokens of KV cache together"
    )


def _options(settings: Mapping[str, Any]) -> OrchestratorConfig:
    known = {field.name for field in fields(OrchestratorConfig)}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"orchestrator.{name}", value, f"there is no such setting; known: {sorted(known)}")
    return OrchestratorConfig(**settings)


def parse_options(pairs: Sequence[str] | None) -> OrchestratorConfig | None:
    """Settings of the orchestrator from a command line: NAME=VALUE each; None where there are none.

    Raises:
        ConfigError: one is no such pair, there is no such setting, or its value is invalid.
    """
    if not pairs:
        return None
    kinds = {field.name: str(field.type) for field in fields(OrchestratorConfig)}
    settings: dict[str, Any] = {}
    nccl: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if equals and name.startswith("nccl."):
            nccl[name.removeprefix("nccl.")] = value
            continue
        if not equals or name not in kinds or name == "nccl":
            raise ConfigError(
                "orchestrator", pair, f"write NAME=VALUE with one of {', '.join(sorted(kinds))}; nccl.NAME=VALUE"
            )
        words = {"true": True, "false": False, "none": None}
        try:
            settings[name] = (
                words[value.lower()]
                if value.lower() in words
                else int(value)
                if kinds[name].startswith("int")
                else float(value)
                if kinds[name].startswith("float")
                else value
            )
        except ValueError as error:
            raise ConfigError(f"orchestrator.{name}", value, f"use a value of type {kinds[name]}") from error
    return OrchestratorConfig(**settings, nccl=NcclConfig.of(nccl))


def as_orchestrator(executor: LocalExecutor | MultiGPUOrchestrator) -> MultiGPUOrchestrator | None:
    return cast("MultiGPUOrchestrator", executor) if hasattr(executor, "restart") else None
