"""LangChain's OpenAI classes against the server, unchanged."""

import asyncio

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from ryzanstein_jax import AsyncLLM, PoolingParams, SamplingParams
from tests.server.serving import MODEL, Served

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Hello")]
PLAIN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def settings(served: Served) -> dict[str, object]:
    return dict(model=MODEL, base_url=f"{served.url}/v1", api_key="none", max_retries=0, temperature=0)


@pytest.fixture(scope="module")
def wanted(engine: AsyncLLM):
    return asyncio.run(engine.generate(PLAIN, SamplingParams(max_tokens=12, temperature=0))).outputs[0]


@pytest.mark.parametrize("responses", [False, True])
def test_a_chat_model_answers_whole_in_batches_and_in_pieces(served, wanted, responses):
    model = ChatOpenAI(
        **settings(served), max_completion_tokens=12, use_responses_api=responses, stream_usage=not responses
    )
    for found in (model.invoke(MESSAGES), *model.batch([MESSAGES] * 3)):
        assert isinstance(found, AIMessage) and found.text == wanted.text
        assert found.usage_metadata["output_tokens"] == len(wanted.token_ids)
    whole: AIMessageChunk | None = None
    for chunk in model.stream(MESSAGES):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.text == wanted.text
    assert whole.usage_metadata["output_tokens"] == len(wanted.token_ids)


def test_coroutines_get_the_same(served, wanted):
    async def main() -> list[AIMessage]:
        models = [
            ChatOpenAI(**settings(served), max_completion_tokens=12, use_responses_api=responses)
            for responses in (False, True)
        ]
        return await asyncio.gather(*(model.ainvoke(MESSAGES) for model in models * 3))

    assert [found.text for found in asyncio.run(main())] == [wanted.text] * 6


def test_an_answer_goes_back_with_the_next_question(served, engine):
    for responses in (False, True):
        model = ChatOpenAI(**settings(served), max_completion_tokens=12, use_responses_api=responses)
        first = model.invoke(MESSAGES)
        found = model.invoke([*MESSAGES, first, HumanMessage("More")])
        plain = [*PLAIN, {"role": "assistant", "content": first.text}, {"role": "user", "content": "More"}]
        params = SamplingParams(max_tokens=12, temperature=0)
        assert found.text == asyncio.run(engine.generate(plain, params)).outputs[0].text


def test_log_probabilities_stops_and_seeds(served, wanted):
    model = ChatOpenAI(**settings(served), max_completion_tokens=12, seed=4, logprobs=True, top_logprobs=2)
    content = model.invoke(MESSAGES).response_metadata["logprobs"]["content"]
    assert len(content) == len(wanted.token_ids) and all(len(one["top_logprobs"]) == 2 for one in content)
    stop = wanted.text[4:6]
    assert model.invoke(MESSAGES, stop=[stop]).text == wanted.text[: wanted.text.index(stop)]


def test_completions_and_embeddings(served, engine):
    found = OpenAI(**settings(served), max_tokens=9).invoke("Hello")
    assert found == asyncio.run(engine.generate("Hello", SamplingParams(max_tokens=9, temperature=0))).outputs[0].text
    named = {name: value for name, value in settings(served).items() if name != "temperature"}
    # Else it would tokenize with the tokenizer of OpenAI's own models.
    embeddings = OpenAIEmbeddings(**named, check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(["one", "two"])
    for text, vector in zip(["one", "two"], vectors, strict=True):
        assert vector == pytest.approx(asyncio.run(engine.embed(text, PoolingParams())).embedding.tolist(), abs=1e-5)
