"""What a request may say about the form of an answer: formats, tools and calls, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from ryzanstein_jax.structured_outputs import MAX_CHOICES

MAX_TOOLS = 128

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(BaseModel):
    """No other fields, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StructuredOutputs(Strict):
    """vLLM's field; exactly one of the first five."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False


class JsonSchema(Strict):
    """A schema and its name."""

    name: _Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    #: The schema is kept to either way.
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError("json_schema", "'json_schema' comes with the type json_schema, and only with it")
        return self


class Function(Strict):
    """What a tool is called and takes."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """No parameters are none, not any."""
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class FunctionName(Strict):
    name: _Name


class NamedTool(Strict):
    """The function to call."""

    type: Literal["function"]
    function: FunctionName


_CHOICES = ("none", "auto", "required")


def _as_choice(value: Any) -> Any:
    if isinstance(value, str) and value in _CHOICES:
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return NamedTool.model_validate(value)
    raise PydanticCustomError("tool_choice", 'use "none", "auto", "required" or a function\'s name in an object')


ToolChoice = Annotated[
    Any,
    BeforeValidator(_as_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(_CHOICES)},
                {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["type", "function"],
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["name"],
                            "properties": {"name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}},
                        },
                    },
                },
            ]
        }
    ),
]


class CalledFunction(Strict):
    """A function and the text of its arguments, as the model wrote it."""

    name: _Name
    arguments: str


class ToolCall(Strict):
    """A call of an earlier turn."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
