"""Calls of tools in a model's text: how each family writes them, how they are found, and grammars that force them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ryzanstein_jax.engine.grammar import WHITESPACE
from ryzanstein_jax.engine.tokens import Tokenizer

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call: `begin`, then JSON objects with a name and arguments, then `end`.

    Attributes:
        marks, absent: a chat template that asks for this format holds all of the first and none of the others.
        begin: stands before a call; empty where an answer that is a call is nothing but its object.
        end: stands after it, if anything.
        arguments: what the object calls the arguments.
        open, close, between: what a grammar writes around an answer's calls and between them.
        parallel: whether there may be several calls.
        id_prefix, id_length: ids of calls; some templates take only such as they make.
    """

    name: str
    marks: tuple[str, ...]
    begin: str = ""
    end: str = ""
    absent: tuple[str, ...] = ()
    arguments: str = "arguments"
    open: str = ""
    close: str = ""
    between: str = ""
    parallel: bool = True
    id_prefix: str = "call_"
    id_length: int = 24

    def new_id(self) -> str:
        """An id for a call."""
        return self.id_prefix + "".join(secrets.choice(_LETTERS) for _ in range(self.id_length))


HERMES = ToolFormat(
    "hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", ("<function=", "<arg_key>"), between="\n"
)
FORMATS = (
    HERMES,  # Qwen2.5, Qwen3, Hermes and others
    ToolFormat(
        "mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", absent=("[ARGS]",), open="[", close="]", between=", ",
        id_prefix="", id_length=9,
    ),
    ToolFormat("llama3_json", ('"parameters":', "<|start_header_id|>"), arguments="parameters", parallel=False),
)  # fmt: skip


def format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """The format that the model's chat template asks for; None where it has no tools, or writes them otherwise."""
    template = tokenizer.tool_template or ""
    for one in FORMATS:
        if all(mark in template for mark in one.marks) and not any(mark in template for mark in one.absent):
            return one
    return None


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of a call: the first of a call has its id and its name, and all have some of the arguments' text."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class CallParser:
    """Splits an answer into text and calls, as it comes. What looks like a call and is none stays text.

    Args:
        form: how calls are written.
        names: of the tools; a call of another one is text.
        hidden: texts of special tokens, which are left out.
    """

    def __init__(self, form: ToolFormat, names: Iterable[str], hidden: Sequence[str] = ()):
        self._form, self._names, self._hidden = form, frozenset(names), tuple(hidden)
        self._head = re.compile(r'\{\s*"name"\s*:\s*"([\w-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
        self._buffer = ""
        self._state: Callable[[], str | CallPart | None] = self._in_text if form.begin else self._at_start
        self._lead = ""  # what was read as the beginning of a call that has not come yet
        self._restart_scan()
        self.num_calls = 0

    def feed(self, text: str) -> list[str | CallPart]:
        """What the next piece of the answer settles, in order."""
        for hidden in self._hidden:
            text = text.replace(hidden, "")
        self._buffer += text
        found: list[str | CallPart] = []
        going = bool(self._buffer)
        while going:
            before = self._state
            part = self._state()
            if part:
                found.append(part)
            going = bool(self._buffer) and (self._state != before or bool(part))
        return found

    def finish(self) -> list[str | CallPart]:
        """What was held back, now that the answer is whole, or cut off."""
        rest, self._buffer = self._buffer, ""
        if self._state in (self._in_object, self._between_calls) and self._lead + rest:
            return [] if self._state == self._between_calls and self.num_calls else [self._lead + rest]
        if self._state in (self._in_text, self._at_start) and rest and (rest.strip() or not self.num_calls):
            return [rest]
        return []

    # --- states: each takes what it can off the buffer and returns a part, or nothing

    def _at_start(self) -> str | None:
        text = self._buffer.lstrip()
        if text:
            self._state = self._between_calls if text[0] == "{" else self._in_text
        return None

    def _in_text(self) -> str | None:
        begin, buffer = self._form.begin, self._buffer
        at = buffer.find(begin) if begin else -1
        if at >= 0:
            self._buffer, self._state, self._lead = buffer[at + len(begin) :], self._between_calls, begin
            return buffer[:at].rstrip()
        kept = next((n for n in range(min(len(begin) - 1, len(buffer)), 0, -1) if buffer.endswith(begin[:n])), 0)
        text = buffer[: len(buffer) - kept]
        if begin:
            text = text.rstrip()  # it goes with the call, if one follows
        self._buffer = buffer[len(text) :]
        return text

    def _between_calls(self) -> str | None:
        self._buffer = self._buffer.lstrip(" \t\r\n,;[]")
        end = self._form.end
        if not self._buffer or (end.startswith(self._buffer) and self._buffer != end):
            return None
        if end and self._buffer.startswith(end):
            self._buffer, self._state = self._buffer[len(end) :], self._in_text
        elif self._buffer[0] == "{":
            self._restart_scan()
            self._state = self._in_object
        else:
            return self._no_call("")
        return None

    def _in_object(self) -> str | CallPart | None:
        head = self._head.match(self._buffer)
        if head is not None and head[1] in self._names:
            self._buffer, self._state = self._buffer[head.end() :], self._in_arguments
            self._restart_scan()
            return self._call(head[1], "")
        end = self._scan()
        if end is None:
            return None
        text, self._buffer, self._state = self._buffer[:end], self._buffer[end:], self._between_calls
        call = self._read(text)
        return self._no_call(text) if call is None else self._call(*call)

    def _in_arguments(self) -> CallPart | None:
        end = self._scan()
        stop = len(self._buffer) if end is None else end
        text, self._buffer, self._from = self._buffer[:stop], self._buffer[stop:], 0
        if end is not None:
            self._state = self._after_arguments
        return CallPart(self.num_calls - 1, text) if text else None

    def _after_arguments(self) -> None:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._buffer = self._buffer.removeprefix("}")
            self._state = self._between_calls

    # --- within

    def _no_call(self, text: str) -> str:
        """What was taken for a call is text."""
        text, self._lead, self._state = self._lead + text, "", self._in_text
        return text

    def _restart_scan(self) -> None:
        self._from, self._depth, self._in_string, self._escaped = 0, 0, False, False

    def _scan(self) -> int | None:
        """Goes on to the end of the object that the buffer begins with; where that is, or None so far."""
        for at in range(self._from, len(self._buffer)):
            character = self._buffer[at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        self._from = len(self._buffer)
        return None

    def _read(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of a call whose parts come in another order than usual."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name, arguments = found.get("name"), found.get("arguments", found.get("parameters", {}))
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict | str):
            return None
        return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    def _call(self, name: str, arguments: str) -> CallPart:
        self.num_calls += 1
        self._lead = ""
        return CallPart(self.num_calls - 1, arguments, self._form.new_id(), name)


# --- grammars


def calls_grammar(
    form: ToolFormat,
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    tokenizer: Tokenizer,
    *,
    parallel: bool,
    text: bool = False,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """A grammar, in Lark's notation as llguidance reads it, of an answer that calls functions.

    Args:
        functions: names, and JSON schemas of their arguments.
        parallel: allow several calls, where the format does.
        text: allow text before the calls, and text alone.
        answer: a JSON schema of an answer that may come instead of calls.
    """
    begin, end = _literal(form.begin, tokenizer), _literal(form.end, tokenizer)
    one = f'"\\n" function "\\n" {end}' if form.end else "function"
    more = f"({json.dumps(form.between)} {begin if form.end else ''} {one})*" if parallel and form.parallel else ""
    around = [json.dumps(bracket) if bracket else "" for bracket in (form.open, form.close)]
    rules = [
        f"calls: {'opening' if form.begin else ''} {around[0]} {one} {more} {around[1]}",
        "function: " + " | ".join(f"f{number}" for number in range(len(functions))),
    ]
    for number, (name, schema) in enumerate(functions):
        head = json.dumps(f'{{"name": "{name}", "{form.arguments}": ')
        rules.append(f'f{number}: {head} %json {_bounded(schema)} "}}"')
    other = ""
    if answer is not None:
        other = "answer | "
        rules.append(f"answer: %json {_bounded(answer)}")
    elif text:
        other = "TEXT | "
        rules.append(r"TEXT: /(.|\n)*/" if form.begin else r"TEXT: /[^\s{](.|\n)*/")
    if text and begin.startswith('"'):
        rules.append(f"opening[lazy]: TEXT {begin}")
    elif form.begin:
        rules.append(f"opening: {'TEXT' if text else ''} {begin}")
    return "\n".join([f"start: {other}calls", *rules])


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """A text as grammars write it: a token of its own, if that is what it is in this vocabulary."""
    if not text:
        return ""
    return f"<[{tokenizer.backend.token_to_id(text)}]>" if _is_token(text, tokenizer) else json.dumps(text)


def _is_token(text: str, tokenizer: Tokenizer) -> bool:
    """Whether llguidance takes a text for a special token: also one that is only spelled like it."""
    index = tokenizer.backend.token_to_id(text) if text else None
    added = tokenizer.backend.get_added_tokens_decoder().get(index) if index is not None else None
    return added is not None and (added.special or (text.startswith("<") and text.endswith(">")))


def _bounded(schema: Mapping[str, Any]) -> str:
    return json.dumps({"type": "object", **schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def described(functions: Iterable[Mapping[str, Any]]) -> str:
    """Instructions for a model whose chat template knows no tools, in the most common format."""
    lines = [json.dumps(function, ensure_ascii=False) for function in functions]
    example = f'{HERMES.begin}\n{{"name": "<name>", "arguments": {{<arguments>}}}}\n{HERMES.end}'
    return "\n".join(["You may call these functions:", *lines, "Write each call like this:", example])


def written(calls: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Calls of an earlier turn, as text for such a model."""
    for call in calls:
        function = call["function"]
        head = json.dumps(function["name"])
        yield f'{HERMES.begin}\n{{"name": {head}, "arguments": {function["arguments"]}}}\n{HERMES.end}'
