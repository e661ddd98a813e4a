"""How fast a warm engine is: one stream, a batch, and a batch with a shared prefix."""

from __future__ import annotations

from typing import Any

from bench.harness import Bench, Figures, Side, draw
from bench.machine import read_bandwidth


def test_single_stream(bench: Bench, sides: list[Side]) -> None:
    """One request: time to first token, decode speed, and what that reads of the machine's bandwidth."""
    length, out = bench.sizes.single_in, bench.sizes.single_out
    # Each token reads every weight once, and the keys and values of what is before it.
    about = sides[0].description
    bytes_per_token = about["weight_bytes"] + about["kv_bytes_per_token"] * (length + out / 2)
    bandwidth = 0.0

    def make_prompts(run: int) -> list[list[int]]:
        nonlocal bandwidth
        bandwidth = read_bandwidth(bench.sizes.buffer_megabytes)  # again for each pair: it drifts with the machine
        return draw([length], bench.vocab_size, run)

    def measure(reply: dict[str, Any]) -> Figures:
        first = reply["first_token_seconds"]
        speed = (out - 1) / (reply["seconds"] - first)
        return {
            "first_token_seconds": first,
            "decode_tokens_per_s": speed,
            "achieved_gb_per_s": speed * bytes_per_token / 1e9,
            "share_of_bandwidth": speed * bytes_per_token / bandwidth,
        }

    results = bench.take_turns(sides, make_prompts, out, measure)
    bench.record("single_stream", sides, results, read_bandwidth_gb_per_s=bandwidth / 1e9)


def test_batch(bench: Bench, sides: list[Side]) -> None:
    """Requests of mixed lengths that arrive together: tokens completed per second."""
    (low, high), count, out = bench.sizes.batch_in, bench.sizes.requests, bench.sizes.batch_out
    lengths = [low + round((high - low) * i / (count - 1)) for i in range(count)]

    def measure(reply: dict[str, Any]) -> Figures:
        return {"seconds": reply["seconds"], "tokens_per_s": count * out / reply["seconds"]}

    results = bench.take_turns(sides, lambda run: draw(lengths, bench.vocab_size, 100 + run), out, measure)
    bench.record("batch", sides, results)


def test_shared_prefix(bench: Bench, sides: list[Side]) -> None:
    """Requests that arrive together and begin alike; the prefix is another one in each repetition."""
    sizes = bench.sizes

    def make_prompts(run: int) -> list[list[int]]:
        (prefix,) = draw([sizes.prefix], bench.vocab_size, 200 + run)
        return [prefix + rest for rest in draw([sizes.prefix_in] * sizes.requests, bench.vocab_size, 300 + run)]

    results = bench.take_turns(sides, make_prompts, sizes.prefix_out, lambda reply: {"seconds": reply["seconds"]})
    bench.record("shared_prefix", sides, results)
