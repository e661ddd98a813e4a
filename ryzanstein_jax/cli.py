"""`ryzanstein`: generate, chat, serve, snapshot, info, worker and demo on the command line."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ryzanstein_jax.config import DTYPES, LOAD_FORMATS, parse_address
from ryzanstein_jax.errors import ConfigError, RyzansteinError
from ryzanstein_jax.llm import LLM, default_sampling_params
from ryzanstein_jax.request import SamplingParams
from ryzanstein_jax.start import make_config, parse_options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LLM inference in JAX on many devices.",
)

Model = Annotated[str, typer.Argument(help='Hugging Face id, folder, .gguf file, snapshot, or "smollm2".')]
Width = Annotated[int, typer.Option("--tensor-parallel-size", "--tp", "-t", help="Devices to shard over.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
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
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def main() -> None:
    """Runs the command line; what the user can mend is one line, without a traceback."""
    try:
        app()
    except (RyzansteinError, OSError) as error:
        print(f"ryzanstein: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def _settings(tp: int, dtype: str, max_len: int | None, fraction: float | None, **more: Any) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tp, "dtype": dtype, "max_model_len": max_len, "memory_fraction": fraction, **more,
    }  # fmt: skip


def _params(llm: LLM, max_tokens: int, **chosen: Any) -> SamplingParams:
    """The model's own advice, changed by what was given."""
    advice = llm.get_default_sampling_params()
    settings = {name: getattr(advice, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    settings |= {name: value for name, value in chosen.items() if value is not None}
    return SamplingParams(max_tokens=max_tokens, **settings)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="May be given more than once.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A prompt on each line; - is standard input.")
    ] = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object on each line.")] = False,
    tp: Width = 1,
    dtype: Dtype = "auto",
    max_model_len: MaxLen = None,
    memory_fraction: Fraction = None,
    max_num_seqs: MaxSeqs = None,
    load_format: LoadFormat = "auto",
    executor: Executor = "local",
    orchestrator: Orchestrator = None,
) -> None:
    """Completes prompts, all in one batch, and prints the completions in order."""
    prompts = list(prompt or [])
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        prompts += [line for line in text.splitlines() if line]
    if not prompts:
        raise ConfigError("prompt", None, "give --prompt or --file")
    # Programs are compiled for as many sequences as there can be.
    seqs = max_num_seqs or min(len(prompts), 32)
    settings = _settings(tp, dtype, max_model_len, memory_fraction, load_format=load_format, max_num_seqs=seqs)
    with LLM(model, executor=executor, orchestrator=parse_options(orchestrator), **settings) as llm:
        params = _params(llm, max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        for output in llm.generate(prompts, params):
            completion = output.outputs[0]
            if as_json:
                record = {
                    "prompt": output.prompt,
                    "text": completion.text,
                    "token_ids": completion.token_ids,
                    "finish_reason": completion.finish_reason,
                }
                print(json.dumps(record))
            else:
                print(f"{output.prompt}{completion.text}\n")


@app.command()
def chat(
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="Instructions before the conversation.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    tp: Width = 1,
    dtype: Dtype = "auto",
    max_model_len: MaxLen = None,
    memory_fraction: Fraction = None,
    executor: Executor = "local",
    orchestrator: Orchestrator = None,
) -> None:
    """Talks with a model. /reset begins again, /quit or end of input ends; Ctrl-C stops an answer."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    settings = _settings(tp, dtype, max_model_len, memory_fraction, max_num_seqs=1)
    with LLM(model, executor=executor, orchestrator=parse_options(orchestrator), **settings) as llm:
        params = _params(llm, max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/quit":
                return
            if line == "/reset":
                messages = list(opening)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                for chunk in llm.stream(messages, params):
                    print(chunk.text, end="", flush=True)
                    answer += chunk.text
            except KeyboardInterrupt:
                pass  # what was said so far stays part of the conversation
            except RyzansteinError as error:
                print(f"[{error}]", file=sys.stderr)
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": answer})


@app.command()
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
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id, where the model brings none.")] = None,
    tp: Width = 1,
    dtype: Dtype = "auto",
    max_model_len: MaxLen = None,
    memory_fraction: Fraction = None,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most prompt tokens in a step.")] = None,
    load_format: LoadFormat = "auto",
    executor: Executor = "local",
    orchestrator: Orchestrator = None,
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
    )
    settings = _settings(tp, dtype, max_model_len, memory_fraction, load_format=load_format, tokenizer=tokenizer)
    sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    settings |= {name: size for name, size in sizes.items() if size is not None}
    make_config(model, settings)  # refuses what is wrong before anything listens
    # A path says more about this machine than clients need to know.
    name = served_model_name or (Path(model).stem if Path(model).exists() else model)
    options = parse_options(orchestrator)
    run_server(
        lambda: AsyncLLM(model, progress=False, executor=executor, orchestrator=options, **settings),
        name,
        config,
        version("ryzanstein-jax"),
    )


@app.command()
def snapshot(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="What the snapshot will be called.")],
    tp: Width = 1,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Writes an Orbax checkpoint of the sharded weights with config and tokenizer; it restores onto any width."""
    from ryzanstein_jax.engine.local import snapshot_model

    path = snapshot_model(make_config(model, {"tensor_parallel_size": tp, "dtype": dtype}), folder, overwrite=overwrite)
    print(path)


@app.command()
def info(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Shows what a model computes, its parameters, and what it takes per device at each width."""
    from ryzanstein_jax.engine.open import open_model
    from ryzanstein_jax.memory import footprint

    opened = open_model(make_config(model, {}))
    spec = opened.spec
    widths = [footprint(spec, width) for width in (1, 2, 4, 8)]
    facts = {
        "architecture": spec.architecture,
        "parameters": spec.num_parameters(),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": f"{spec.num_heads} query, {spec.num_kv_heads} KV, {spec.head_dim} wide",
        "vocabulary": spec.vocab_size,
        "max_model_len": spec.max_position_embeddings,
        "checkpoint": f"{opened.files.kind}, {spec.dtype}",
        "sampling": str(
            {k: v for k, v in vars(default_sampling_params(opened)).items() if k in ("temperature", "top_p", "top_k")}
        ),
    }
    if as_json:
        print(json.dumps({**facts, "per_device": [vars(width) for width in widths]}, indent=2))
        return
    console = Console()
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    table = Table("devices", "weights, f32", "weights, bf16", "KV per token, f32", "KV per token, bf16", "padding")
    for width in widths:
        table.add_row(
            str(width.width),
            f"{width.weights * 4 / 2**20:,.1f} MiB",
            f"{width.weights * 2 / 2**20:,.1f} MiB",
            f"{width.kv_values * 4 / 2**10:,.1f} KiB",
            f"{width.kv_values * 2 / 2**10:,.1f} KiB",
            f"{width.padding:.0%}",
        )
    console.print(table)


@app.command()
def worker(
    leader: Annotated[
        str | None, typer.Option(help="HOST:PORT that the leader listens at; asked of the cluster if not given.")
    ] = None,
    secret_file: Annotated[
        str | None, typer.Option(help="File of the leader's secret; or else it is in RYZANSTEIN_SECRET.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices to offer: all GPUs, or one CPU, if not given.")] = None,
    name: Annotated[str | None, typer.Option(help="Of this machine, its host name if not given.")] = None,
    cluster: Annotated[str, typer.Option(help="auto, lws, slurm, ompi, mpi4py or k8s; without --leader.")] = "auto",
    port: Annotated[int, typer.Option(help="That the leader listens at; without --leader.")] = 18476,
    wait: Annotated[float, typer.Option(help="Seconds to wait until the leader answers.")] = 600.0,
    reconnect: Annotated[bool, typer.Option(help="Wait for the leader again when it is gone.")] = False,
) -> None:
    """Offers this machine's devices to the leader of an engine on another one."""
    from ryzanstein_jax.orchestrator.cluster import leader_address
    from ryzanstein_jax.orchestrator.worker_command import WorkerCommand, find_secret

    if devices is not None and not 1 <= devices <= 1024:
        raise ConfigError("devices", devices, "use a whole number from 1 to 1024")
    secret = find_secret(secret_file)
    address = leader or leader_address(cluster, port)
    parse_address("leader", address)
    name = name or os.uname().nodename
    WorkerCommand(address, secret, name, devices, wait, reconnect).become()


@app.command()
def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p")] = "Why is the sky blue? Answer in three sentences.",
    tp: Width = 2,
    max_tokens: MaxTokens = 160,
) -> None:
    """Streams a chat answer of SmolLM2-135M-Instruct over two CPU devices, then prints the figures."""
    from ryzanstein_jax.demo import run_demo

    run_demo(prompt, tp, max_tokens)


if __name__ == "__main__":
    main()
