"""What the server counts by itself, for Prometheus: requests, tokens and the times that a client sees."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ryzanstein_jax.request import FINISH_REASONS

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PREFIX = "ryzanstein"


class Instruments:
    """Counters, gauges and histograms on a registry of their own. Labels come from the code, never from a request."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def name(text: str) -> str:
            return f"{PREFIX}_{text}"

        self.responses = Counter(
            name("http_responses"), "Responses, by route and status.", ["route", "status"], registry=registry
        )
        self.finished = Counter(
            name("requests_finished"), "Completions by how they ended.", ["finish_reason"], registry=registry
        )
        for reason in FINISH_REASONS:
            self.finished.labels(reason)
        self.refused = Counter(
            name("requests_refused"), "Requests that got an error, by code.", ["code"], registry=registry
        )
        self.requests = Gauge(
            name("requests"),
            "Requests that were let in, by state: encoding, waiting, running.",
            ["state"],
            registry=registry,
        )
        for state in ("encoding", "waiting", "running"):
            self.requests.labels(state)
        self.prompt_tokens = Counter(name("prompt_tokens"), "Tokens of prompts.", registry=registry)
        self.generation_tokens = Counter(name("generation_tokens"), "Tokens generated.", registry=registry)
        self.first_token = Histogram(
            name("time_to_first_token_seconds"),
            "From admission to the first token.",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self.inter_token = Histogram(
            name("inter_token_seconds"), "Between two tokens of a completion.", buckets=_BETWEEN, registry=registry
        )
        self.request_seconds = Histogram(
            name("request_seconds"), "From admission to the last token.", buckets=_WHOLE, registry=registry
        )
        self.queue_seconds = Histogram(
            name("queue_seconds"), "From admission to the engine's first step.", buckets=_FIRST_TOKEN, registry=registry
        )
        self.disconnects = Counter(name("disconnects"), "Clients that left before their answer.", registry=registry)
        self.keep_alives = Counter(name("keep_alives"), "Comments sent into silent streams.", registry=registry)
