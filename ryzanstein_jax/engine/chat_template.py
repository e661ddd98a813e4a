"""Chat templates: messages to the text of a prompt. No JAX here.

A template comes with the model, from whoever published it; messages, tools and extra variables come from whoever
sends a request. Neither may stop the process: see `template_sandbox.py` for the bounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes

from ryzanstein_jax.engine.template_sandbox import (
    MAX_INTEGER_BITS,
    MAX_OUTPUT_CHARACTERS,
    BoundedEnvironment,
    Budget,
    LimitError,
    bounded,
    budget,
)
from ryzanstein_jax.errors import ConfigError, RequestError

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_MESSAGES = 1 << 14

#: Variables that a request may set though the template does not use them: clients send them to any model.
COMMON_VARIABLES = frozenset({"enable_thinking", "thinking", "reasoning_effort", "documents", "date_string"})
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """One compiled template.

    Raises:
        ConfigError: the template is too long or no valid Jinja.
    """

    def __init__(self, source: str, *, name: str = "chat_template"):
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ConfigError(name, type(source).__name__, f"use text of at most {MAX_TEMPLATE_CHARACTERS} characters")
        self.source, self.name = source, name
        environment = BoundedEnvironment()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree)) - set(environment.globals)
            self._reads_parts = _iterates_content(tree)
            self._template = environment.from_string(bounded(tree, environment))
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            raise ConfigError(name, source[:60], f"it does not compile{where}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, as text.

        Raises:
            RequestError: messages, tools or variables that are malformed, or that the template refuses.
        """
        scope: dict[str, Any] = dict(special_tokens or {})
        scope.update(self._checked(variables or {}, scope))
        scope["messages"] = [self._message(message) for message in _messages(messages)]
        scope["tools"] = _plain(list(tools), "tools") if tools else None
        scope["add_generation_prompt"] = bool(add_generation_prompt)
        token = budget.set(Budget())
        parts, size = [], 0
        try:
            for part in self._template.generate(scope):
                size += len(part)
                budget.get().charge()
                if size > MAX_OUTPUT_CHARACTERS:
                    raise LimitError(f"the prompt has more than {MAX_OUTPUT_CHARACTERS} characters")
                parts.append(part)
        except Exception as error:  # a template's expressions raise whatever Python does
            raise RequestError(
                "messages", f"{len(scope['messages'])} messages", f"{self.name} refused them: {error}"
            ) from error
        finally:
            budget.reset(token)
        return "".join(parts)

    def _checked(self, variables: Mapping[str, Any], special_tokens: Mapping[str, str]) -> dict[str, Any]:
        usable = (self.variables | COMMON_VARIABLES) - _RESERVED - set(special_tokens)
        for name in variables:
            if name not in usable:
                remedy = (
                    f"the template does not read it; it reads {', '.join(sorted(usable & self.variables)) or 'none'}"
                )
                raise RequestError("chat_template_kwargs", name, remedy)
        plain = _plain(dict(variables), "chat_template_kwargs")
        assert isinstance(plain, dict)
        return plain

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list) and not self._reads_parts:
            # This template puts content straight into the text: join what the API calls parts.
            texts = []
            for part in content:
                text = part.get("text") if isinstance(part, dict) else part
                if not isinstance(text, str):
                    raise RequestError("messages", part, "this model takes text only: use parts of type text")
                texts.append(text)
            message["content"] = "\n".join(texts)
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                # The API sends arguments as JSON text, templates expect the object (and would quote it twice).
                try:
                    function["arguments"] = json.loads(function["arguments"] or "{}")
                except (ValueError, RecursionError) as error:
                    raise RequestError(
                        "messages.tool_calls.function.arguments", function["arguments"], "use JSON text"
                    ) from error
        return message


def _messages(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages", messages, 'use a list such as [{"role": "user", "content": "Hello"}]')
    if len(messages) > MAX_MESSAGES:
        raise RequestError("messages", f"{len(messages)} messages", f"use at most {MAX_MESSAGES}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("messages", message, "each message is an object with a role")
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise RequestError("messages.content", message.get("content"), "use text or a list of parts")
    plain = _plain(list(messages), "messages")
    assert isinstance(plain, list)
    return plain


def _plain(value: object, field: str) -> object:
    """A copy made of JSON's own types: nothing that a template could call, no more than MAX_OUTPUT_CHARACTERS."""
    left = MAX_OUTPUT_CHARACTERS

    def copy(value: object, depth: int) -> object:
        nonlocal left
        left -= len(value) if isinstance(value, str) else 1
        if left < 0 or depth > 32:
            raise RequestError(
                field, type(value).__name__, f"use at most {MAX_OUTPUT_CHARACTERS} characters, 32 levels"
            )
        if isinstance(value, str):
            return str.__str__(value)
        if value is None or type(value) in (bool, int, float):
            if type(value) is int and value.bit_length() > MAX_INTEGER_BITS:
                raise RequestError(field, "a number", "use smaller numbers")
            return value
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise RequestError(field, value, "use strings as keys")
            return {copy(key, depth + 1): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        raise RequestError(field, value, "use text, numbers, true, false, null, lists and objects")

    return copy(value, 0)


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether the template handles content that is a list of parts."""
    for loop in tree.find_all(nodes.For):
        for node in (loop.iter, *loop.iter.find_all(nodes.Expr)):
            name = getattr(node, "attr", None) if isinstance(node, nodes.Getattr) else getattr(node, "name", None)
            if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
                name = node.arg.value
            if name == "content":
                return True
    return False
