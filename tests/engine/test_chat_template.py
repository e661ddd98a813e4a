"""Chat templates: what real ones need, and what hostile ones get."""

import json
import time

import pytest

from ryzanstein_jax.engine import chat_template, template_sandbox
from ryzanstein_jax.engine.chat_template import ChatTemplate
from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import ConfigError, RequestError

CHAT = [{"role": "user", "content": "Hi <b> & 'you'"}]


def render(source, messages=CHAT, **options):
    return ChatTemplate(source).render(messages, **options)


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return Tokenizer.from_gguf(smollm2_path)


def test_smollm2_chat(smollm2):
    text = smollm2.apply_chat_template(CHAT)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <b> & 'you'<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not smollm2.apply_chat_template(CHAT, add_generation_prompt=False).endswith("assistant\n")
    assert smollm2.encode_chat(CHAT) == smollm2.encode(text, add_special_tokens=False)


def test_a_model_without_a_template_says_so(smollm2):
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(smollm2.backend).apply_chat_template(CHAT)


class TestWhatTemplatesUse:
    def test_blocks_are_trimmed(self):
        assert render("  {% for m in messages %}\nx\n  {% endfor %}\ny") == "x\ny"

    def test_tojson_is_plain_json(self):
        tools = [{"type": "function", "function": {"name": "é<&>'", "parameters": {"b": 1, "a": None}}}]
        assert render("{{ tools | tojson }}", tools=tools) == json.dumps(tools, ensure_ascii=False)
        assert render("{{ tools[0] | tojson(indent=4) }}", tools=tools) == json.dumps(
            tools[0], indent=4, ensure_ascii=False
        )

    def test_the_constructs_of_real_templates(self):
        source = """
        {%- set ns = namespace(last=-1, seen=false) -%}
        {%- macro shout(text, n=1) -%}{{ text | upper * n }}{%- endmacro -%}
        {%- for message in messages[::-1] -%}
            {%- if loop.first and not ns.seen -%}
                {%- set ns.seen = true -%}
                {%- set ns.last = loop.length - 1 -%}
            {%- endif -%}
            {%- if message.role == "skip" -%}{%- continue -%}{%- endif -%}
            {%- if message.role == "stop" -%}{%- break -%}{%- endif -%}
            {%- generation -%}
                {{- shout(message.content.split("</think>")[-1].lstrip("\n"), n=2) ~ loop.index0 -}}
            {%- endgeneration -%}
            {%- if not loop.last %},{% endif -%}
        {%- endfor -%}
        |{{ ns.last }}|{{ "%s-%02d" % ("a", 7) }}|{{ "{}".format(3) -}}
        |{{ messages | selectattr("role", "equalto", "user") | list | length -}}
        |{%- for key, value in {"b": 1, "a": 2} | dictsort %}{{ key }}{{ value }}{% endfor -%}
        |{{ dict(a=1).items() | list }}|{{ ["x", "y"] | join("+") -}}
        |{{ undefined_name }}|{{ undefined_name is defined }}|{{ none }}"""
        messages = [
            {"role": "stop", "content": "s"},
            {"role": "user", "content": "<think>x</think>\nab"},
            {"role": "skip", "content": "s"},
            {"role": "assistant", "content": "c"},
        ]
        expected = "CC0,ABAB2,|3|a-07|3|1|a2b1|[('a', 1)]|x+y||False|None"
        assert render(source, messages) == expected

    def test_strftime_now(self):
        assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")

    def test_parts_are_joined_for_templates_that_want_text(self):
        chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        assert render("{{ messages[0]['content'] + '!' }}", chat) == "a\nb!"
        parts = "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}"
        assert render(parts, chat) == "[a][b]"
        with pytest.raises(RequestError, match="text only"):
            render(
                "{{ messages[0].content }}", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
            )

    def test_tool_call_arguments_become_objects(self):
        chat = [
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
        ]
        assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", chat) == '{"a": 1}'
        assert isinstance(chat[0]["tool_calls"][0]["function"]["arguments"], str), "the caller's message was changed"
        chat[0]["tool_calls"][0]["function"]["arguments"] = "{"
        with pytest.raises(RequestError, match="arguments="):
            render("x", chat)

    def test_raise_exception_refuses_the_request(self):
        with pytest.raises(RequestError, match="roles must alternate"):
            render("{{ raise_exception('roles must alternate') }}")

    def test_special_tokens_and_variables(self):
        source = "{{ bos_token }}{{ enable_thinking }}{{ level }}"
        special = {"bos_token": "<s>"}
        assert render(source, special_tokens=special, variables={"enable_thinking": False, "level": 3}) == "<s>False3"

    def test_well_known_variables_may_be_set_for_any_template(self):
        assert render("x", variables={"enable_thinking": True}) == "x"

    @pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "range", "unknown"])
    def test_other_variables_are_refused(self, name):
        with pytest.raises(RequestError, match="chat_template_kwargs="):
            render("{{ bos_token }}{{ x }}", special_tokens={"bos_token": "<s>"}, variables={name: "evil"})


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        [],
        None,
        {"role": "user"},
        ["text"],
        [{"content": "no role"}],
        [{"role": 1}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": "x", "extra": object()}],
        [{"role": "user", "content": "x", 1: 2}],
        [{"role": "user", "content": "x", "n": 10**2000}],
        [{"role": "user", "content": "x"}] * (chat_template.MAX_MESSAGES + 1),
        [{"role": "user", "content": "x" * (template_sandbox.MAX_OUTPUT_CHARACTERS + 1)}],
    ],
)
def test_malformed_messages_are_refused(messages):
    with pytest.raises(RequestError, match="messages"):
        render("x", messages)


def test_deep_messages_are_refused():
    deep = {"role": "user", "content": ""}
    for _ in range(50):
        deep = {"role": "user", "content": "", "inner": deep}
    with pytest.raises(RequestError, match="32 levels"):
        render("x", [deep])


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ x | nope }}", "x" * (1 << 18) + "x", "{% for %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"],
)
def test_a_template_that_does_not_compile_is_a_config_error(source):
    with pytest.raises(ConfigError, match="chat_template="):
        ChatTemplate(source)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{% set n = namespace(__class__=1) %}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}{{ messages.__init__ }}",
    "{{ self._TemplateReference__context.environment.globals.clear() }}",
    "{% include 'etc/passwd' %}",
    "{% import 'os' as os %}",
]
GROW = "{{% set n = namespace(s='aaaaaaaa') %}}{{% for i in range(60) %}}{step}{{% endfor %}}"
BOMBS = {
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat_list": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "nested": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "concat": GROW.format(step="{% set n.s = n.s ~ n.s %}"),
    "plus": GROW.format(step="{% set n.s = n.s + n.s %}"),
    "block": GROW.format(step="{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"),
    "shared": GROW.format(step="{% set n.s = [n.s, n.s] %}") + "{{ n.s }}",
    "shared_json": GROW.format(step="{% set n.s = [n.s, n.s] %}") + "{{ n.s | tojson }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent_star": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format_nested": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "format_filter": "{{ '%9999999999d' | format(1) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
    "replace_filter": "{{ ('a' * 1000000) | replace('a', 'a' * 1000000) }}",
    "join": "{{ ('a' * 1000000).join(range(100000) | map('string')) }}",
    "join_filter": "{{ range(100000) | join('a' * 1000000) }}",
    "strftime": "{{ strftime_now('%9999999999Y') }}",
    "output": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "indent": "{{ messages | tojson(indent=10**10) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "integer": "{% set n = namespace(s=9) %}{% for i in range(90) %}{% set n.s = n.s * n.s %}{% endfor %}",
}


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_has_no_way_out(source):
    messages = [{"role": "user", "content": "x"}]
    try:
        text = render(source, messages)
    except (RequestError, ConfigError):
        text = ""
    assert not any(word in text for word in ("class", "object at", "module", "builtin", "function")), text
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_fast(name):
    start = time.monotonic()
    with pytest.raises((RequestError, ConfigError)):
        render(BOMBS[name])
    assert time.monotonic() - start < 5


def test_a_slow_template_meets_the_deadline(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 1 << 60)
    start = time.monotonic()
    with pytest.raises(RequestError, match="seconds"):
        render("{% for i in range(90000) %}{% for j in range(90000) %}{{ j }}{% endfor %}{% endfor %}")
    assert time.monotonic() - start < 2


def test_a_long_chat_is_cheap(smollm2):
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"message {i}"} for i in range(2000)]
    start = time.monotonic()
    assert smollm2.apply_chat_template(chat).count("message ") == 2000
    assert time.monotonic() - start < 2
