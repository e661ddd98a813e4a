"""What a grammar costs: tokens per second of completions that follow one, over those of free completions."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import closing

import pytest
from rich.table import Table

from bench.harness import Bench, WrongResult, draw
from ryzanstein_jax import AsyncLLM, SamplingParams, StructuredOutputsParams

#: An object whose text is longer than any completion here, so that none ends before its length.
FORM = StructuredOutputsParams(
    json={
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 4000}},
        "required": ["text"],
        "additionalProperties": False,
    }
)
PROMPT = 32


def compare(llm: AsyncLLM, streams: int, tokens: int, vocab_size: int, runs: int) -> dict[str, list[float]]:
    """Tokens per second of so many streams at once, free and constrained in turns, after one unmeasured turn of each.

    Raises:
        WrongResult: a completion is not as long as it has to be.
    """

    async def turn(seed: int, form: StructuredOutputsParams | None) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=form is None, structured_outputs=form)
        prompts = draw([PROMPT] * streams, vocab_size, seed)
        began = time.perf_counter()
        outputs = await asyncio.gather(*(llm.generate(prompt, params) for prompt in prompts))
        took = time.perf_counter() - began
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        if lengths != {tokens}:
            raise WrongResult(f"completions of {lengths} tokens; {tokens} were asked for")
        return streams * tokens / took

    async def all_turns() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"free": [], "constrained": []}
        for run in range(runs + 1):
            for number, (name, form) in enumerate((("free", None), ("constrained", FORM))):
                speed = await turn(500 + 2 * run + number, form)
                if run:
                    found[name].append(speed)
        return found

    return asyncio.run(all_turns())


def test_constrained(bench: Bench, request: pytest.FixtureRequest) -> None:
    """One stream, which has to wait for each token before its next mask, and sixteen, which share steps."""
    smoke = request.config.getoption("--smoke")
    tokens = 16 if smoke else 64
    with closing(
        AsyncLLM(**bench.settings, max_num_seqs=16, max_num_batched_tokens=512, max_model_len=128, progress=False)
    ) as llm:
        record(bench, {streams: compare(llm, streams, tokens, bench.vocab_size, bench.runs) for streams in (1, 16)})


def record(bench: Bench, found: dict[int, dict[str, list[float]]]) -> None:
    """Writes the speeds and the medians of the ratios of pairs."""
    table = Table("streams", "free, tokens/s", "constrained", "ratio", title="constrained")
    result = {}
    for streams, speeds in found.items():
        pairs = list(zip(speeds["constrained"], speeds["free"], strict=True))
        ratio = statistics.median(constrained / free for constrained, free in pairs)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        result[streams] = {"tokens_per_s": medians, "ratio": ratio, "runs": speeds}
        table.add_row(str(streams), f"{medians['free']:.4g}", f"{medians['constrained']:.4g}", f"{ratio:.3f}")
    bench.write("constrained", {"benchmark": "constrained", "streams": result}, table)
