"""Two sides in turns, their tokens compared, medians and ratios of pairs, and what is written of it."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.machine import commit, describe_machine, num_cores, other_cpu_seconds
from bench.protocol import Worker
from ryzanstein_jax import native

Figures = dict[str, float]
OURS, THEIRS = "ryzanstein_jax", "transformers"
MODULES = {OURS: "bench.our_worker", THEIRS: "bench.hf_worker"}

#: Logits this close are a tie that either side may break its own way: sums in another order differ that much, and
#: fewer bits more; bfloat16 beside float32 was seen to be 1.2 apart. What they cost in quality is `test_quality`'s.
TIE = {"float32": 5e-3, "bfloat16": 2.0, "float16": 0.2, "int8": 3.0, "int4": 20.0, "fp8": 6.0}


@dataclass(frozen=True)
class Sizes:
    """Lengths of the workloads, in tokens and requests; those of `SMOKE` only show that they run."""

    single_in: int = 128
    single_out: int = 128
    requests: int = 32
    batch_in: tuple[int, int] = (32, 256)
    batch_out: int = 64
    prefix: int = 512
    prefix_in: int = 32
    prefix_out: int = 16
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    buffer_megabytes: int = 512


SMOKE = Sizes(8, 8, 2, (8, 16), 8, 16, 8, 4, 1, 16, 1)


class WrongResult(AssertionError):
    """A side failed a request, or the two sides disagree by more than a tie."""


@dataclass
class Side:
    """One engine under test."""

    name: str
    worker: Worker
    description: dict[str, Any]

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Runs a batch and checks that each completion has its length."""
        reply = self.worker.call("generate", prompts=prompts, max_tokens=max_tokens)
        lengths = [len(tokens) for tokens in reply["tokens"]]
        if lengths != [max_tokens] * len(prompts):
            raise WrongResult(f"{self.name} returned completions of {lengths} tokens; {max_tokens} were asked for")
        return reply


def draw(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts of those lengths; other ones for each seed. Low ids, often special tokens, are left out."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size // 20, vocab_size) for _ in range(length)] for length in lengths]


def compare_tokens(
    theirs: Worker, prompts: list[list[int]], our_tokens: list[list[int]], their_tokens: list[list[int]], dtype: str
) -> int:
    """Checks that greedy tokens agree up to a tie, after which both are right to go their own way.

    Returns:
        How many requests met a tie.

    Raises:
        WrongResult: they differ where the other side's logits are not close.
    """
    ties = 0
    for index, (prompt, ours, others) in enumerate(zip(prompts, our_tokens, their_tokens, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(ours, others, strict=True)) if a != b), None)
        if place is None:
            continue
        one, other = ours[place], others[place]
        margin = theirs.call("margin", prompt=prompt + ours[:place], one=one, other=other)["logits"]
        if not margin <= TIE[dtype]:
            raise WrongResult(f"request {index}, token {place}: {one} here, {other} there, {margin:.4f} logits apart")
        ties += 1
    return ties


def times_better(name: str, ours: float, theirs: float) -> float:
    """How many times better ours is, above 1 where it is faster or smaller; names ending in "per_s" are speeds."""
    return ours / theirs if name.endswith(("per_s", "share_of_bandwidth")) else theirs / ours


@dataclass
class Bench:
    """What every benchmark needs, and what it hands its results to.

    Attributes:
        settings: of this run, written into each result: model, dtype, tensor_parallel_size.
        runs: measured repetitions.
        folder: gets one JSON file per benchmark.
        exported: folder of the model's weights as transformers reads them.
        hf_python: interpreter of the other side; None leaves it out.
        their_dtype: what the other side computes in.
        tables: of all results, for the end of the run.
        notes: of the last `take_turns`: what other processes took of the CPUs, and ties between the two sides' tokens.
        commit: of the checkout when the run began; see `machine.commit`.
    """

    settings: dict[str, Any]
    sizes: Sizes
    runs: int
    folder: Path
    exported: Path
    vocab_size: int
    hf_python: str | None
    their_dtype: str = "float32"
    tables: list[Table] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    commit: str = field(default_factory=commit)

    def take_turns(
        self,
        sides: Sequence[Side],
        make_prompts: Callable[[int], list[list[int]]],
        max_tokens: int,
        measure: Callable[[dict[str, Any]], Figures],
    ) -> dict[str, list[Figures]]:
        """Runs each side in turn on the same prompts, other ones in each repetition, after one unmeasured.

        Raises:
            WrongResult: the sides' greedy tokens differ.
        """
        results: dict[str, list[Figures]] = {side.name: [] for side in sides}
        precision = self.settings.get("quantization") or self.settings["dtype"]
        ties, began, others_before = 0, time.perf_counter(), other_cpu_seconds()
        for run in range(self.runs + 1):
            prompts = make_prompts(run)
            replies = {side.name: side.generate(prompts, max_tokens) for side in sides}
            if len(sides) == 2:
                ours, theirs = (replies[side.name]["tokens"] for side in sides)
                ties += compare_tokens(sides[1].worker, prompts, ours, theirs, precision)
            if run:
                for name, reply in replies.items():
                    results[name].append(measure(reply))
        # What else ran at the time: results of a busy machine mean little.
        share = (other_cpu_seconds() - others_before) / (time.perf_counter() - began) / num_cores()
        self.notes = {"cpu_share_of_others": round(max(share, 0.0), 3)}
        if len(sides) == 2:
            self.notes |= {"ties": ties, "requests_compared": (self.runs + 1) * len(prompts)}
        return results

    def record(self, name: str, sides: Sequence[Side], results: Mapping[str, list[Figures]], **more: Any) -> None:
        """Writes medians over the runs, and medians of the ratios of pairs; `more` are further fields."""
        names = list(results[OURS][0])
        figures = {side: {n: statistics.median(r[n] for r in runs) for n in names} for side, runs in results.items()}
        ratio = {}
        if THEIRS in results:
            pairs = list(zip(results[OURS], results[THEIRS], strict=True))
            ratio = {n: statistics.median(times_better(n, a[n], b[n]) for a, b in pairs) for n in names}
        if not all(math.isfinite(value) for values in (*figures.values(), ratio) for value in values.values()):
            raise WrongResult(f"{name}: a figure is no number: {figures}, {ratio}")
        content = {
            "benchmark": name,
            "figures": figures,
            "ratio": ratio,
            "runs": results,
            **more,
            **self.notes,
            "versions": {k: v for side in sides for k, v in side.description["versions"].items()},
            "devices": {side.name: side.description["device"] for side in sides},
        }
        notes = ", ".join(f"{key} {value:.4g}" for key, value in {**more, **self.notes}.items())
        self.notes = {}
        table = Table("figure", *figures, *(["times better"] if ratio else []), title=name, caption=notes or None)
        for n in names:
            cells = [f"{values[n]:.4g}" for values in figures.values()]
            table.add_row(n, *cells, *([f"{ratio[n]:.2f}"] if ratio else []))
        self.write(name, content, table)

    def write(self, name: str, content: Mapping[str, Any], table: Table) -> None:
        """Writes a result with what it was measured on, and keeps its table for the end of the run."""
        content = {
            **self.settings,
            "their_dtype": self.their_dtype,
            "cpu_kernels": native.available(),
            **content,
            "machine": describe_machine(),
            "commit": self.commit,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.file_name(name)}.json").write_text(json.dumps(content, indent=1) + "\n")
        self.tables.append(table)

    def file_name(self, name: str) -> str:
        """What the files of a result are called, without their ending: by what is not the default, too."""
        precision = self.settings.get("quantization") or self.settings["dtype"]
        parts = [name, *([] if precision == "float32" else [precision])]
        return "-".join(parts if native.available() else [*parts, "portable"])
