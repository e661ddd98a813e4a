"""`/v1/responses` through the official client, and what of it this server refuses."""

import asyncio
import json

import openai
import pytest

from ryzanstein_jax import AsyncLLM, SamplingParams
from tests.server.serving import MODEL, Served, serving, wait_until

ASKED = dict(model=MODEL, input="Hello", max_output_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def chat_of(engine: AsyncLLM, messages: list[dict[str, str]], **params: object):
    return asyncio.run(engine.generate(messages, SamplingParams(**params))).outputs[0]


def typed_events(text: str) -> list[dict]:
    """The events of a stream, each framed with its type; nothing follows the last."""
    assert text.endswith("\n\n")
    found = []
    for part in text[:-2].split("\n\n"):
        if part == ": keep-alive":
            continue
        kind, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_a_response_is_the_chat_s_answer(client, engine):
    # No other test asks with it: the engine lives as long as the session, and so do the prefixes that it caches.
    told = "Answer this once."
    found = client.responses.create(**ASKED, instructions=told, metadata={"a": "b"}, user="me")
    messages = [{"role": "system", "content": told}, {"role": "user", "content": "Hello"}]
    wanted = chat_of(engine, messages, max_tokens=20, temperature=0)
    assert found.output_text == wanted.text and found.object == "response" and found.id.startswith("resp_")
    (item,) = found.output
    assert (item.type, item.role, item.status) == ("message", "assistant", found.status)
    ended = {"length": ("incomplete", "max_output_tokens"), "stop": ("completed", None)}[wanted.finish_reason]
    assert (found.status, found.incomplete_details and found.incomplete_details.reason) == ended
    prompt = len(f"system: {told}\nuser: Hello\nassistant:")
    assert (found.usage.input_tokens, found.usage.output_tokens) == (prompt, len(wanted.token_ids))
    assert found.usage.total_tokens == prompt + found.usage.output_tokens
    assert (found.usage.input_tokens_details.cached_tokens, found.usage.output_tokens_details.reasoning_tokens) == (
        0,
        0,
    )
    assert (found.instructions, found.metadata, found.user) == (told, {"a": "b"}, "me")
    assert (found.temperature, found.max_output_tokens, found.store) == (0, 20, False)
    assert found.error is None and found.tools == [] and found.truncation == "disabled"
    # Each field that the client's type needs is there.
    type(found).model_validate(found.model_dump())


def test_a_conversation_with_its_answers_sent_back(client, engine):
    first = client.responses.create(**ASKED)
    asked = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "More"}]
    found = client.responses.create(**{**ASKED, "input": asked})
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "More"},
    ]
    assert found.output_text == chat_of(engine, messages, max_tokens=20, temperature=0).text
    parts = [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]
    whole = client.responses.create(**{**ASKED, "input": [{"role": "developer", "content": parts, "type": "message"}]})
    assert whole.usage.input_tokens == len("system: Hel\nlo\nassistant:")


@pytest.mark.parametrize("most", [1, 20, 60])
def test_a_stream_s_events_build_the_whole(client, served, most):
    asked = {**ASKED, "max_output_tokens": most}
    whole = client.responses.create(**asked)
    _, headers, text = served.request("POST", "/v1/responses", {**asked, "stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    events = typed_events(text)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * deltas, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", f"response.{whole.status}",
    ]  # fmt: skip
    last = events[-1]["response"]
    assert "".join(event.get("delta", "") for event in events) == whole.output_text
    assert events[-4]["text"] == events[-3]["part"]["text"] == last["output"][0]["content"][0]["text"]
    assert events[-2]["item"] == last["output"][0] and last["usage"]["output_tokens"] == whole.usage.output_tokens
    assert {event["item_id"] for event in events if "item_id" in event} == {last["output"][0]["id"]}
    assert {event["response"]["id"] for event in events if "response" in event} == {last["id"]}
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])


def test_the_client_s_streams_work_unchanged(fake):
    """Of a response that completes: of one that is cut off, the client gives no final response."""
    fake.ends = "stop"
    with serving(fake) as served:
        client = served.client()
        whole = client.responses.create(**ASKED)
        assert whole.status == "completed" and len(whole.output_text) == 20
        raw = list(client.responses.create(**ASKED, stream=True))
        assert raw[-1].type == "response.completed" and raw[-1].response.output_text == whole.output_text
        with client.responses.stream(**ASKED) as stream:
            texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        assert "".join(texts) == final.output_text == whole.output_text
        assert final.usage.output_tokens == 20

        async def main() -> str:
            other = openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0)
            async with other, other.responses.stream(**ASKED) as stream:
                return (await stream.get_final_response()).output_text

        assert asyncio.run(main()) == whole.output_text


def test_what_asks_for_nothing_is_no_error(client):
    found = client.responses.create(
        **{**ASKED, "max_output_tokens": 1}, store=False, tools=[], tool_choice="auto", truncation="disabled",
        text={"format": {"type": "text"}}, parallel_tool_calls=True, include=[], background=False, top_logprobs=0,
        reasoning=None, previous_response_id=None, service_tier="auto",
    )  # fmt: skip
    assert found.status in ("completed", "incomplete")


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "gpt-4"}, "model_not_found", "model"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools"),
        ({"include": ["message.output_text.logprobs"]}, "unsupported_parameter", "include"),
        ({"reasoning": {"effort": "high"}}, "unsupported_parameter", "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "unsupported_parameter", "text.format"),
        ({"text": {"verbosity": "low"}}, "unsupported_parameter", "text.verbosity"),
        ({"text": {"colour": "red"}}, "unknown_parameter", "text.colour"),
        ({"colour": "red"}, "unknown_parameter", "colour"),
        ({"n": 2}, "unknown_parameter", "n"),
        ({"input": None}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": 5}, "invalid_value", "input"),
        ({"input": ["x"]}, "invalid_value", "input[0]"),
        ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"role": "user", "content": []}]}, "invalid_value", "input[0].content"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "unknown_parameter", "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "unsupported_parameter", "input[0]"),
        ({"input": [{"type": [1]}]}, "unsupported_parameter", "input[0]"),
        ({"input": "x" * 1000}, "context_length_exceeded", "input"),
        ({"input": "x" * 90_000}, "context_length_exceeded", "input"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": 10**30}, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": 1000}, "context_length_exceeded", "input"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"metadata": {"x": 1}}, "invalid_value", "metadata.x"),
        ({"metadata": {str(number): "" for number in range(17)}}, "invalid_value", "metadata"),
        ({"metadata": {"x": "y" * 513}}, "invalid_value", "metadata.x"),
        ({"stream_options": {"include_obfuscation": False}}, "invalid_value", "stream_options"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_the_rest_is_refused_by_name(served, change, code, param):
    for more in ({}, {"stream": True}) if "stream_options" not in change else ({},):
        status, _, body = served.request("POST", "/v1/responses", {**ASKED, **change, **more})
        assert status in (400, 404), body
        assert (body["error"]["code"], body["error"]["param"]) == (code, param)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": "http://169.254.169.254/"}, {"type": "input_file", "file_id": "x"},
        {"type": "input_text", "text": "x", "image_url": "file:///etc/passwd"}, {"type": ["input_text"], "text": "x"},
        {"type": "input_text"}, {"type": "input_text", "text": None}, {"text": "x"}, "x", None, 5,
        {"type": "output_text", "text": "x", "annotations": [{"type": "url_citation", "url": "http://localhost"}]},
        {"type": "refusal", "refusal": "no"},
    ],
)  # fmt: skip
def test_parts_that_are_no_text(served, part):
    content = [{"type": "input_text", "text": "What is this?"}, part]
    status, _, body = served.request(
        "POST", "/v1/responses", {**ASKED, "input": [{"role": "user", "content": content}]}
    )
    assert status == 400 and body["error"]["param"] == "input[0].content", body


def test_characters_that_are_none(served):
    status, _, body = served.request("POST", "/v1/responses", {**ASKED, "input": "a\0b", "max_output_tokens": 1})
    assert status == 200 and body["usage"]["input_tokens"] == len("user: a0b\nassistant:")
    for raw in (b"\\ud800", b"\\udc00x", b"\xed\xa0\x80"):
        for field in (b'"input":"%s"', b'"input":"x","instructions":"%s"', b'"input":"x","metadata":{"a":"%s"}'):
            assert served.request("POST", "/v1/responses", b'{"model":"tiny",' + field % raw + b"}")[0] == 400


def test_a_stream_that_goes_wrong_ends_with_its_error(fake):
    with serving(fake) as served:

        async def breaks(step: int) -> None:
            if step == 3:
                raise RuntimeError("a secret of the house")

        fake.act = breaks
        _, _, text = served.request("POST", "/v1/responses", {**ASKED, "stream": True})
        events = typed_events(text)
        assert events[-1]["type"] == "response.failed" and events[-1]["response"]["status"] == "failed"
        assert events[-1]["response"]["error"]["code"] == "server_error" and "secret" not in text
        assert sum(event["type"] == "response.output_text.delta" for event in events) == 3
        assert served.request("POST", "/v1/responses", ASKED)[0] == 500
        assert served.service.admission.num_sequences == 0


@pytest.mark.parametrize("stream", [False, True])
def test_it_ends_when_its_client_leaves(fake, stream):
    with serving(fake, max_sequences=1, keep_alive_seconds=0.05) as served:

        async def stand_still(step: int) -> None:
            await asyncio.sleep({2: 0.2}.get(step, 0.01) if step < 5 else 600)

        fake.act = stand_still  # so that nothing else ends it
        connection = served.open("/v1/responses", input="x", max_output_tokens=100, stream=stream)
        wait_until(lambda: fake.num_steps > 3)
        assert served.request("POST", "/v1/responses", ASKED)[0] == 429
        if stream:
            assert b": keep-alive\n\n" in connection.recv(1 << 20)
        connection.close()
        wait_until(lambda: not fake.active, 1.0)
        assert served.service.admission.num_sequences == 0
