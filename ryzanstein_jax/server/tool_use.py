"""What a chat request asks about tools, brought together with what its model can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.server.chat_format import Function
from ryzanstein_jax.server.schema import ChatRequest
from ryzanstein_jax.server.tool_calls import (
    HERMES,
    CallParser,
    ToolFormat,
    calls_grammar,
    described,
    format_of,
    written,
)


@dataclass(frozen=True)
class ToolUse:
    """How an answer may use tools.

    Attributes:
        form: how the model writes calls.
        in_template: whether the chat template shows the tools; else they are described in the system message.
        functions: those that may be called.
        forced: whether the answer has to be a call.
        parallel: whether it may be several.
    """

    form: ToolFormat
    in_template: bool
    functions: tuple[Function, ...]
    forced: bool
    parallel: bool

    def parser(self, tokenizer: Tokenizer) -> CallParser:
        """For one answer."""
        hidden = []
        if self.shows_special_tokens(tokenizer):
            added = tokenizer.backend.get_added_tokens_decoder()
            texts = [token.content for token in added.values() if token.special]
            hidden = [text for text in texts if text not in (self.form.begin, self.form.end)]
        return CallParser(self.form, [function.name for function in self.functions], hidden)

    def shows_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether calls begin with a special token, which would be left out of the text otherwise."""
        return tokenizer.backend.token_to_id(self.form.begin) in tokenizer.special_token_ids

    def grammar(self, tokenizer: Tokenizer, answer: Mapping[str, Any] | None) -> str | None:
        """What the answer has to follow; None where it may be anything.

        Args:
            answer: a JSON schema that an answer without calls has to follow.
        """
        if not (self.forced or answer is not None or not self.parallel or any(one.strict for one in self.functions)):
            return None
        # What is neither strict nor forced is the model's own affair, as the API has it.
        anything = {"type": "object"}
        functions = [
            (one.name, one.schema_of_arguments if self.forced or one.strict else anything) for one in self.functions
        ]
        text, answer = not self.forced and answer is None, None if self.forced else answer
        return calls_grammar(self.form, functions, tokenizer, parallel=self.parallel, text=text, answer=answer)

    def tools(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return [
            {"type": "function", "function": one.model_dump(exclude_none=True, exclude={"strict"})}
            for one in self.functions
        ]


def tool_use(request: ChatRequest, tokenizer: Tokenizer) -> ToolUse | None:
    """None where no tool may be called.

    Raises:
        RequestError: the model is to choose by itself, and its chat template knows no tools.
    """
    choice = request.tool_choice or "auto"
    if not request.tools or choice == "none":
        return None
    named = None if isinstance(choice, str) else choice.function.name
    functions = tuple(tool.function for tool in request.tools if named in (None, tool.function.name))
    form, forced = format_of(tokenizer), choice != "auto"
    if form is None and not forced:
        found = "writes its calls in a way that is not known here" if tokenizer.tool_template else "knows no tools"
        remedy = f"this model's chat template {found}: set tool_choice to required, or to a function"
        raise RequestError("tool_choice", "auto", remedy)
    parallel = named is None and request.parallel_tool_calls is not False
    return ToolUse(form or HERMES, form is not None, functions, forced, parallel)


def conversation(request: ChatRequest, tokenizer: Tokenizer, use: ToolUse | None) -> list[dict[str, Any]]:
    """The messages for the chat template, with what it can't show of tools as text."""
    messages = [message.plain() for message in request.messages]
    if "tool_calls" not in (tokenizer.tool_template or ""):
        for message in messages:
            calls = message.pop("tool_calls", ())
            message["content"] = _with(message["content"], *written(calls))
    if use is not None and not use.in_template:
        text = described(tool["function"] for tool in use.tools())
        if messages[0]["role"] == "system":
            messages[0]["content"] = _with(messages[0]["content"], text)
        else:
            messages.insert(0, {"role": "system", "content": text})
    return messages


def _with(content: str | list[dict[str, str]], *texts: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return "\n".join(filter(None, (content, *texts)))
    return [*content, *({"type": "text", "text": text} for text in texts)]
