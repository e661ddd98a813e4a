"""`response_format`, `structured_outputs` and tools, on a model of noise: what comes out is the grammar's work."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from ryzanstein_jax import AsyncLLM
from tests.server.model import SETTINGS, tool_model
from tests.server.serving import MODEL, FakeBackend, Served, serving

CHAT = [{"role": "user", "content": "What is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}, "y": {"const": "é—"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        }
    },
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
SAMPLED = dict(model=MODEL, messages=CHAT, temperature=1.0, max_tokens=1500)


@pytest.fixture(scope="module")
def tools_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    folder = tool_model(tmp_path_factory.mktemp("tools"))
    made = AsyncLLM(str(folder), **{**SETTINGS, "max_model_len": 3000, "max_num_batched_tokens": 512})
    yield made
    made.close()


@pytest.fixture(scope="module")
def tools(tools_engine: AsyncLLM) -> Iterator[Served]:
    with serving(tools_engine) as found:
        yield found
    assert tools_engine.stats().num_pages_used == 0


@pytest.fixture(scope="module")
def client(tools: Served) -> openai.OpenAI:
    return tools.client()


def schema_format(schema: dict, **more: Any) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.mark.parametrize("strict", [True, None])
def test_an_answer_keeps_to_its_schema(client, strict):
    for seed in range(3):
        found = client.chat.completions.create(
            **SAMPLED, seed=seed, n=2, response_format=schema_format(SCHEMA, strict=strict), logprobs=True
        )
        for choice in found.choices:
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
            assert choice.finish_reason == "stop" and choice.message.tool_calls is None
            assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        assert found.choices[0].message.content != found.choices[1].message.content


def test_a_stream_keeps_to_it_beside_penalties_and_biases(client):
    asked = dict(
        **SAMPLED, seed=4, response_format=schema_format(SCHEMA), frequency_penalty=1.0, logit_bias={"40": 100}
    )
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert text == whole and chunks[-1].choices[0].finish_reason == "stop"


def test_any_object_and_what_is_cut_off(client):
    form = {"type": "json_object"}
    cut = client.chat.completions.create(**{**SAMPLED, "max_tokens": 5}, response_format=form).choices[0]
    assert cut.finish_reason == "length" and cut.message.content.lstrip().startswith("{")
    # Ends are likely enough in some of these; each that ends is an object.
    found = client.chat.completions.create(**{**SAMPLED, "max_tokens": 60}, n=4, seed=1, response_format=form)
    for choice in found.choices:
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_the_client_s_own_helpers(client):
    class Answer(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        kind: Literal["cat", "dog"]
        legs: int = pydantic.Field(ge=2, le=4)

    parsed = client.chat.completions.parse(**SAMPLED, seed=1, response_format=Answer).choices[0].message.parsed
    assert parsed.kind in ("cat", "dog") and 2 <= parsed.legs <= 4
    found = client.chat.completions.parse(
        **SAMPLED, seed=1, tools=[openai.pydantic_function_tool(Answer)], tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = found.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Answer)


def test_vllm_s_field(tools):
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": CHAT})):
        for form, allowed in (
            ({"choice": ["yes", "no"]}, ("yes", "no")),
            ({"regex": "(a|b)c"}, ("ac", "bc")),
            ({"grammar": 'start: "x" | "yy"'}, ("x", "yy")),
            ({"json": {"enum": [1, "é"]}, "disable_any_whitespace": True}, ("1", '"é"')),
            ({"json": '{"const": null}'}, ("null",)),
        ):
            status, _, found = tools.post(path, **body, structured_outputs=form, max_tokens=20, temperature=1)
            assert status == 200, found
            choice = found["choices"][0]
            assert (choice["text"] if "text" in choice else choice["message"]["content"]) in allowed
            assert choice["finish_reason"] == "stop"


def check_calls(calls: list, *names: str) -> None:
    assert calls and len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function" and call.id.startswith("call_") and call.function.name in names
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        else:
            assert arguments == {}


@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [
        ("required", None, ("get_weather", "time")),
        ("required", False, ("get_weather", "time")),
        ({"type": "function", "function": {"name": "time"}}, None, ("time",)),
        ({"type": "function", "function": {"name": "get_weather"}}, True, ("get_weather",)),
    ],
)
def test_forced_calls_streamed_and_whole(client, choice, parallel, names):
    counts = set()
    more = {} if parallel is None else {"parallel_tool_calls": parallel}
    for seed in range(4):
        asked = dict(**SAMPLED, seed=seed, tools=[WEATHER, TIME], tool_choice=choice, **more)
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls" and whole.message.content is None
        check_calls(whole.message.tool_calls, *names)
        counts.add(len(whole.message.tool_calls))
        calls: dict[int, list[str]] = {}
        reasons, roles = [], []
        for chunk in client.chat.completions.create(**asked, stream=True):
            delta = chunk.choices[0].delta
            assert not delta.content
            roles.append(delta.role)
            reasons.append(chunk.choices[0].finish_reason)
            for part in delta.tool_calls or ():
                if part.index not in calls:
                    assert part.index == len(calls) and part.type == "function" and part.id
                    calls[part.index] = [part.function.name, ""]
                else:
                    assert part.id is None and part.function.name is None
                calls[part.index][1] += part.function.arguments
        assert roles[0] == "assistant" and set(roles[1:]) == {None}
        assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}
        assert list(calls.values()) == [[c.function.name, c.function.arguments] for c in whole.message.tool_calls]
    if choice == "required":
        assert (max(counts) > 1) == (parallel is None), "so many seeds and never two calls, or two where one was asked"
    else:
        assert counts == {1}


def test_arguments_come_in_pieces(client):
    chunks = client.chat.completions.create(**SAMPLED, seed=1, tools=[WEATHER], tool_choice="required", stream=True)
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert len(parts) > 10


def test_the_model_may_choose(client):
    """This one writes noise, so it never calls by chance; with strict functions its calls would be whole."""
    for more in ({}, {"parallel_tool_calls": False}, {"tool_choice": "auto"}):
        strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
        for tool in (WEATHER, strict):
            found = client.chat.completions.create(**{**SAMPLED, "max_tokens": 20}, seed=3, tools=[tool], **more)
            (choice,) = found.choices
            assert choice.message.content and choice.message.tool_calls is None
            assert choice.finish_reason in ("stop", "length")
    none = client.chat.completions.create(**{**SAMPLED, "max_tokens": 20}, seed=3, tools=[WEATHER], tool_choice="none")
    assert none.usage.prompt_tokens < found.usage.prompt_tokens, "it is not shown tools that it may not call"


def test_an_answer_or_calls(client):
    kinds, strict = set(), {"type": "function", "function": {"name": "time", "strict": True}}
    for seed in range(8):
        (choice,) = client.chat.completions.create(
            **SAMPLED, seed=seed, tools=[strict], response_format=schema_format({"enum": [{"a": 1}]})
        ).choices  # fmt: skip
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content) == {"a": 1} and choice.message.tool_calls is None
        else:
            check_calls(choice.message.tool_calls, "time")
    assert kinds == {"stop", "tool_calls"}


def test_calls_and_results_go_back_through_the_template(client, tools):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    status, _, found = tools.post("/tokenize", messages=messages)
    assert status == 200, found
    text = tools.post("/detokenize", tokens=found["tokens"])[2]["prompt"]
    assert text == "user: What is the weather?assistant: <tool_call>get_weather(Rome)</tool_call>tool: sunnyassistant:"
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=2)
    assert answer.usage.prompt_tokens > len(text)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": schema_format({"type": "nothing"})}, "response_format"),
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "response_format"),
        ({"response_format": schema_format({"$ref": "http://127.0.0.1:9/"})}, "response_format"),
        ({"response_format": schema_format({"$ref": "#"})}, "response_format"),
        ({"response_format": schema_format({"title": "x" * 200_000})}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
         "response_format.json_schema.name"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "tools": [TIME]}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [TIME], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
          "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{"}}]}]}, "messages.tool_calls.function.arguments"),
    ],
)  # fmt: skip
def test_what_can_t_be_done_is_refused_by_name(tools, change, param):
    status, _, body = tools.post("/v1/chat/completions", **{"messages": CHAT, "max_tokens": 3, **change})
    assert status == 400, body
    error = body["error"]
    assert error["type"] == "invalid_request_error" and (error["param"] or "").startswith(param), error
    assert len(error["message"]) < 600
    assert tools.chat("x", max_tokens=1, temperature=0)[0] == 200


def test_a_schema_that_is_deep_or_multiplies(tools):
    deep: Any = {"type": "integer"}
    for _ in range(70):
        deep = {"type": "object", "properties": {"a": deep}}

    def one(name: str, value: int) -> dict:
        return {"type": "object", "properties": {name: {"const": value}}, "required": [name]}

    parts = [{"anyOf": [one(f"p{i}", j) for j in range(4)]} for i in range(6)]
    for schema in (deep, {"allOf": parts}, {"allOf": parts * 5}):
        for stream in (False, True):
            status, _, body = tools.chat("x", response_format=schema_format(schema), stream=stream)
            assert status == 400 and body["error"]["param"] == "response_format", body
            assert "panic" not in body["error"]["message"]
    nested = b'{"a":' * 5000 + b"1" + b"}" * 5000
    raw = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema",'
    raw += b'"json_schema":{"name":"x","schema":%s}}}' % nested
    status, _, _ = tools.request("POST", "/v1/chat/completions", raw)
    assert status == 400
    assert tools.chat("x", max_tokens=1)[0] == 200


def test_a_template_without_tools(served):
    """The model is not asked to do what it never saw; a forced call tells it in the system message."""
    status, _, body = served.chat("x", tools=[TIME])
    assert status == 400 and body["error"]["param"] == "tool_choice" and "required" in body["error"]["message"]
    status, _, body = served.chat("x", tools=[TIME], tool_choice="required", max_tokens=1)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded", "the system message is too long for it"
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    status, _, body = served.chat("x", tools=[TIME], tool_choice="none", max_tokens=1)
    assert status == 200
    status, _, body = served.post(
        "/v1/chat/completions", max_tokens=1, messages=[*CHAT, {"role": "assistant", "tool_calls": [call]}]
    )
    assert status == 200
    calls = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    text = f"user: What is the weather?\nassistant: {calls}\nassistant:"
    assert body["usage"]["prompt_tokens"] == len(text)


def test_compiling_takes_no_longer_than_it_may(fake: FakeBackend):
    import threading
    import time

    release = threading.Event()
    fake.compile_grammar = lambda params: release.wait(20)
    with serving(fake, encode_seconds=0.1) as served:
        began = time.monotonic()
        status, _, body = served.chat("x", response_format={"type": "json_object"})
        assert status == 400 and body["error"]["param"] == "response_format" and "took over" in body["error"]["message"]
        assert fake.num_streams == 0 and time.monotonic() - began < 0.6
        assert served.service.admission.num_sequences == 0
        release.set()


def test_it_is_compiled_off_the_event_loop(fake: FakeBackend):
    import threading

    seen = []
    fake.compile_grammar = lambda params: seen.append(threading.current_thread().name)
    with serving(fake) as served:
        assert served.chat("x", response_format={"type": "json_object"}, max_tokens=1)[0] == 200
    assert len(seen) == 1 and seen[0].startswith("encode")
