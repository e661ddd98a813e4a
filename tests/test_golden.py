"""Every family, at every width, gives the logits and tokens that transformers gave (see `golden/README.md`)."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ryzanstein_jax.batch import Bucket
from ryzanstein_jax.config import EngineConfig
from ryzanstein_jax.engine.engine import Engine
from ryzanstein_jax.engine.runner import Runner
from ryzanstein_jax.request import PoolingParams, SamplingParams
from ryzanstein_jax.step import StepPrograms
from tests.native.processors import PROCESSORS, on
from tests.support import (
    FAMILIES,
    GOLDEN,
    QUICK,
    WIDTHS,
    Forward,
    golden_expected,
    golden_spec,
    kernels,
    load,
    make_plan,
    make_programs,
    serve,
    small_blocks,
)

TOLERANCE = 1e-4
PAGE_SIZE, NUM_PAGES = 4, 64
#: One bucket for a whole script: a second program would double what this file costs.
BUCKET = Bucket(decodes=4, prefill_tokens=40, prefills=4, rows=44)

#: A script of steps. Sequences "a", "b" and "c" are the golden one, "x" is noise; "c" begins with pages of "a".
#: Each step: which sequences decode a token, and whose prompt gets how many. Pages hold 4 tokens, tiles and
#: blocks 8: chunks end inside all of them, cross them, and are as short as one token.
SCRIPT: list[tuple[str, dict[str, int]]] = [
    ("", {"a": 13, "x": 5}),
    ("", {"a": 1, "b": 20, "x": 9}),
    ("x", {"a": 19}),
    ("bx", {"a": 7, "c": 6}),
    ("ab", {"c": 17}),
    ("ba", {"x": 1, "c": 1}),
    ("cab", {"x": 11}),
]
DECODES = ["abc", "cb", "a", "cba", "bxa"]
SHARED = 12  # tokens of "c" that were found in the prefix cache


def programs_of(family: str, width: int, sharding: str = "megatron") -> StepPrograms:
    return make_programs(
        golden_spec(family), width, BUCKET,
        num_pages=NUM_PAGES, page_size=PAGE_SIZE, table_width=56 // PAGE_SIZE, sharding=sharding,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "width", "sharding"),
    [("smollm2", 2, "output"), ("gemma2", 4, "output"), ("mixtral", 2, "output"), ("qwen2", 4, "sequence"),
     ("gemma2", 2, "sequence"), ("mixtral", 4, "sequence")],
)  # fmt: skip
def test_other_shardings_compute_the_same(family: str, width: int, sharding: str) -> None:
    programs = programs_of(family, width, sharding)
    assert BUCKET.tokens % width == 0, "else sequence is megatron"
    with small_blocks(8, 8):
        run_script(family, Forward(programs, load(programs, GOLDEN / family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    """By XLA's operations alone, as on every machine without kernels of our own."""

    def build(width: int) -> tuple[StepPrograms, Forward]:
        programs = programs_of(family, width)
        return programs, Forward(programs, load(programs, GOLDEN / family))

    with small_blocks(8, 8), kernels("portable"):
        with ThreadPoolExecutor(2) as pool:
            built = dict(zip(WIDTHS, pool.map(build, WIDTHS), strict=True))
        for _, forward in built.values():
            run_script(family, forward)
        if (GOLDEN / family / "hidden.npy").is_file():
            for width in (1, 2, 8):
                embed(family, *built[width])
        run_engine(family, *built[WIDTHS[FAMILIES.index(family) % len(WIDTHS)]])


@pytest.mark.parametrize("lanes", list(PROCESSORS)[:1])
@pytest.mark.parametrize(("family", "width"), [("llama", 1), ("smollm2", 2), ("gemma2", 4), ("gemma3", 1), ("phi3", 8)])
def test_family_with_kernels_for_cpus(family: str, width: int, lanes: int) -> None:
    """With vectors so short that they divide the pages and heads of models as small as these."""
    with small_blocks(8, 8), on(lanes):
        programs = programs_of(family, width)
        assert "ryzanstein.Attention" in programs.lower_forward(BUCKET).as_text()
        forward = Forward(programs, load(programs, GOLDEN / family))
        run_script(family, forward)
        run_engine(family, programs, forward)


def run_script(family: str, forward: Forward) -> None:
    tokens, expected, prompt = golden_expected(family)
    rng = np.random.default_rng(7)
    pages = rng.permutation(np.arange(1, NUM_PAGES)).tolist()
    of = {name: [pages.pop() for _ in range(14)] for name in "abx"}
    of["c"] = of["a"][: SHARED // PAGE_SIZE] + [pages.pop() for _ in range(14 - SHARED // PAGE_SIZE)]
    ids = dict.fromkeys("abc", tokens) | {"x": rng.integers(0, expected.shape[1], 56)}
    done = dict.fromkeys("abx", 0) | {"c": SHARED}

    def step(decodes: str, chunks: dict[str, int]) -> None:
        logits = forward(
            make_plan(
                [(ids[name], of[name], done[name]) for name in decodes],
                [(ids[name], of[name], done[name], done[name] + count) for name, count in chunks.items()],
            )
        )
        row = 0
        for name, count in [(name, 1) for name in decodes] + list(chunks.items()):
            begin = done[name]
            if name != "x":
                got, wanted = logits[row : row + count], expected[begin : begin + count]
                np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE, err_msg=f"{name} from {begin}")
                after = [i for i in range(begin, begin + count) if i >= len(prompt) - 1]
                chosen = got[len(got) - len(after) :].argmax(axis=1)
                assert chosen.tolist() == tokens[[i + 1 for i in after]].tolist()
            row, done[name] = row + count, begin + count

    for decodes, chunks in SCRIPT:
        step(decodes, chunks)
    for turn in range(40):
        alive = [name for name in DECODES[turn % len(DECODES)] if done[name] < len(expected)]
        if alive:
            step("".join(alive), {})
    assert all(done[name] == len(expected) for name in "abc"), done


def embed(family: str, programs: StepPrograms, forward: Forward) -> None:
    """Embeddings of prompts that fit a step, that take several, and that are one token, beside a completion."""
    hidden, prompt = np.load(GOLDEN / family / "hidden.npy"), golden_expected(family)[2].tolist()
    programs.samplers[BUCKET.rows] = programs.lower_sample(BUCKET.rows).compile(compiler_options=QUICK)
    engine = Engine(Runner(programs, forward.params, max_model_len=56), config=EngineConfig("none"))
    engine.close = lambda: None  # type: ignore[method-assign]  # the weights are of use to others
    cases = {f"{pooling} {count}": (pooling, count) for pooling in ("last", "mean") for count in (40, 23, 1)}
    requests = {name: (prompt[:count], PoolingParams(pooling=pooling)) for name, (pooling, count) in cases.items()}
    outputs = serve(
        engine, {**requests, "text": (prompt, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))}
    )
    again = serve(engine, requests)
    assert (again["last 40"].num_cached_tokens, again["mean 40"].num_cached_tokens) == (36, 0)
    assert outputs["text"].outputs[0].token_ids == golden_expected(family)[0][40:49].tolist()
    for name, (pooling, count) in cases.items():
        wanted = hidden[count - 1] if pooling == "last" else hidden[:count].mean(axis=0)
        for found in (outputs[name], again[name]):
            assert found.finished and found.outputs[0].token_ids == []
            np.testing.assert_allclose(found.embedding, wanted / np.linalg.norm(wanted), atol=TOLERANCE, err_msg=name)
    halved = serve(engine, {"halved": (prompt, PoolingParams(pooling="last", dimensions=hidden.shape[1] // 2))})
    wanted = hidden[-1, : hidden.shape[1] // 2]
    np.testing.assert_allclose(halved["halved"].embedding, wanted / np.linalg.norm(wanted), atol=TOLERANCE)


def run_engine(family: str, programs: StepPrograms, forward: Forward) -> None:
    """Scheduler, runner and sampler together: the greedy tokens, and the same with the prefix cache's pages."""
    tokens, expected, prompt = golden_expected(family)
    programs.full_samplers[BUCKET.rows] = programs.lower_full_sample(BUCKET.rows).compile(compiler_options=QUICK)
    engine = Engine(Runner(programs, forward.params, max_model_len=56), config=EngineConfig("none"))
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=3)
    outputs = [serve(engine, {name: (prompt.tolist(), greedy)})[name] for name in ("first", "second")]
    first, second = (output.outputs[0] for output in outputs)
    assert [output.num_cached_tokens for output in outputs] == [0, 36]
    assert first.token_ids == tokens[40:].tolist()
    assert second.token_ids == first.token_ids
    logprobs = expected[39:] - np.logaddexp.reduce(expected[39:].astype(np.float64), axis=1, keepdims=True)
    for position, (one, other) in enumerate(zip(first.logprobs, second.logprobs, strict=True)):
        best = np.argsort(-logprobs[position])[:3]
        assert list(one) == list(other) == best.tolist()
        for token in one:
            assert one[token].logprob == pytest.approx(logprobs[position, token], abs=TOLERANCE)
            assert other[token].logprob == pytest.approx(one[token].logprob, abs=1e-5)
    engine.close()
