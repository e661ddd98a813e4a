"""A Jinja sandbox that bounds the time and the memory of a template. No JAX here.

Each loop iteration and call is counted and checked against a deadline, and what could grow without a loop
(repetition, powers, padding, formatting, joins) is checked before it is made. What remains: one call of a library
function on data of the allowed size cannot be interrupted, and the sandbox is a fence inside this process.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextvars import ContextVar
from datetime import datetime
from itertools import islice
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARACTERS = 8 << 20
MAX_STEPS = 1_000_000  # loop iterations and calls of one rendering
MAX_SECONDS = 10.0
MAX_WIDTH = 1 << 16
MAX_INTEGER_BITS = 4096

_PLAIN_FILTERS = (
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "wordcount",
    "wordwrap",
)


class LimitError(jinja2.TemplateRuntimeError):
    """A rendering went past a bound."""


class Budget:
    def __init__(self) -> None:
        self.steps, self.deadline = 0, time.monotonic() + MAX_SECONDS

    def charge(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise LimitError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS} seconds")


budget: ContextVar[Budget] = ContextVar("chat_templatebudget")


def bounded(tree: nodes.Template, environment: jinja2.Environment) -> nodes.Template:
    """The same template with each loop counted, and each text that it makes measured."""

    def through(name: str, node: Any, lineno: int) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=lineno)

    for loop in list(tree.find_all(nodes.For)):
        loop.iter = through("_counted", loop.iter, loop.lineno)
    for block in [*tree.find_all(nodes.AssignBlock)]:
        block.filter = through("_measured", block.filter, block.lineno)
    for section in [*tree.find_all(nodes.FilterBlock)]:
        section.filter = through("_measured", section.filter, section.lineno)
    for concat in list(tree.find_all(nodes.Concat)):
        concat.nodes = [through("_measured", node, concat.lineno) for node in concat.nodes]
    tree.set_environment(environment)
    return tree


def _counted(value: Any) -> Any:
    if not isinstance(value, Sized):
        value = list(islice(value, MAX_STEPS + 1))
    budget.get().charge(1 + len(value))
    return value


def _measured(value: Any) -> Any:
    """The same value, unless its text would be too long; counts what is shared as often as it would be printed."""
    if isinstance(value, str):
        todo, size = [], len(value)
    else:
        todo, size = [value], 0
    seen = 0
    while todo and size <= MAX_OUTPUT_CHARACTERS:
        item = todo.pop()
        seen += 1
        size += len(item) if isinstance(item, str) else 1
        if isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            todo += item
        if seen % 1024 == 0:
            budget.get().charge(1024)
    if size > MAX_OUTPUT_CHARACTERS:
        raise LimitError(f"it makes a text of more than {MAX_OUTPUT_CHARACTERS} characters")
    return value


def _check_widths(arguments: Iterable[object]) -> None:
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MAX_WIDTH:
            raise LimitError(f"{argument} is too large a width or count")


def _check_format(text: str) -> None:
    """Refuses widths that are long, or that come from the data (`%*d`, `{:{}}`)."""
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{", text):
        raise LimitError("it asks for too wide a format")


def _check_growth(method: str, text: str, arguments: Sequence[Any]) -> None:
    """Refuses a call of a method of `str` that would make a text of more than the allowed length."""
    if method == "replace" and len(arguments) >= 2:
        grown = len(text) + text.count(str(arguments[0])) * len(str(arguments[1]))
    elif method == "join" and arguments:
        _measured(arguments[0])
        grown = len(text) * (len(arguments[0]) if isinstance(arguments[0], Sized) else MAX_OUTPUT_CHARACTERS)
    elif method in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        _check_widths(arguments)
        grown = len(text) * (int(arguments[0]) if method == "expandtabs" and arguments else 1)
    else:
        return
    if grown > MAX_OUTPUT_CHARACTERS:
        raise LimitError(f"it makes a text of more than {MAX_OUTPUT_CHARACTERS} characters")


def _guard(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter that checks its arguments and its text. It takes the context, so that it is not run at compile time."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @jinja2.pass_context
    def guarded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget.get().charge()
        _check_widths([*args, *kwargs.values()])
        if name == "replace":
            _check_growth("replace", str(value), args)
        elif name == "join":
            value = _counted(value)
            _check_growth("join", str(args[0]) if args else "", [value])
        elif name == "format":
            _check_format(str(value))
        elif name in ("string", "indent", "trim", "wordwrap", "title", "upper", "lower", "truncate", "escape", "e"):
            _measured(value)
        first = {"context": context, "environment": context.environment, "eval_context": context.eval_ctx}.get(wants)
        made = function(value, *args, **kwargs) if first is None else function(first, value, *args, **kwargs)
        return _measured(made) if isinstance(made, str) else made

    return guarded


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    _measured(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    if len(layout) > 128 or re.search(r"%[^a-zA-Z%]*\d", layout):
        raise LimitError("strftime_now takes a short format without widths")
    return datetime.now().strftime(layout)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without the names that Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        if any(str(name).startswith("_") for name in values):
            raise jinja2.exceptions.SecurityError("names in a namespace do not begin with an underscore")
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError("names in a namespace do not begin with an underscore")
        super().__setitem__(name, value)


class _Generation(ext.Extension):
    """`{% generation %}` marks what a model wrote, for training; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[ext.LoopControlExtension, _Generation],
            finalize=lambda value: value if isinstance(value, str | int) else _measured(value),
        )
        self.filters = {name: _guard(self.filters[name], name) for name in _PLAIN_FILTERS}
        self.filters["tojson"] = _guard(_to_json, "tojson")
        for name, function in (("_counted", _counted), ("_measured", _measured)):
            self.filters[name] = jinja2.pass_context(lambda _, value, function=function: function(value))
        self.globals = {
            "range": self.globals["range"],  # the sandbox's, of at most 100,000 numbers
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget.get().charge()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            arguments = [*args, *kwargs.values()]
            if __obj.__name__ == "join" and args and not isinstance(args[0], Sized):
                args = (_counted(args[0]), *args[1:])
                arguments = list(args)
            _check_growth(__obj.__name__, owner, arguments)
        made = super().call(__context, __obj, *args, **kwargs)
        return _measured(made) if isinstance(made, str) else made

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, str | list | tuple) and len(made) > MAX_OUTPUT_CHARACTERS:
            raise LimitError(f"it makes a text of more than {MAX_OUTPUT_CHARACTERS} characters")
        return made


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _check_format(left)
    if operator not in ("*", "**"):
        return
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, str | list | tuple) and isinstance(times, int):
            if len(repeated) * times > MAX_OUTPUT_CHARACTERS:
                raise LimitError(f"it repeats a text to more than {MAX_OUTPUT_CHARACTERS} characters")
            return
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise LimitError(f"it makes a number of more than {MAX_INTEGER_BITS} bits")
