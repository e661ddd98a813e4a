"""Starts an engine: from the settings of a user to an engine on an executor, in this process or in others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from ryzanstein_jax.config import EngineConfig, OrchestratorConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.open import OpenModel, open_model
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.nccl import NcclConfig
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


def start_engine(
    config: EngineConfig, progress: bool, executor: str, orchestrator: OrchestratorConfig | Mapping[str, Any] | None
) -> tuple[OpenModel, LocalExecutor | MultiGPUOrchestrator, Engine]:
    """Opens a model, makes its executor and its engine, and says what that cost.

    Raises:
        ConfigError: there is no such executor, or the orchestrator's settings are for another one.
    """
    if executor not in EXECUTORS:
        raise ConfigError("executor", executor, f"use one of {', '.join(EXECUTORS)}")
    if orchestrator is not None and executor != "processes":
        raise ConfigError("orchestrator", orchestrator, 'set executor="processes" too')
    opened = open_model(config)
    with progress_bars(progress) as bars:
        made = _make_executor(config, opened, executor, orchestrator, bars)
    if progress:
        say(str(made.report))
    engine = Engine(made, tokenizer=opened.tokenizer, eos_token_ids=opened.eos_token_ids, config=config)
    return opened, made, engine


def _make_executor(
    config: EngineConfig,
    opened: OpenModel,
    executor: str,
    orchestrator: OrchestratorConfig | Mapping[str, Any] | None,
    progress: ProgressBars,
) -> LocalExecutor | MultiGPUOrchestrator:
    # Imported here so that importing this module starts no JAX; with processes, this one never does.
    if executor == "processes":
        from ryzanstein_jax.orchestrator.orchestrator import MultiGPUOrchestrator

        options = orchestrator if isinstance(orchestrator, OrchestratorConfig) else _options(orchestrator or {})
        group = MultiGPUOrchestrator(config, opened.spec, options, progress=progress)
        group.initialize()
        group.load_distributed_model()
        return group
    from ryzanstein_jax.engine.local import LocalExecutor

    return LocalExecutor(config, opened.files, opened.spec, progress=progress)


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
