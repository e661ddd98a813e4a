"""`make demo`: one streamed chat answer and a line of figures."""

from __future__ import annotations

import sys

from ryzanstein_jax.llm import LLM
from ryzanstein_jax.memory import host_peak_bytes
from ryzanstein_jax.progress import say
from ryzanstein_jax.request import RequestOutput, SamplingParams


def run_demo(prompt: str, tensor_parallel_size: int, max_tokens: int) -> None:
    """Answers a prompt with the default model, greedy, and prints what it cost."""
    say(f"SmolLM2-135M-Instruct on a mesh of {tensor_parallel_size} devices. The first run fetches and compiles it.\n")
    with LLM(
        "smollm2",
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=1024,
        max_num_seqs=1,
        max_num_batched_tokens=128,
    ) as llm:
        say(f"\n> {prompt}\n")
        output: RequestOutput | None = None
        messages = [{"role": "user", "content": prompt}]
        for chunk in llm.stream(messages, SamplingParams(temperature=0.0, max_tokens=max_tokens)):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            output = chunk.output
        sys.stdout.write("\n\n")
        assert output is not None
        say(figures(llm, output))


def figures(llm: LLM, output: RequestOutput) -> str:
    """Load, compile, time to first token, tokens/s, GB/s and peak memory of a request that ran alone."""
    report, timings = llm.report, output.timings
    assert timings.first_token is not None and timings.finished is not None
    tokens = len(output.outputs[0].token_ids)
    seconds = timings.finished - timings.first_token
    rate = (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0
    # Each token reads every weight once, and the keys and values of all tokens before it.
    context = len(output.prompt_token_ids) + tokens / 2
    read = llm.num_devices * (report.memory.weights + context * report.memory.page_bytes / report.memory.page_size)
    return (
        f"load {report.load_seconds:.2f} s | compile {report.compile_seconds:.2f} s | "
        f"first token {timings.first_token - timings.arrived:.3f} s | {rate:.1f} tokens/s | "
        f"{rate * read / 1e9:.1f} GB/s | peak memory {host_peak_bytes() / 2**30:.2f} GiB"
    )
