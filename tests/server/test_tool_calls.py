"""Calls in a model's text: every format, however the text is cut, and what only looks like a call."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzanstein_jax.engine.grammar import Grammars
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.server.tool_calls import FORMATS, CallParser, ToolFormat, calls_grammar, format_of
from ryzanstein_jax.structured_outputs import StructuredOutputsParams
from tests.server.model import save_tokenizer
from tests.server.serving import FakeBackend, events, serving

HERMES, MISTRAL, LLAMA = FORMATS
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
#: What published templates say of calls, cut down to that.
TEMPLATES = {
    "hermes": "{% if tools %}within <tool_call></tool_call> tags{% endif %}",
    "mistral": '{% if tools %}[AVAILABLE_TOOLS]{% endif %}{{ "[TOOL_CALLS][" }}',
    "llama3_json": '<|start_header_id|>{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}',
}


def parsed(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Text, and calls with their arguments."""
    parser = CallParser(form, ["f", "g"], ["</s>"])
    text, calls = "", []
    for part in [part for piece in pieces for part in parser.feed(piece)] + parser.finish():
        if isinstance(part, str):
            text += part
        elif part.id is not None:
            assert part.index == len(calls) and len(part.id) == len(form.id_prefix) + form.id_length
            calls.append([part.name, part.arguments])
        else:
            calls[part.index][1] += part.arguments
    return text, [(name, arguments) for name, arguments in calls]


CASES = [
    (HERMES, 'so:\n<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"<", "b": [1, {}]}}\n</tool_call>',
     "so:", [("f", '{"a": "x}\\"<", "b": [1, {}]}')]),
    (HERMES, '<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"arguments": {"q":1}, "name": "g"}'
     "</tool_call></s>", "", [("f", "{}"), ("g", '{"q": 1}')]),
    (HERMES, "no <tool call> at all </s>", "no <tool call> at all ", []),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "other", "arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": [1', "", [("f", '{"a": [1')]),  # cut off
    (HERMES, '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    (HERMES, "<tool_call>call f", "<tool_call>call f", []),
    (HERMES, '<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', "", [("f", '{"a":1}')]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]</s>',
     "", [("f", '{"a": 1}'), ("g", "{}")]),
    (MISTRAL, "text [TOOL", "text [TOOL", []),
    (LLAMA, ' {"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, '{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
     "", [("f", "{}"), ("g", "{}")]),
    (LLAMA, '{"answer": 5} it is', '{"answer": 5} it is', []),
    (LLAMA, 'say {"name": "f", "parameters": {}}', 'say {"name": "f", "parameters": {}}', []),
    (LLAMA, "", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "answer", "text", "calls"), CASES)
def test_calls_are_found_however_the_text_is_cut(form, answer, text, calls):
    assert parsed(form, [answer]) == (text, calls)
    for size in (1, 2, 3, 7):
        pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        if "</s>" in answer:
            pieces = [*answer.replace("</s>", ""), "</s>"]  # a token's text comes whole
        assert parsed(form, pieces) == (text, calls), size


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), st.text(alphabet='{}[]<>/":,\\ \nfgtool_caTOLCASnmerpus', max_size=60), st.data())
def test_any_text_ends_and_loses_nothing_but_space(form, answer, data):
    """Whatever it is, there is no call of a function that is not there, and pieces give what the whole gives."""
    cut = data.draw(st.integers(0, len(answer)))
    text, calls = parsed(form, [answer])
    assert parsed(form, [answer[:cut], answer[cut:]]) == (text, calls)
    assert all(name in ("f", "g") for name, _ in calls)


def test_long_arguments_take_linear_time():
    calls = parsed(HERMES, ['<tool_call>{"arguments": {"a": "', *(["x" * 100] * 5000), '"}, "name": "f"}</tool_call>'])[
        1
    ]
    assert len(calls[0][1]) > 500_000


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells_the_format(tmp_path: Path, name: str):
    save_tokenizer(tmp_path, TEMPLATES[name])
    assert format_of(Tokenizer.from_folder(tmp_path)).name == name
    for other in (TEMPLATES[name] + "<function= [ARGS]", TEMPLATES[name].replace("tools", "things"), "plain"):
        save_tokenizer(tmp_path, other)
        found = format_of(Tokenizer.from_folder(tmp_path))
        assert found is None or (name == "llama3_json" and "tools" in other)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("special", [False, True], ids=["spelled", "tokens"])
@pytest.mark.parametrize("text", [False, True], ids=["forced", "free"])
def test_grammars_allow_calls_and_nothing_else(tmp_path, form, special, text):
    marks = [mark for mark in (form.begin, form.end) if mark] if special else []
    save_tokenizer(tmp_path, "x", *marks)
    tokenizer = Tokenizer.from_folder(tmp_path)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    one = f'{{"name": "f", "{form.arguments}": {{"a": 1}}}}'
    two = one.replace('"f"', '"g"')
    begin, end = form.begin + ("\n" if form.end else form.open), ("\n" + form.end if form.end else form.close)
    between = end + form.between + begin if form.end else form.between
    good = [begin + one + end, *([begin + one + between + two + end] if form.parallel else [])]
    bad = [begin + one.replace("1", '"x"') + end, begin + one.replace('"f"', '"h"') + end]
    (good if text else bad).append("plain text")
    if text and form.begin:
        good.append("before " + good[0])
    functions = [("f", schema), ("g", schema)]

    def allows(answer: str, parallel: bool = True) -> bool:
        grammar = calls_grammar(form, functions, tokenizer, parallel=parallel, text=text)
        matcher = (
            Grammars(tokenizer, tokenizer.vocab_size, (2,)).compile(StructuredOutputsParams(grammar=grammar)).matcher()
        )
        for token in [*tokenizer.encode(answer), 2]:
            if matcher.ended and token == 2:
                return True
            if not int(matcher.mask()[token // 32]) >> token % 32 & 1:
                return False
            matcher.accept(token)
        return matcher.ended

    for answer in good:
        assert allows(answer), answer
        found, calls = parsed(form, [answer])
        assert found == ("plain text" if answer == "plain text" else "before" if "before" in answer else "")
        assert all(json.loads(arguments) == {"a": 1} for _, arguments in calls)
    if form.parallel:
        assert not allows(good[1], parallel=False)
    for answer in bad:
        assert not allows(answer), answer


class Scripted(FakeBackend):
    """Answers with a text."""

    answer = ""

    async def stream(self, prompt, sampling_params=None, *, priority=0):
        self.params = sampling_params
        script = iter(self.tokenizer.encode(self.answer))
        async for chunk in super().stream(prompt, sampling_params, priority=priority):
            one = chunk.output.outputs[0]
            one.token_ids[-1:] = [next(script)]
            before = self.tokenizer.decode(one.token_ids[:-1], self.params.skip_special_tokens)
            one.text = self.tokenizer.decode(one.token_ids, self.params.skip_special_tokens)
            reason = "stop" if len(one.token_ids) == len(self.tokenizer.encode(self.answer)) else None
            yield type(chunk)(0, one.text[len(before) :], one.token_ids[-1:], reason, chunk.output)
            one.finish_reason = reason
            if reason:
                return


@pytest.mark.parametrize(
    ("name", "answer", "content"),
    [
        ("hermes", 'Well: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Well:"),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]</s>', None),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', None),
    ],
)
def test_a_model_that_calls_by_itself(tmp_path, name, answer, content):
    save_tokenizer(tmp_path, TEMPLATES[name], "[TOOL_CALLS]")
    backend = Scripted(Tokenizer.from_folder(tmp_path), max_length=400)
    backend.answer = answer
    with serving(backend) as served:
        status, _, body = served.chat("x", tools=TOOLS, logprobs=False)
        assert status == 200, body
        (choice,) = body["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["message"]["content"] == content and choice["finish_reason"] == "tool_calls"
        assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
        assert len(call["id"]) == (9 if name == "mistral" else 29)
        chunks = [event["choices"][0] for event in events(served.chat("x", tools=TOOLS, stream=True)[2])]
        assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == (content or "")
        parts = [part for chunk in chunks for part in chunk["delta"].get("tool_calls", ())]
        assert parts[0]["function"]["name"] == "f" and parts[0]["type"] == "function"
        assert "".join(part["function"]["arguments"] for part in parts) == '{"a": 1}'
        assert chunks[-1]["finish_reason"] == "tool_calls"
