"""`ServerConfig`: where the server listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from ryzanstein_jax.errors import ConfigError

KEY_VARIABLE = "RYZANSTEIN_API_KEY"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_MAX_KEY_FILE = 1 << 20
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the server. Times are in seconds.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        served_model_name: what clients call the model; None is what the user called it.
        api_keys: any of them opens every route; without one all routes are open, which is for loopback only.
        allow_anonymous: listen beyond loopback without keys all the same.
        allowed_hosts: names that a Host header may have. None takes those of loopback where it listens there, and any
            elsewhere, where keys are what protects.
        max_sequences: completions that may be under way or waiting, over all requests; one more is answered 429.
        max_choices: completions of one request: its prompts times n; never more than max_sequences.
        max_prompt_tokens: longest prompt; None leaves it to the model.
        max_stops: stop strings of one request.
        max_logprobs: alternatives per token.
        max_body_bytes, max_header_bytes: largest request.
        body_seconds: most that a body may take to arrive.
        encode_seconds: most that templates and tokenizing may take.
        encode_threads: how many prompts are tokenized at a time.
        request_seconds: most that a request may take in all; it may ask for less.
        write_seconds: how long a client may leave its answer unread before it is given up.
        keep_alive_seconds: after so long without a token, a stream gets a comment.
        drain_seconds: how long running requests may go on after SIGTERM.
        fresh_seconds: age up to which a token shows that the serving path works.
        probe_seconds: most that the token of a readiness probe may take.
        stall_seconds: after so long without a step while requests run, the engine counts as stuck.
        otlp_endpoint: collector that traces go to; None leaves it to OpenTelemetry's own variables, or makes none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] | None = None
    max_sequences: int = 512
    max_choices: int = 128
    max_prompt_tokens: int | None = None
    max_stops: int = 16
    max_logprobs: int = 20
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 16 << 10
    body_seconds: float = 30.0
    encode_seconds: float = 15.0
    encode_threads: int = 2
    request_seconds: float = 600.0
    write_seconds: float = 60.0
    keep_alive_seconds: float = 5.0
    drain_seconds: float = 30.0
    fresh_seconds: float = 10.0
    probe_seconds: float = 5.0
    stall_seconds: float = 120.0
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not _HOST.fullmatch(self.host):
            raise ConfigError("host", self.host, "use an address or a name, such as 127.0.0.1")
        least = {"port": 0, "max_logprobs": 0, "max_body_bytes": 1024, "max_header_bytes": 1024}
        most = {"port": 65535, "max_body_bytes": 1 << 30, "max_header_bytes": 1 << 20}
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if name.endswith("_seconds"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
                    raise ConfigError(name, value, "use a number of seconds above 0 and at most 1000000")
            elif name.startswith("max_") or name in ("port", "encode_threads"):
                low, high = least.get(name, 1), most.get(name, 1 << 24)
                if name == "max_prompt_tokens" and value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                    raise ConfigError(name, value, f"use a whole number from {low} to {high}")
        for key in self.api_keys:
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ConfigError("api_keys", "a key", "use 8 to 512 printable ASCII characters without spaces")
        if not self.api_keys and not self.is_loopback and not self.allow_anonymous:
            remedy = f"beyond loopback give --api-key-file or ${KEY_VARIABLE}, or --allow-anonymous to do without"
            raise ConfigError("host", self.host, remedy)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that a Host header may have, lower case, an IPv6 address without brackets; None allows any."""
        if self.allowed_hosts is not None:
            return frozenset(name.lower().strip("[]") for name in self.allowed_hosts)
        return frozenset((*_LOOPBACK_NAMES, self.host.lower())) if self.is_loopback else None


def read_api_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of a file, one a line (# begins a comment), and of the environment, where spaces separate them.

    Raises:
        ConfigError: the file can't be read or holds no key, or the variable is set and empty: a server that was meant
            to have keys never starts without.
    """
    keys: list[str] = []
    if file is not None:
        try:
            with file.open(encoding="utf-8") as lines:
                text = lines.read(_MAX_KEY_FILE)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("api_key_file", str(file), f"it can't be read: {type(error).__name__}") from error
        keys += [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ConfigError("api_key_file", str(file), "it holds no key: write one a line")
    if KEY_VARIABLE in environment:
        found = environment[KEY_VARIABLE].split()
        if not found:
            raise ConfigError(KEY_VARIABLE, "", "it is set and holds no key: set one, or unset it")
        keys += found
    return tuple(dict.fromkeys(keys))
