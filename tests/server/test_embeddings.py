"""`/v1/embeddings` and what the engine gives beside it: the official client, odd inputs, clients that leave."""

import asyncio
import base64
import threading

import numpy as np
import openai
import pytest

from ryzanstein_jax import AsyncLLM, PoolingParams
from tests.server.serving import MODEL, Served, serving, wait_until

HIDDEN = 48


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def embedded(engine: AsyncLLM, prompt: str | list[int], **params: object) -> np.ndarray:
    return asyncio.run(engine.embed(prompt, PoolingParams(**params))).embedding


def test_the_client_gets_the_engine_s_vectors_in_either_encoding(client, engine):
    wanted = [embedded(engine, text) for text in ("Hello", "a longer text, of more than a chunk of a prompt")]
    assert [vector.shape for vector in wanted] == [(HIDDEN,)] * 2 and abs(wanted[0] @ wanted[1]) < 0.99
    texts = ["Hello", "a longer text, of more than a chunk of a prompt"]
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        found = client.embeddings.create(model=MODEL, input=texts, **more)
        assert (found.object, found.model) == ("list", MODEL)
        assert [(one.object, one.index) for one in found.data] == [("embedding", 0), ("embedding", 1)]
        for one, vector in zip(found.data, wanted, strict=True):
            values = one.embedding
            if isinstance(values, str):  # asked for by name, the client leaves it as it came
                values = np.frombuffer(base64.b64decode(values), "<f4")
            np.testing.assert_allclose(values, vector, atol=1e-5)
            assert np.linalg.norm(values) == pytest.approx(1, abs=1e-5)
        assert (found.usage.prompt_tokens, found.usage.total_tokens) == (sum(map(len, texts)),) * 2


def test_text_and_tokens_alone_and_in_lists(client, engine):
    ids = engine.tokenizer.encode("Hello")
    for asked in ("Hello", ["Hello"], ids, [ids]):
        (one,) = client.embeddings.create(model=MODEL, input=asked).data
        np.testing.assert_allclose(one.embedding, embedded(engine, ids), atol=1e-5)
    (one,) = client.embeddings.create(model=MODEL, input=[44]).data
    np.testing.assert_allclose(one.embedding, embedded(engine, [44]), atol=1e-5)


def test_fewer_dimensions_are_the_first_ones_at_length_one(client, engine):
    whole = embedded(engine, "Hello")
    for count in (1, 7, HIDDEN):
        found = client.embeddings.create(model=MODEL, input="Hello", dimensions=count, user="me").data[0].embedding
        np.testing.assert_allclose(found, whole[:count] / np.linalg.norm(whole[:count]), atol=1e-5)
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model=MODEL, input="Hello", dimensions=HIDDEN + 1)
    assert raised.value.param == "dimensions" and str(HIDDEN) in raised.value.message


def test_more_inputs_than_may_run_at_a_time(engine):
    """As many as the API takes, through fewer places than that; others have room beside them."""
    texts = [f"{number}" for number in range(2048)]
    with serving(engine, max_sequences=80) as served:
        done: list[openai.types.CreateEmbeddingResponse] = []
        worker = threading.Thread(
            target=lambda: done.append(served.client().embeddings.create(model=MODEL, input=texts))
        )
        worker.start()
        wait_until(lambda: served.service.admission.num_sequences == 64)
        assert served.complete(max_tokens=2)[0] == 200 and not done
        worker.join()
        assert [one.index for one in done[0].data] == list(range(2048))
        for number in (0, 63, 64, 2047):
            np.testing.assert_allclose(done[0].data[number].embedding, embedded(engine, texts[number]), atol=1e-4)
        assert served.metric('ryzanstein_requests_finished_total{finish_reason="stop"}') >= 2048
        assert served.metric("ryzanstein_request_seconds_count") == 2
        status, _, body = served.post("/v1/embeddings", input=[*texts, "x"])
        assert status == 400 and body["error"]["param"] == "input"


def test_the_model_s_folder_and_the_setting_say_how_to_pool(engine, served):
    ids = engine.tokenizer.encode("some text")
    last, mean = embedded(engine, ids, pooling="last"), embedded(engine, ids, pooling="mean")
    assert np.abs(last - mean).max() > 0.01
    config = engine.config
    try:
        engine.config = config.replace(embedding_pooling="mean")
        found = served.post("/v1/embeddings", input=ids)[2]["data"][0]["embedding"]
    finally:
        engine.config = config
    np.testing.assert_allclose(found, mean, atol=1e-5)
    np.testing.assert_allclose(served.post("/v1/embeddings", input=ids)[2]["data"][0]["embedding"], last, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": [""]}, "input"), ({"input": [[]]}, "input"),
        ({"input": [1.5]}, "input"), ({"input": [True]}, "input"), ({"input": [[1], "x", []]}, "input"),
        ({"input": None}, "input"), ({"input": {}}, "input"), ({"input": [-1]}, "input"), ({"input": [131]}, "input"),
        ({"input": ["x", [2**70]]}, "input"), ({"input": "x" * 128}, "input"), ({"input": "x" * 50_000}, "input"),
        ({"input": ["x", "y" * 200]}, "input"), ({"input": [5] * 128}, "input"), ({}, "input"),
        ({"input": "x", "dimensions": 0}, "dimensions"), ({"input": "x", "dimensions": 10**30}, "dimensions"),
        ({"input": "x", "dimensions": "8"}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "stream": True}, "stream"), ({"input": "x", "n": 2}, "n"), ({"input": "x", "user": 1}, "user"),
        ({"input": "x", "priority": 10**6}, "priority"), ({"input": "x", "deadline_seconds": 0}, "deadline_seconds"),
    ],
)  # fmt: skip
def test_requests_that_are_none(served, change, param):
    status, _, body = served.post("/v1/embeddings", **change)
    assert status == 400 and body["error"]["param"] == param, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert served.post("/v1/embeddings", input="x")[0] == 200


def test_characters_that_are_none(served):
    status, _, body = served.post("/v1/embeddings", input="a\0b")
    assert status == 200 and body["usage"]["prompt_tokens"] == 3, "NUL is a character like others"
    for raw in (b"\\ud800", b"\\udc00x", b"\xed\xa0\x80"):
        for field in (b'"input":"%s"', b'"input":["x","%s"]', b'"input":"x","%s":1', b'"input":"x","user":"%s"'):
            assert served.request("POST", "/v1/embeddings", b'{"model":"tiny",' + field % raw + b"}")[0] == 400


def test_it_ends_when_its_client_leaves_and_is_let_in_like_others(fake):
    with serving(fake, max_sequences=3) as served:

        async def slowly(step: int) -> None:
            await asyncio.sleep(0.05)

        fake.act = slowly
        connection = served.open("/v1/embeddings", input=["x"] * 500, priority=7)
        wait_until(lambda: fake.active == 3)
        assert served.service.admission.num_sequences == 3 and set(fake.priorities) == {7}
        status, headers, _ = served.post("/v1/embeddings", input="x")
        assert status == 429 and int(headers["retry-after"]) > 0
        connection.close()
        wait_until(lambda: served.service.admission.num_sequences == 0)
        assert fake.num_streams < 100 and not fake.active
        assert served.metric("ryzanstein_disconnects_total") == 1
        status, _, body = served.post("/v1/embeddings", input=["x"] * 90, deadline_seconds=0.2)
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        fake.act = None
        assert served.post("/v1/embeddings", input="x")[2]["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
