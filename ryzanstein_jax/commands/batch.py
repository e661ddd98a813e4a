"""`ryzanstein batch`."""

from __future__ import annotations

import asyncio
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ryzanstein_jax.commands.options import (
    CacheDtype,
    Dtype,
    Executor,
    Fraction,
    LoadFormat,
    MaxLen,
    MaxSeqs,
    Model,
    Orchestrator,
    Quantize,
    Replicas,
    Sharding,
    Width,
    engine_settings,
    served_name,
)
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.progress import progress_bars, say
from ryzanstein_jax.start import check_start, make_config, parse_options


def batch(
    model: Model,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests in OpenAI's batch format.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="Where answers go.")],
    in_flight: Annotated[
        int | None, typer.Option(help="Lines at a time; twice what runs in a step if not given.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What the lines call the model.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id, where the model brings none.")] = None,
    tp: Width = 1,
    dp: Replicas = 1,
    sharding: Sharding = "megatron",
    dtype: Dtype = "auto",
    quantization: Quantize = None,
    kv_cache_dtype: CacheDtype = "auto",
    max_model_len: MaxLen = None,
    memory_fraction: Fraction = None,
    max_num_seqs: MaxSeqs = None,
    load_format: LoadFormat = "auto",
    executor: Executor = "local",
    orchestrator: Orchestrator = None,
) -> None:
    """Answers the requests of a file, each line exactly once.

    Stopped or killed, the same command goes on where it was. Lines that are wrong get an answer that says so. Exit
    status: 0 when every line has an answer, 3 when some of these are errors, 1 when it could not go on.
    """
    try:
        from ryzanstein_jax.server.batch import Batch, Counts, batch_config
    except ModuleNotFoundError as error:
        raise ConfigError("batch", error.name, "it needs more: pip install 'ryzanstein-jax[serve]'") from error
    from ryzanstein_jax.async_llm import AsyncLLM

    settings = engine_settings(
        tp,
        dtype,
        max_model_len,
        memory_fraction,
        load_format=load_format,
        tokenizer=tokenizer,
        data_parallel_size=dp,
        max_num_seqs=max_num_seqs,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        sharding=sharding,
    )
    config = make_config(model, settings)  # refuses what is wrong before files are touched
    options = parse_options(orchestrator)
    check_start(config, executor, options)
    in_flight = in_flight if in_flight is not None else 2 * config.max_num_seqs * dp
    work = Batch(source, output, in_flight, batch_config(in_flight, served_model_name))
    try:
        if not work.is_done:
            name = served_name(model, served_model_name)
            llm = AsyncLLM(model, executor=executor, orchestrator=options, **settings)
            with closing(llm), progress_bars(True) as bars:

                def note(counts: Counts) -> None:
                    bars("lines", counts.before + counts.answered, counts.lines)

                note(work.counts)
                asyncio.run(work.run(llm, name, version("ryzanstein-jax"), note))
    finally:
        work.close()
    say(str(work.counts))
    if work.counts.errors:
        raise typer.Exit(3)
