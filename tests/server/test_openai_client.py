"""The official client against the server, unchanged; and the answers' fields beside what the engine gives."""

import asyncio
import math

import openai
import pytest

from ryzanstein_jax import AsyncLLM, SamplingParams
from tests.server.serving import MODEL, Served, events

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def expected(engine: AsyncLLM, prompt: str | list[int], **params: object):
    return asyncio.run(engine.generate(prompt, SamplingParams(**params)))


def test_a_completion_is_the_engine_s(client, engine):
    found = client.completions.create(model=MODEL, prompt="Hello", max_tokens=9, temperature=0)
    wanted = expected(engine, "Hello", max_tokens=9, temperature=0)
    assert found.object == "text_completion" and found.id.startswith("cmpl-")
    assert found.choices[0].text == wanted.outputs[0].text
    assert found.choices[0].finish_reason == wanted.outputs[0].finish_reason
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, len(wanted.outputs[0].token_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_several_prompts_and_n_are_in_order(client, engine):
    prompts = ["one", "twenty", [40, 41, 42]]
    found = client.completions.create(
        model=MODEL, prompt=["one", "twenty"], n=2, max_tokens=6, seed=3, temperature=1, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for number, prompt in enumerate(prompts[:2]):
        wanted = expected(engine, prompt, n=2, max_tokens=6, seed=3, temperature=1, ignore_eos=True)
        assert [choice.text for choice in found.choices[2 * number :][:2]] == [one.text for one in wanted.outputs]
    assert found.usage.prompt_tokens == 9 and found.usage.completion_tokens == 24
    tokens = client.completions.create(model=MODEL, prompt=[prompts[2]], max_tokens=4, temperature=0)
    assert tokens.choices[0].text == expected(engine, prompts[2], max_tokens=4, temperature=0).outputs[0].text


def test_a_stream_adds_up_to_the_whole(client):
    asked = dict(model=MODEL, messages=CHAT, max_tokens=20, temperature=1, seed=5, n=2)
    whole = client.chat.completions.create(**asked)
    texts, reasons, roles, usages, ids = ["", ""], [None, None], [None, None], [], set()
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        ids.add(chunk.id)
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = roles[choice.index] or choice.delta.role
            assert reasons[choice.index] is None, "nothing follows the end"
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert roles == ["assistant", "assistant"] and len(ids) == 1
    # The whole one came first, so that the stream finds the prompt cached.
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1].total_tokens == whole.usage.total_tokens


def test_a_streamed_completion_with_echo_and_log_probabilities(client, served):
    asked = dict(model=MODEL, prompt="Hey", max_tokens=5, temperature=0, echo=True, logprobs=2)
    whole = client.completions.create(**asked).choices[0]
    pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.text and whole.text.startswith("Hey")
    for name in ("tokens", "text_offset"):
        assert [one for piece in pieces for one in getattr(piece.logprobs, name)] == getattr(whole.logprobs, name)
    streamed = [one for piece in pieces for one in piece.logprobs.token_logprobs]
    assert streamed[0] is None and streamed[1:] == pytest.approx(whole.logprobs.token_logprobs[1:], abs=1e-4)
    assert whole.logprobs.tokens[:3] == ["H", "e", "y"] and whole.logprobs.text_offset[:4] == [0, 1, 2, 3]
    assert whole.logprobs.top_logprobs[0] is None
    assert all(2 <= len(top) <= 3 for top in whole.logprobs.top_logprobs[1:])
    _, _, text = served.complete("Hey", max_tokens=2, stream=True)
    assert all("usage" not in event for event in events(text))


def test_the_log_probabilities_of_a_prompt_alone(client, engine):
    """What evaluation harnesses ask: no token generated, the prompt scored."""
    asked = dict(model=MODEL, prompt=[[40, 41, 42, 43]], temperature=0, echo=True, logprobs=1)
    for most in (0, 1):
        found = client.completions.create(**asked, max_tokens=most)
        choice = found.choices[0]
        assert len(choice.logprobs.tokens) == 4 + most and found.usage.completion_tokens == most
        wanted = expected(engine, [40, 41, 42, 43], max_tokens=1, prompt_logprobs=1, temperature=0).prompt_logprobs
        scores = [entry[token].logprob for token, entry in zip([41, 42, 43], wanted[1:], strict=True)]
        assert choice.logprobs.token_logprobs[1:4] == pytest.approx(scores, abs=1e-4)
    assert choice.finish_reason == "length"


def test_the_log_probabilities_of_a_chat(client):
    found = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob, "greedy takes the likeliest"
        assert entry.bytes == list(entry.token.encode()) and math.exp(entry.logprob) <= 1
    streamed = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=4, temperature=0, logprobs=True, stream=True
    )
    several = [entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in several] == [entry.token for entry in content]
    assert not any(entry.top_logprobs for entry in several)


def test_stops_biases_and_penalties_reach_the_engine(client, engine):
    plain = client.completions.create(model=MODEL, prompt="Hello", max_tokens=12, temperature=0).choices[0].text
    stop = plain[3:5]
    stopped = client.completions.create(model=MODEL, prompt="Hello", max_tokens=12, temperature=0, stop=stop)
    assert stopped.choices[0].text == plain[: plain.index(stop)] and stopped.choices[0].finish_reason == "stop"
    biased = client.completions.create(
        model=MODEL, prompt="Hello", max_tokens=3, temperature=0, logit_bias={"40": 100.0}, stop=["never", "ever"]
    )
    assert biased.choices[0].text == engine.tokenizer.decode([40] * 3)
    params = dict(max_tokens=8, temperature=0, frequency_penalty=2.0, presence_penalty=1.0, logit_bias={40: 5.0})
    found = client.completions.create(model=MODEL, prompt="Hello", **{**params, "logit_bias": {"40": 5.0}})
    assert found.choices[0].text == expected(engine, "Hello", **params).outputs[0].text


def test_a_seed_repeats_and_others_differ(client):
    def text(seed: int) -> str:
        found = client.chat.completions.create(
            model=MODEL, messages=CHAT, max_completion_tokens=24, seed=seed, top_p=0.9
        )
        return found.choices[0].message.content

    assert text(1) == text(1) != text(2)


def test_content_in_parts_and_template_variables(client, served):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    status, _, body = served.post("/tokenize", messages=[{"role": "developer", "content": parts}])
    assert status == 200
    status, _, text = served.post("/detokenize", tokens=body["tokens"])
    assert text == {"prompt": "system: Hel\nlo\nassistant:"}
    _, _, styled = served.post("/tokenize", messages=CHAT, chat_template_kwargs={"style": "terse"})
    _, _, text = served.post("/detokenize", tokens=styled["tokens"])
    assert text == {"prompt": "user: Hello\n(terse) assistant:"}
    found = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert found.usage.prompt_tokens == len("user: Hel\nlo\nassistant:")


def test_models_tokens_and_version(client, served):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model") and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"
    assert served.post("/tokenize", prompt="Hi!")[2] == {"count": 3, "max_model_len": 128, "tokens": [44, 77, 5]}
    assert served.request("GET", "/version")[2] == {"version": "1.2.3"}


@pytest.mark.parametrize(
    ("change", "kind", "code", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "invalid_value",
         "messages[0].tool_call_id"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": 1000}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "missing_required_parameter", "tools[0].function"),
        ({"response_format": {"type": "x"}}, openai.BadRequestError, "invalid_value", "response_format.type"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "unknown_parameter", "colour"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "invalid_value", "stream_options"),
        ({"top_logprobs": 2}, openai.BadRequestError, "invalid_value", "top_logprobs"),
    ],
)  # fmt: skip
def test_errors_are_those_the_client_knows(client, change, kind, code, param):
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "max_tokens": 2, **change})
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.type == "invalid_request_error" and raised.value.request_id


def test_what_asks_for_nothing_is_no_error(client):
    found = client.chat.completions.create(
        model=MODEL, messages=[*CHAT, {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None}],
        max_tokens=1, user="somebody", response_format={"type": "text"}, tools=[], store=False,
    )  # fmt: skip
    assert found.choices[0].finish_reason in ("stop", "length")


def test_many_async_streams_at_once(served):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=f"number {number % 4}", max_tokens=20, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(24)))

    texts = asyncio.run(main())
    assert [texts[number] == texts[number % 4] for number in range(24)] == [True] * 24


def test_streams_of_several_prompts_keep_them_apart(client):
    asked = dict(model=MODEL, prompt=["one", "twenty", "3"], n=2, max_tokens=7, seed=3, temperature=1)
    whole = client.completions.create(**asked)
    texts = [""] * 6
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 6


def test_a_stream_of_a_prompt_alone(client):
    asked = dict(
        model=MODEL, prompt="Hey", max_tokens=0, echo=True, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(client.completions.create(**asked))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "Hey"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 0)
