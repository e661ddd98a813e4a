"""Options that commands share, and what they make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ryzanstein_jax.config import DTYPES, KV_CACHE_DTYPES, LOAD_FORMATS, QUANTIZATIONS, SHARDINGS
from ryzanstein_jax.llm import LLM
from ryzanstein_jax.request import SamplingParams

Model = Annotated[str, typer.Argument(help='Hugging Face id, folder, .gguf file, snapshot, or "smollm2".')]
Width = Annotated[int, typer.Option("--tensor-parallel-size", "--tp", "-t", help="Devices to shard over.")]
Replicas = Annotated[
    int,
    typer.Option(
        "--data-parallel-size", "--dp",
        help="Replicas of the engine, each on --tensor-parallel-size devices of its own; with --executor processes.",
    ),
]  # fmt: skip
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantization", help=f"One of {', '.join(QUANTIZATIONS)}; as the checkpoint is if not given."),
]
CacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        help=f"Of the KV cache, one of {', '.join(KV_CACHE_DTYPES)}; auto: as activations. See docs/quantization.md.",
    ),
]
Sharding = Annotated[
    str, typer.Option(help=f"What the devices say to each other: {', '.join(SHARDINGS)}. See docs/sharding.md.")
]
Executor = Annotated[
    str,
    typer.Option(help='"local", or "processes": a worker process for each device, replaced when it dies.'),
]
Orchestrator = Annotated[
    list[str] | None,
    typer.Option("--orchestrator", "-O", help="NAME=VALUE of OrchestratorConfig. May be given more than once."),
]
LoadFormat = Annotated[str, typer.Option(help=f"One of {', '.join(LOAD_FORMATS)}.")]
MaxLen = Annotated[int | None, typer.Option("--max-model-len", help="Longest prompt and completion, in tokens.")]
MaxSeqs = Annotated[int | None, typer.Option("--max-num-seqs", help="Most sequences in a step.")]
Fraction = Annotated[float | None, typer.Option("--memory-fraction", help="Share of each device's memory.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Longest completion, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; the model's own if not given.")]
TopP = Annotated[float | None, typer.Option(help="Keep the tokens that reach this probability together.")]
Profile = Annotated[
    Path | None, typer.Option("--profile", help="Folder for a JAX trace of some steps and a table of their times.")
]
ProfileSteps = Annotated[int, typer.Option(help="Steps to watch, after the first eight.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def engine_settings(tp: int, dtype: str, max_len: int | None, fraction: float | None, **more: Any) -> dict[str, Any]:
    """Settings of `EngineConfig`; what was not given (None) keeps its default there."""
    settings = {"tensor_parallel_size": tp, "dtype": dtype, "max_model_len": max_len, "memory_fraction": fraction}
    return settings | {name: value for name, value in more.items() if value is not None}


def served_name(model: str, given: str | None) -> str:
    """What clients call the model. A path says more about this machine than they need to know."""
    return given or (Path(model).stem if Path(model).exists() else model)


def profile_settings(folder: Path | None, steps: int) -> dict[str, Any]:
    # Absolute, because a rank may run in another folder.
    return {} if folder is None else {"profile_dir": str(folder.absolute()), "profile_steps": steps}


def chosen_params(llm: LLM, max_tokens: int, **chosen: Any) -> SamplingParams:
    """The model's own advice, changed by what was given."""
    advice = llm.get_default_sampling_params()
    settings = {name: getattr(advice, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    settings |= {name: value for name, value in chosen.items() if value is not None}
    return SamplingParams(max_tokens=max_tokens, **settings)
