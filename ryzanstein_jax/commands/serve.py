"""`ryzanstein serve`."""

from __future__ import annotations

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
    Profile,
    ProfileSteps,
    Quantize,
    Replicas,
    Sharding,
    Width,
    engine_settings,
    profile_settings,
    served_name,
)
from ryzanstein_jax.errors import ConfigError
from ryzanstein_jax.start import check_start, make_config, parse_options


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback it takes a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line; $RYZANSTEIN_API_KEY holds further ones.")
    ] = None,
    allow_anonymous: Annotated[bool, typer.Option(help="Listen beyond loopback without a key.")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name that a Host header may have. May be given more than once.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    max_sequences: Annotated[int, typer.Option(help="Completions that may run or wait; one more gets 429.")] = 512,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt.")] = None,
    request_seconds: Annotated[float, typer.Option(help="Most that a request may take.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="How long requests may go on after SIGTERM.")] = 30.0,
    keep_alive_seconds: Annotated[float, typer.Option(help="Silence after which a stream gets a comment.")] = 5.0,
    write_seconds: Annotated[float, typer.Option(help="How long a client may leave its answer unread.")] = 60.0,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector that traces go to, such as http://localhost:4318.")
    ] = None,
    embedding_pooling: Annotated[
        str | None, typer.Option(help='What embeddings are made of, "last" or "mean"; the model says it if not given.')
    ] = None,
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
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most prompt tokens in a step.")] = None,
    load_format: LoadFormat = "auto",
    executor: Executor = "local",
    orchestrator: Orchestrator = None,
    profile: Profile = None,
    profile_steps: ProfileSteps = 32,
) -> None:
    """Serves OpenAI's API. The first SIGTERM or Ctrl-C lets running requests finish, the second ends them."""
    try:
        from ryzanstein_jax.server.run import serve as run_server
        from ryzanstein_jax.server.settings import ServerConfig, read_api_keys
    except ModuleNotFoundError as error:
        raise ConfigError("serve", error.name, "the server needs more: pip install 'ryzanstein-jax[serve]'") from error
    from ryzanstein_jax.async_llm import AsyncLLM

    config = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name,
        api_keys=read_api_keys(api_key_file),
        allow_anonymous=allow_anonymous,
        allowed_hosts=tuple(allowed_host) if allowed_host else None,
        max_sequences=max_sequences,
        max_prompt_tokens=max_prompt_tokens,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
        keep_alive_seconds=keep_alive_seconds,
        write_seconds=write_seconds,
        otlp_endpoint=otlp_endpoint,
    )
    settings = engine_settings(
        tp,
        dtype,
        max_model_len,
        memory_fraction,
        load_format=load_format,
        tokenizer=tokenizer,
        data_parallel_size=dp,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        embedding_pooling=embedding_pooling,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        sharding=sharding,
        **profile_settings(profile, profile_steps),
    )
    options = parse_options(orchestrator)
    check_start(make_config(model, settings), executor, options)  # before anything listens
    run_server(
        lambda: AsyncLLM(model, progress=False, executor=executor, orchestrator=options, **settings),
        served_name(model, served_model_name),
        config,
        version("ryzanstein-jax"),
    )
