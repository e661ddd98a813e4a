"""From what a request says to what the engine is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.request import PoolingParams, SamplingParams
from ryzanstein_jax.server.chat_format import StructuredOutputs
from ryzanstein_jax.server.embeddings import EmbeddingRequest
from ryzanstein_jax.server.encode import Conversation
from ryzanstein_jax.server.responses_schema import ResponseRequest
from ryzanstein_jax.server.schema import ChatRequest, CompletionRequest, Sampling
from ryzanstein_jax.server.service import Job
from ryzanstein_jax.server.settings import ServerConfig
from ryzanstein_jax.server.tool_use import ToolUse, conversation, tool_use
from ryzanstein_jax.structured_outputs import StructuredOutputsParams

#: Fields with the same name and meaning in the API and in the engine.
_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)
#: What the model's own advice is taken for where the request says nothing.
_ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_DEFAULT_COMPLETION_TOKENS = 16
#: Embeddings of one request that run or wait at a time: enough for whole steps, and others have room beside them.
_EMBEDDINGS_AT_ONCE = 64


def completion_job(request: CompletionRequest, config: ServerConfig, advice: SamplingParams) -> Job:
    """Raises RequestError where a value is out of bounds."""
    form = None if request.structured_outputs is None else _structured(request.structured_outputs)
    if form is not None and request.max_tokens == 0:
        raise RequestError("max_tokens", 0, "an answer with a form has at least one token")
    _check_logprobs("logprobs", request.logprobs, config)
    wanted = _DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    scored = request.logprobs if request.echo else None
    params = _params(
        request,
        config,
        advice,
        max_tokens=max(1, wanted),
        logprobs=request.logprobs,
        prompt_logprobs=scored,
        structured_outputs=form,
    )
    return Job(request.prompt, params, request.priority or 0, request.deadline_seconds)


def chat_job(request: ChatRequest, config: ServerConfig, advice: SamplingParams, tokenizer: Tokenizer) -> Job:
    """Raises RequestError where a value is out of bounds, or the model can't do what is asked."""
    _check_logprobs("top_logprobs", request.top_logprobs, config)
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise RequestError("max_tokens", request.max_tokens, "it is the old name of max_completion_tokens: give one")
    most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    use = tool_use(request, tokenizer)
    field, form = _form(request, use, tokenizer)
    params = _params(request, config, advice, max_tokens=most, logprobs=logprobs, structured_outputs=form)
    if use is not None and use.shows_special_tokens(tokenizer):
        params = replace(params, skip_special_tokens=False)
    asked = Conversation(
        conversation(request, tokenizer, use),
        request.add_generation_prompt is not False,
        request.chat_template_kwargs or {},
        use.tools() if use is not None and use.in_template else None,
    )
    return Job([asked], params, request.priority or 0, request.deadline_seconds, param="messages", form=field)


def _form(
    request: ChatRequest, use: ToolUse | None, tokenizer: Tokenizer
) -> tuple[str, StructuredOutputsParams | None]:
    """The form that the answer must have, and the field of the request that says so."""
    asked, field = request.response_format, "response_format"
    if request.structured_outputs is not None:
        if use is not None or (asked is not None and asked.type != "text"):
            raise RequestError("structured_outputs", "a form", "use it without response_format and tools")
        return "structured_outputs", _structured(request.structured_outputs)
    schema: dict[str, Any] | None = None
    if asked is not None and asked.type != "text":
        schema = (asked.json_schema.schema_ if asked.json_schema is not None else None) or {"type": "object"}
    try:
        if use is not None:
            field = "tools"
            grammar = use.grammar(tokenizer, schema)
            return field, None if grammar is None else StructuredOutputsParams(grammar=grammar)
        return field, None if schema is None else StructuredOutputsParams(json=schema)
    except RequestError as error:
        raise RequestError(field, error.value, error.remedy) from None


def _structured(asked: StructuredOutputs) -> StructuredOutputsParams:
    return StructuredOutputsParams(**asked.model_dump(by_alias=True))


def response_params(request: ResponseRequest, advice: SamplingParams) -> SamplingParams:
    """Raises RequestError where a value is out of bounds."""
    chosen = {name: getattr(advice, name) for name in _ADVISED}
    chosen |= {name: value for name in ("temperature", "top_p") if (value := getattr(request, name)) is not None}
    return SamplingParams(**chosen, max_tokens=request.max_output_tokens)


def response_job(request: ResponseRequest, params: SamplingParams) -> Job:
    """The conversation of a request, to be continued."""
    conversation = Conversation(request.messages(), True, request.chat_template_kwargs or {})
    return Job([conversation], params, request.priority or 0, request.deadline_seconds, param="input")


def embedding_job(request: EmbeddingRequest, params: PoolingParams) -> Job:
    """All inputs of a request, a part of them at a time."""
    at_once = min(len(request.input), _EMBEDDINGS_AT_ONCE)
    return Job(request.input, params, request.priority or 0, request.deadline_seconds, param="input", at_once=at_once)


def _check_logprobs(field: str, value: int | None, config: ServerConfig) -> None:
    if value is not None and value > config.max_logprobs:
        raise RequestError(field, value, f"use at most {config.max_logprobs}")


def _params(request: Sampling, config: ServerConfig, advice: SamplingParams, **more: Any) -> SamplingParams:
    if request.stop is not None and len(request.stop) > config.max_stops:
        raise RequestError("stop", f"{len(request.stop)} strings", f"use at most {config.max_stops}")
    chosen = {name: getattr(advice, name) for name in _ADVISED}
    chosen |= {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    return SamplingParams(**chosen, logit_bias=_biases(request.logit_bias or {}), **more)


def _biases(named: dict[str, float]) -> dict[int, float]:
    biases = {}
    for name, value in named.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise RequestError("logit_bias", name[:40], "use token ids as names")
        biases[int(name)] = value
    return biases
