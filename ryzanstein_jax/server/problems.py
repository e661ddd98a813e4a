"""Errors as OpenAI's API words them, and which of ours becomes which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ryzanstein_jax.errors import (
    DeadlineError,
    EngineClosedError,
    OverloadedError,
    PoisonRequestError,
    RecoveryExhaustedError,
    RequestError,
    RyzansteinError,
    UnavailableError,
)

INVALID = "invalid_request_error"
#: The official client asks again after any status of 500 and above, unless it is told not to.
_NO_RETRY = {"x-should-retry": "false"}
#: Where a field has another name in the API than in the engine.
_PARAMS = {"prompt_token_ids": "prompt", "prompt_logprobs": "logprobs", "token_ids": "tokens"}
MAX_MESSAGE = 2000  # characters; what a request held may be quoted


class ApiError(RyzansteinError):
    """What a client gets instead of an answer: a status, and the fields of the API's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As JSON values; half surrogates, which no UTF-8 holds, are replaced."""
        message = str(self)[:MAX_MESSAGE].encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


def unsupported(param: str, message: str) -> ApiError:
    """Refuses something that the API has and this server has not."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def as_api_error(error: BaseException) -> ApiError:
    """The answer to whatever went wrong; what is not known to be harmless is not quoted."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=_PARAMS.get(error.field, error.field), code="invalid_value")
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiError(429, str(error), kind="requests", code="rate_limit_exceeded", headers=headers)
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), kind="server_error", code=error.state, headers={"Retry-After": "5"})
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), kind="server_error", code="deadline_exceeded", headers=_NO_RETRY)
    if isinstance(error, PoisonRequestError):
        return ApiError(500, str(error), kind="server_error", code="poison_request", headers=_NO_RETRY)
    if isinstance(error, EngineClosedError | RecoveryExhaustedError):
        message = "The engine ended before the request could."
        return ApiError(503, message, kind="server_error", code="engine_unavailable", headers={"Retry-After": "5"})
    message = "The server had an error while processing your request."
    return ApiError(500, message, kind="server_error", code="internal_error")
