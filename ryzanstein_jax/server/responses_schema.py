"""What a request to `/v1/responses` may hold. No response is kept, so whatever needs a kept one is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from ryzanstein_jax.server.schema import Asked, Strict, check_stream_options, unsupported_part, without_unsupported

#: Fields of OpenAI's API that this server has not, and the values that ask for nothing; null always does.
UNSUPPORTED_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": ({},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_UNSUPPORTED_IN_TEXT: dict[str, tuple[Any, ...]] = {"format": ({"type": "text"},), "verbosity": ("medium",)}
_MAX_METADATA = 16


def _as_parts(value: Any) -> Any:
    """Content as chat templates take it: text, or parts of type text. Nothing is ever fetched."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("content", "use text, or a list of parts of type input_text or output_text")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text"):
            raise unsupported_part(part)
        # What answers hold, and clients send back with them.
        rest = {name: item for name, item in part.items() if name not in ("type", "text") and item not in ([], None)}
        if rest.keys() - {"logprobs"} or not isinstance(part.get("text"), str):
            raise PydanticCustomError("part", "a part has the fields type and text, and no others")
        texts.append({"type": "text", "text": part["text"]})
    return texts


_ROLES = ["system", "developer", "user", "assistant"]
_PARTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["type", "text"],
        "properties": {
            "type": {"enum": ["input_text", "output_text"]},
            "text": {"type": "string"},
            "annotations": {"type": "array", "maxItems": 0},
        },
    },
}
_INPUT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["role", "content"],
                "properties": {
                    "type": {"const": "message"},
                    "role": {"enum": _ROLES},
                    "content": {"anyOf": [{"type": "string"}, _PARTS]},
                    "id": {"type": "string"},
                    "status": {"enum": ["in_progress", "completed", "incomplete"]},
                },
            },
        },
    ]
}


class InputMessage(Strict):
    """One item of the input; one of an earlier answer may be among them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, BeforeValidator(_as_parts)]
    type: Literal["message"] | None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "message"):
            raise PydanticCustomError("unsupported", "input item {kind} is not supported", {"kind": repr(kind)[:60]})
        return without_unsupported(value, {"phase": ()})

    def plain(self) -> dict[str, Any]:
        """For chat templates, which know "system" and not its newer name."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextOptions(Strict):
    """How the text of an answer is formed; only as it comes."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        return without_unsupported(value, _UNSUPPORTED_IN_TEXT)


class ResponseStreamOptions(Strict):
    """What a stream brings beside its events."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Asked):
    """`POST /v1/responses`."""

    input: Annotated[list[InputMessage], Field(min_length=1), BeforeValidator(_as_items), WithJsonSchema(_INPUT)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 30)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=_MAX_METADATA),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    text: TextOptions | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    #: This server's own, as for chats.
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        return without_unsupported(value, UNSUPPORTED_IN_RESPONSES)

    @model_validator(mode="after")
    def _check_stream_options(self) -> ResponseRequest:
        check_stream_options(self)
        return self

    def messages(self) -> list[dict[str, Any]]:
        """The conversation, with the instructions before it."""
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return first + [item.plain() for item in self.input]
