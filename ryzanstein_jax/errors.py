"""Typed errors. Each names what was wrong, what was found and what to do about it."""

from __future__ import annotations


class RyzansteinError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(RyzansteinError, ValueError):
    """A setting is invalid: names the field, the value and the remedy."""

    def __init__(self, field: str, value: object, remedy: str):
        super().__init__(f"{field}={value!r} is invalid: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


class RequestError(RyzansteinError, ValueError):
    """One request is invalid and was refused; nothing else is affected."""

    def __init__(self, field: str, value: object, remedy: str):
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown} is invalid: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


class UnsupportedModelError(RyzansteinError, ValueError):
    """The model's configuration asks for mathematics that this engine does not have."""


class WeightsError(RyzansteinError):
    """Weights that are missing, truncated, corrupt or of another shape or type than the model's."""

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
    ):
        parts = [problem]
        for label, value in (("file", file), ("tensor", tensor), ("expected", expected), ("found", found)):
            if value is not None:
                parts.append(f"{label}: {value}")
        super().__init__("; ".join(parts))
        self.file, self.tensor, self.expected, self.found = file, tensor, expected, found


class MemoryBudgetError(RyzansteinError):
    """The model or its KV cache does not fit the memory budget; the message holds the sum."""


class EngineClosedError(RyzansteinError, RuntimeError):
    """The engine was closed, or failed, before the request could finish."""


class DeviceStateLostError(RyzansteinError):
    """The processes that held weights and KV cache are gone; the executor brings new ones up: see `restart`."""


class PoisonRequestError(RyzansteinError):
    """A request ended because the devices failed each time that it ran, alone too."""


class ProcessGroupError(RyzansteinError):
    """The worker processes could not be started; the message holds what the failing one said last."""


class RecoveryExhaustedError(RyzansteinError):
    """The worker processes failed more often than `OrchestratorConfig` allows; no request can finish."""


class OverloadedError(RyzansteinError):
    """So many requests wait already that another one was turned away; `retry_after` says for how many seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(RyzansteinError):
    """The server takes no requests now; `state` says why: it starts, drains or has failed."""

    def __init__(self, message: str, state: str):
        super().__init__(message)
        self.state = state


class DeadlineError(RyzansteinError):
    """A request did not end in the time that it had."""


class OutputError(RyzansteinError):
    """A file that results go to can't be written any more, where the disk is full or fails."""


def remote_error(name: str, message: str) -> RyzansteinError:
    """The error of this module that another process raised; any other becomes a `ProcessGroupError` that names it."""
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, RyzansteinError)):
        return ProcessGroupError(f"{name}: {message}")
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def counted(count: int, noun: str) -> str:
    """So many things, for people: "1 request", "2 requests", "2 processes"."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{plural}"
