"""`StructuredOutputsParams`: the form that a completion must have."""

from __future__ import annotations

import json as json_library
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ryzanstein_jax.errors import RequestError

MAX_GRAMMAR_BYTES = 128 << 10
MAX_CHOICES = 1024

_FIELD = "structured_outputs"
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that a completion must have; names are vLLM's. Exactly one of the first five is given.

    Attributes:
        json: a JSON schema, as text or as an object; the completion is JSON that it allows.
        regex: the whole completion matches it.
        choice: the completion is one of these texts.
        grammar: in Lark's notation as llguidance reads it, or in GBNF.
        json_object: the completion is any JSON object.
        disable_any_whitespace: write JSON without spaces and line ends. Else there may be up to 40 in a row: a model
            that is let go on for ever may do so.

    Raises:
        RequestError: none or several are given, or one has the wrong type or is too long.
    """

    json: str | Mapping[str, object] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(_FIELD, given, f"give exactly one of {', '.join(_KINDS)}")
        (kind,) = given
        value = getattr(self, kind)
        if self.json_object is not None and self.json_object is not True:
            raise RequestError(f"{_FIELD}.json_object", self.json_object, "use True, or leave it out")
        if not isinstance(self.disable_any_whitespace, bool):
            raise RequestError(f"{_FIELD}.disable_any_whitespace", self.disable_any_whitespace, "use True or False")
        if kind == "choice":
            set_(self, "choice", _choices(value))
        elif kind == "json":
            set_(self, "json", _schema_text(value))
        elif kind != "json_object":
            _check_text(kind, value)

    @property
    def kind(self) -> str:
        """Which of the five is given."""
        return next(name for name in _KINDS if getattr(self, name) is not None)


def _check_text(kind: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{_FIELD}.{kind}", value, "use text that is not empty")
    if len(value.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{_FIELD}.{kind}", f"{len(value)} characters", f"use at most {MAX_GRAMMAR_BYTES} bytes")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{_FIELD}.{kind}", ascii(value), "remove the lone surrogate") from None


def _schema_text(value: object) -> str:
    try:
        text = value if isinstance(value, str) else json_library.dumps(value)
        _check_text("json", text)
        schema = json_library.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{_FIELD}.json", value, f"it is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise RequestError(f"{_FIELD}.json", value, "use a JSON schema that is an object")
    return text


def _choices(value: object) -> tuple[str, ...]:
    field = f"{_FIELD}.choice"
    if isinstance(value, str) or not isinstance(value, Sequence) or not 0 < len(value) <= MAX_CHOICES:
        raise RequestError(field, value, f"use a list of 1 to {MAX_CHOICES} texts")
    for text in value:
        _check_text("choice", text)
    if sum(map(len, value)) > MAX_GRAMMAR_BYTES:
        raise RequestError(field, f"{len(value)} texts", f"use at most {MAX_GRAMMAR_BYTES} characters in all")
    return tuple(value)
