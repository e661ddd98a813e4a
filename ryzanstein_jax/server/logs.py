"""Logs as lines of JSON. Nothing that a client sends is logged but its request id, which was checked before."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

logger = logging.getLogger("ryzanstein_jax.server")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the fields that `log` was given."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.name == "ryzanstein_jax.orchestrator":  # its events are JSON already
            try:
                line |= {"event": json.loads(line["message"])}
                line["message"] = line["event"].get("message")
            except (ValueError, AttributeError):
                pass
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log(message: str, *, level: int = logging.INFO, exception: BaseException | None = None, **fields: object) -> None:
    """Logs one line with further fields."""
    logger.log(level, message, extra={"fields": fields}, exc_info=exception)


def set_up_logs(stream: TextIO | None = None) -> None:
    """Sends logs to a stream, standard error unless given, as JSON: ours and our libraries'."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("ryzanstein_jax", "uvicorn", "opentelemetry"):
        chosen = logging.getLogger(name)
        chosen.handlers, chosen.propagate = [handler], False
        chosen.setLevel(logging.INFO)
