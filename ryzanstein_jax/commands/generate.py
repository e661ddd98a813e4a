"""`ryzanstein generate` and `ryzanstein chat`."""

from __future__ import annotations

import json
import sys
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
    MaxTokens,
    Model,
    Orchestrator,
    Profile,
    ProfileSteps,
    Quantize,
    Seed,
    Sharding,
    Temperature,
    TopP,
    Width,
    chosen_params,
    engine_settings,
    profile_settings,
)
from ryzanstein_jax.errors import ConfigError, RequestError, RyzansteinError
from ryzanstein_jax.llm import LLM
from ryzanstein_jax.start import parse_options
from ryzanstein_jax.structured_outputs import MAX_GRAMMAR_BYTES, StructuredOutputsParams


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
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema: completions are JSON that it allows.")
    ] = None,
    tp: Width = 1,
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
    profile: Profile = None,
    profile_steps: ProfileSteps = 32,
) -> None:
    """Completes prompts, all in one batch, and prints the completions in order."""
    prompts = list(prompt or [])
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        prompts += [line for line in text.splitlines() if line]
    if not prompts:
        raise ConfigError("prompt", None, "give --prompt or --file")
    form = None if json_schema is None else _read_schema(json_schema)
    # Programs are compiled for as many sequences as there can be.
    seqs = max_num_seqs or min(len(prompts), 32)
    settings = engine_settings(
        tp,
        dtype,
        max_model_len,
        memory_fraction,
        load_format=load_format,
        max_num_seqs=seqs,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        sharding=sharding,
        **profile_settings(profile, profile_steps),
    )
    with LLM(model, executor=executor, orchestrator=parse_options(orchestrator), **settings) as llm:
        params = chosen_params(
            llm, max_tokens, temperature=temperature, top_p=top_p, seed=seed, structured_outputs=form
        )
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
    if profile is not None:
        for table in sorted(profile.glob("rank-*/summary.txt")):
            print(f"{table.parent}\n{table.read_text(encoding='utf-8')}", file=sys.stderr)


def _read_schema(file: Path) -> StructuredOutputsParams:
    try:
        with file.open(encoding="utf-8") as text:
            return StructuredOutputsParams(json=text.read(MAX_GRAMMAR_BYTES + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("json_schema", str(file), f"it can't be read: {type(error).__name__}") from error
    except RequestError as error:
        raise ConfigError("json_schema", str(file), error.remedy) from error


def chat(
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="Instructions before the conversation.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    tp: Width = 1,
    dtype: Dtype = "auto",
    quantization: Quantize = None,
    kv_cache_dtype: CacheDtype = "auto",
    max_model_len: MaxLen = None,
    memory_fraction: Fraction = None,
    executor: Executor = "local",
    orchestrator: Orchestrator = None,
) -> None:
    """Talks with a model. /reset begins again, /quit or end of input ends; Ctrl-C stops an answer."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    settings = engine_settings(
        tp,
        dtype,
        max_model_len,
        memory_fraction,
        max_num_seqs=1,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )
    with LLM(model, executor=executor, orchestrator=parse_options(orchestrator), **settings) as llm:
        params = chosen_params(llm, max_tokens, temperature=temperature, top_p=top_p, seed=seed)
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
