"""What collectives bring is computed, so it is held against the compiled programs."""

import pytest

from ryzanstein_jax import LLM, SamplingParams
from ryzanstein_jax.engine.usage import collective_bytes
from ryzanstein_jax.sharding import collectives
from tests.support import GOLDEN, quick_compiles

#: Without what earlier starts left on disk: of that, only the programs of a first step are there from the beginning.
SETTINGS = dict(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32, compilation_cache_dir="", progress=False)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compiles():
        yield


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_the_computed_bytes_are_those_of_the_programs(family):
    with LLM(str(GOLDEN / family), tensor_parallel_size=2, **SETTINGS) as llm:
        programs = llm._executor._programs
        for table in ("forwards", "samplers", "full_samplers"):
            found = getattr(programs, table)
            assert found
            for size, program in list(found.items()):
                read = sum(one.bytes * one.count for one in collectives(program))
                assert collective_bytes(programs, table, size) == read > 0, (table, size)


def test_use_is_counted_as_it_comes():
    with LLM(str(GOLDEN / "llama"), tensor_parallel_size=2, **SETTINGS) as llm:
        executor = llm._executor
        (before,) = executor.usage()
        assert before.collective_bytes == 0 and before.memory_bytes > 1 << 20
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True), use_tqdm=False)
        (after,) = executor._meter.look()
        runs = executor._runner.runs
        assert sum(count for (table, _), count in runs.items() if table == "forwards") == 4
        assert after.collective_bytes == sum(
            count * collective_bytes(executor._programs, *program) for program, count in runs.items()
        )
    with LLM(str(GOLDEN / "llama"), **SETTINGS) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
        assert llm._executor._meter.look()[0].collective_bytes == 0, "one device talks to nobody"
