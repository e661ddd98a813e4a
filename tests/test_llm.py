"""`LLM` and `AsyncLLM` as a user meets them, on a tiny model; texts on the real one."""

import asyncio
import threading

import numpy as np
import pytest

from ryzanstein_jax import LLM, AsyncLLM, SamplingParams
from ryzanstein_jax.errors import ConfigError, EngineClosedError, RequestError

GOLDEN = "tests/golden/smollm2"
SETTINGS = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_pages": 40, "progress": False}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def golden():
    expected = np.load(f"{GOLDEN}/expected.npz")
    return expected["prompt"].tolist(), expected["generated"].tolist()


@pytest.fixture(scope="module")
def llm():
    with LLM(GOLDEN, tensor_parallel_size=2, **SETTINGS) as model:
        yield model


def test_generate_takes_prompts_in_every_form_and_keeps_their_order(llm, golden):
    prompt, generated = golden
    short = prompt[:7]
    outputs = llm.generate([prompt, {"prompt_token_ids": short}, tuple(prompt)], GREEDY)
    assert [o.prompt_token_ids for o in outputs] == [prompt, short, prompt]
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids == generated[:8]
    assert outputs[0].finished
    assert outputs[0].outputs[0].finish_reason == "length"
    (alone,) = llm.generate(short, GREEDY)
    assert alone.outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_each_prompt_may_have_its_own_parameters(llm, golden):
    prompt, generated = golden
    outputs = llm.generate(
        [prompt, prompt], [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    )
    assert [o.outputs[0].token_ids for o in outputs] == [generated[:2], generated[:5]]
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate([prompt, prompt], [GREEDY])


def test_a_refused_prompt_leaves_nothing_behind(llm, golden):
    prompt, generated = golden
    with pytest.raises(RequestError, match="prompt"):
        llm.generate([prompt, []], GREEDY)
    with pytest.raises(RequestError, match="vocab"):
        llm.generate([[10**6]], GREEDY)
    with pytest.raises(RequestError, match="tokenizer"):
        llm.generate("a text", GREEDY)
    with pytest.raises(RequestError, match="tokenizer"):
        llm.chat([{"role": "user", "content": "hello"}])
    (output,) = llm.generate([prompt], GREEDY)
    assert output.outputs[0].token_ids == generated[:8]


def test_a_stream_adds_up_and_may_be_left_early(llm, golden):
    prompt, generated = golden
    chunks = list(llm.stream(prompt, GREEDY))
    assert [token for chunk in chunks for token in chunk.token_ids] == generated[:8]
    assert [chunk.finish_reason for chunk in chunks][-1] == "length"
    assert not any(chunk.finish_reason for chunk in chunks[:-1])
    left = llm.stream(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert next(left).token_ids
    left.close()
    # Its pages are free again: two streams at once, and one batch between them, still work.
    first, second = llm.stream(prompt, GREEDY), llm.stream(prompt[:9], GREEDY)
    begun = next(first).token_ids
    (between,) = llm.generate([prompt], GREEDY)
    rest = [token for chunk in first for token in chunk.token_ids]
    assert begun + rest == between.outputs[0].token_ids == generated[:8]
    assert sum(len(chunk.token_ids) for chunk in second) == 8


def test_threads_may_share_a_model(llm, golden):
    prompt, generated = golden
    found = {}

    def run(index):
        (output,) = llm.generate([prompt], GREEDY)
        found[index] = output.outputs[0].token_ids

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == dict.fromkeys(range(4), generated[:8])


def test_it_tells_what_it_communicates_and_holds(llm):
    forwards = {name: found for name, found in llm.collectives().items() if name.startswith("forward")}
    assert forwards
    for found in forwards.values():
        # Two all-reduces a layer, and one after the embedding.
        assert sum(c.count for c in found if c.kind == "all-reduce") == 2 * 3 + 1
        assert {c.kind for c in found} == {"all-reduce"}
        assert all(c.group == 2 for c in found)
    assert "KV cache" in str(llm.report.memory)
    assert "programs" in str(llm.report)
    assert llm.num_devices == 2


def test_a_closed_model_says_so(golden):
    prompt, _ = golden
    model = LLM(GOLDEN, **SETTINGS)
    stream = model.stream(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    next(stream)
    model.close()
    model.close()
    with pytest.raises(EngineClosedError):
        list(stream)
    with pytest.raises(EngineClosedError):
        model.generate([prompt], GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory_utilization": 0.5}, "use memory_fraction"),
        ({"block_size": 16}, "use page_size"),
        ({"colour": "red"}, "there is no such setting"),
        ({"max_model_len": 10**6}, "the model's own limit is 128"),
        ({"tensor_parallel_size": 64}, "8 cpu devices"),
        ({"dtype": "float8"}, "use one of"),
        ({"data_parallel_size": 2}, "use AsyncLLM"),
    ],
)
def test_a_bad_setting_is_named_with_its_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        LLM(GOLDEN, **{**SETTINGS, **settings})


def test_async_requests_run_together_and_may_be_cancelled(golden):
    prompt, generated = golden

    async def main():
        async with AsyncLLM(GOLDEN, **SETTINGS) as model:
            outputs = await asyncio.gather(*(model.generate(prompt, GREEDY) for _ in range(6)))
            assert [o.outputs[0].token_ids for o in outputs] == [generated[:8]] * 6

            long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)

            async def consume():
                async for _ in model.stream(prompt, long):
                    begun.set()
                    await asyncio.Event().wait()  # on a fast machine all would be there before the task is cancelled

            begun = asyncio.Event()
            task = asyncio.create_task(consume())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(RequestError, match="prompt"):
                await model.generate([], GREEDY)
            pieces = [chunk.token_ids async for chunk in model.stream(prompt, GREEDY)]
            assert [token for piece in pieces for token in piece] == generated[:8]
            waiting = asyncio.create_task(model.generate(prompt, long))
            await asyncio.sleep(0)
            return model, waiting

    async def outer():
        model, waiting = await main()
        with pytest.raises(EngineClosedError):
            await waiting
        with pytest.raises(EngineClosedError):
            await model.generate(prompt, GREEDY)

    asyncio.run(outer())


def test_an_engine_that_fails_tells_every_waiter(golden):
    prompt, _ = golden

    async def main():
        async with AsyncLLM(GOLDEN, **SETTINGS) as model:

            def fail():
                raise ValueError("the device is gone")

            model.replicas[0].executor.collect = fail
            results = await asyncio.gather(*(model.generate(prompt, GREEDY) for _ in range(3)), return_exceptions=True)
            assert all(isinstance(r, EngineClosedError) and "the device is gone" in str(r) for r in results)

    asyncio.run(main())
