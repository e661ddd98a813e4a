"""What requests may hold, as pydantic models; everything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from ryzanstein_jax.request import MAX_N, MAX_STOPS
from ryzanstein_jax.server.chat_format import ResponseFormat, Strict, StructuredOutputs, ToolCall, ToolChoice, Tools
from ryzanstein_jax.server.problems import INVALID, ApiError

#: Fields of OpenAI's API that this server has not, and the values that ask for nothing; null always does.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "verbosity": (),
    "web_search_options": (),
}
#: Fields that answers hold, and that clients send back with them.
_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
}


def without_unsupported(value: Any, unsupported: dict[str, tuple[Any, ...]]) -> Any:
    """The object without fields that ask for nothing; one that asks for what is not there is an error.

    Args:
        unsupported: fields that this server has not, and the values that ask for nothing; null always does.

    Raises:
        PydanticCustomError: "unsupported", with the name of the field.
    """
    if not isinstance(value, dict):
        return value
    for name in unsupported.keys() & value.keys():
        asked = value[name]
        # `in` would take 1 for True.
        if asked is not None and not any(type(asked) is type(none) and asked == none for none in unsupported[name]):
            raise PydanticCustomError("unsupported", "'{name}' is not supported by this server", {"name": name})
    return {name: item for name, item in value.items() if name not in unsupported}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Strict):
    """What a stream brings beside text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Stops = Annotated[
    list[str],
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


Bias = Annotated[float, Field(ge=-100, le=100)]


class Asked(Strict):
    """Fields that all endpoints of the model have in common."""

    model: str
    #: Taken and left alone, as the API says it is for the provider's own statistics.
    user: str | None = None
    #: This server's own. Lower ones run first.
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    #: This server's own. Seconds after which the request is given up; never more than the server's own limit.
    deadline_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None


def check_stream_options(request: Any) -> None:
    """Raises PydanticCustomError where a request that asks for no stream has options of one."""
    if request.stream_options is not None and not request.stream:
        raise PydanticCustomError(
            "stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        )


def unsupported_part(part: Any) -> PydanticCustomError:
    """For a content part that is no text: nothing is ever fetched for one."""
    kind = part.get("type") if isinstance(part, dict) else None
    shown = kind[:40] if isinstance(kind, str) else "without a type"
    return PydanticCustomError(
        "unsupported",
        "content part {kind} is not supported: this model takes text only, and nothing is ever fetched",
        {"kind": repr(shown)},
    )


class Sampling(Asked):
    """Fields that completions and chats have in common. Those after `stream_options` are this server's own, named as
    vLLM's.
    """

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=4096)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 30)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 30)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    #: Adds the tokens to each choice.
    return_token_ids: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        return without_unsupported(value, UNSUPPORTED)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        check_stream_options(self)
        return self


PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def as_prompts(value: Any) -> list[Any]:
    """One prompt or several, each text or tokens, as a list of them. Raises PydanticCustomError."""
    if isinstance(value, str) or _is_tokens(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in value):
        return value
    raise PydanticCustomError("prompt", "use text, a list of token ids, or a list of either; none may be an empty list")


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Annotated[list[Any], BeforeValidator(as_prompts), WithJsonSchema(PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 30)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None


def _as_text(value: Any) -> Any:
    """Content that is a list of parts, as text: parts that are no text are refused, and nothing is ever fetched."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise unsupported_part(part)
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("part", "a text part has the fields type and text, and no others")
        texts.append({"type": "text", "text": part["text"]})
    if not texts:
        raise PydanticCustomError("part", "give at least one part")
    return texts


_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
    ]
}


def _is_content(value: Any) -> Any:
    if value is not None and not isinstance(value, str | list):
        raise PydanticCustomError("content", "use text, or a list of parts of type text")
    return _as_text(value)


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    #: Only an assistant's message that calls tools may do without.
    content: Annotated[Any, BeforeValidator(_is_content), WithJsonSchema(_CONTENT)] = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1024)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        return without_unsupported(value, _UNSUPPORTED_IN_MESSAGE)

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "a message has content, or calls tools")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only an assistant calls tools")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError(
                "tool_call_id", "the result of a tool has the role tool and the id of its call as 'tool_call_id'"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """For chat templates, which know "system" and not its newer name."""
        role = "system" if self.role == "developer" else self.role
        plain: dict[str, Any] = {"role": role, "content": "" if self.content is None else self.content}
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        return plain


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 30)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 30)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two tools have the same name")
        choice = self.tool_choice
        if not names and choice not in (None, "none"):
            raise PydanticCustomError("tool_choice", "'tool_choice' is only allowed when 'tools' are given")
        if choice is not None and not isinstance(choice, str) and choice.function.name not in names:
            raise PydanticCustomError("tool_choice", "'tool_choice' names a function that is not among 'tools'")
        if self.parallel_tool_calls is not None and not names:
            raise PydanticCustomError(
                "parallel_tool_calls", "'parallel_tool_calls' is only allowed when 'tools' are given"
            )
        return self

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "'top_logprobs' needs 'logprobs' to be true")
        return self


class TokenizeRequest(Strict):
    """`POST /tokenize`: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("input", "give either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


Schema = TypeVar("Schema", bound=BaseModel)


def parse(kind: type[Schema], body: bytes) -> Schema:
    """A request of its body.

    Raises:
        ApiError: it is no JSON, or holds what the schema does not allow; names the first field at fault.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    except (RecursionError, ValueError) as error:  # deeper than pydantic follows
        raise ApiError(400, f"The body can't be read: {type(error).__name__}.", kind=INVALID) from None


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, where = first["type"], _path(first["loc"])
    if kind == "json_invalid":
        message = "We could not parse the JSON body of your request. " + first["msg"]
        return ApiError(400, message, code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{where}'.", param=where, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    if kind == "unsupported":
        name = str(first.get("ctx", {}).get("name", ""))
        return ApiError(400, first["msg"], param=".".join(filter(None, (where, name))), code="unsupported_parameter")
    # Checks of more than one field.
    if kind in ("content", "tool_calls", "tool_call_id") and not where.endswith(kind):
        where += f".{kind}"
    named = kind in ("stream_options", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls")
    param: str | None = kind if named else where or None
    message = first["msg"] if not where else f"Invalid value for '{where}': {first['msg']}"
    return ApiError(400, message, param=param, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> messages[0].role"""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)[:100]
    return path[:200]
