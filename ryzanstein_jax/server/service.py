"""`Service`: what all routes share. Lets requests in, encodes them, runs them, and ends them when the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import generate_latest

from ryzanstein_jax.errors import ConfigError, RequestError, UnavailableError
from ryzanstein_jax.request import PoolingParams, SamplingParams
from ryzanstein_jax.server.admission import Admission
from ryzanstein_jax.server.backend import Backend
from ryzanstein_jax.server.encode import Encoder, Input, Prompt, too_long
from ryzanstein_jax.server.engine_metrics import EngineCollector
from ryzanstein_jax.server.generation import Generation
from ryzanstein_jax.server.health import OPEN, Health, Status
from ryzanstein_jax.server.instruments import Instruments
from ryzanstein_jax.server.problems import ApiError
from ryzanstein_jax.server.settings import ServerConfig
from ryzanstein_jax.server.tracing import Tracing, inference, mark

_WHY_CLOSED = {
    Status.STARTING: "The model is still being loaded.",
    Status.STALLED: "The engine makes no progress.",
    Status.DRAINING: "The server is shutting down.",
    Status.FAILED: "The engine has failed.",
}


@dataclass(frozen=True)
class Job:
    """What a request asks of the engine.

    Attributes:
        inputs: its prompts.
        params: how to continue them, or to make embeddings of them.
        priority: lower ones run first.
        seconds: what the request may take; None is the server's limit.
        param: which field of the request the prompts came in.
        form: which one the form of the answer came in, if any.
        at_once: how many of the prompts may run at a time; None is all.
    """

    inputs: Sequence[Input]
    params: SamplingParams | PoolingParams
    priority: int = 0
    seconds: float | None = None
    param: str = "prompt"
    form: str = "structured_outputs"
    at_once: int | None = None


class Service:
    """The server's state, apart from HTTP. Made inside the event loop.

    Args:
        config: its settings.
        model: what clients call the model.
        version: of this package.
        tracing: makes spans of requests; None makes none.
    """

    def __init__(self, config: ServerConfig, model: str, version: str, tracing: Tracing | None = None):
        self.config, self.model, self.version, self.tracing = config, model, version, tracing
        self.instruments, self.health = Instruments(), Health(config)
        self.admission = Admission(config.max_sequences)
        self.instruments.registry.register(EngineCollector(self.health, version))
        self._encoder: Encoder | None = None
        self._generations: set[Generation] = set()
        self._watch: asyncio.Task[None] | None = None

    def open(self, backend: Backend) -> None:
        """Takes requests from now on.

        Raises:
            ConfigError: the model brings no tokenizer, and the API is about text.
        """
        if backend.tokenizer is None:
            raise ConfigError("tokenizer", None, "the model brings no tokenizer, which a server needs: name one")
        self._encoder = Encoder(backend.tokenizer, self.config.encode_threads, self.config.encode_seconds)
        self.health.backend = backend
        self._watch = asyncio.create_task(self.health.watch())

    @property
    def backend(self) -> Backend:
        """The engine.

        Raises:
            UnavailableError: the server takes no requests now.
        """
        status = self.health.status
        if status not in OPEN or self.health.backend is None:
            raise UnavailableError(_WHY_CLOSED.get(status, "The server takes no requests now."), status.value)
        return self.health.backend

    @property
    def encoder(self) -> Encoder:
        """Raises UnavailableError as `backend`."""
        assert self.backend is not None
        assert self._encoder is not None
        return self._encoder

    def check_model(self, name: str | None) -> None:
        """Raises ApiError where a request names another model."""
        if name is not None and name != self.model:
            message = f"The model '{name[:200]}' does not exist or you do not have access to it."
            raise ApiError(404, message, param="model", code="model_not_found")

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[Generation]:
        """Runs a job as long as the block lasts.

        Raises:
            UnavailableError, OverloadedError: it was not let in.
            ApiError, RequestError: it is invalid.
        """
        backend, encoder, loop = self.backend, self.encoder, asyncio.get_running_loop()
        most = min(self.config.max_choices, self.config.max_sequences)
        at_once = len(job.inputs) if job.at_once is None else min(job.at_once, most)
        choices = at_once * job.params.n
        if choices > most:
            raise RequestError("n", job.params.n, f"{len(job.inputs)} prompts times n may be at most {most}")
        with self.admission.enter(choices), inference(self.model, job.params):
            arrived = loop.time()
            seconds = min(job.seconds or self.config.request_seconds, self.config.request_seconds)
            state = self.instruments.requests.labels("encoding")
            state.inc()
            try:
                prompts = await encoder.encode(job.inputs, backend.max_length, param=job.param)
                if isinstance(job.params, SamplingParams) and job.params.structured_outputs is not None:
                    await self._compile(job, backend, encoder, job.params)
            finally:
                state.dec()
            self._check_lengths(prompts, job, backend.max_length)
            mark("queue")
            generation = Generation(
                backend,
                prompts,
                job.params,
                priority=job.priority,
                at_once=at_once,
                deadline=arrived + seconds,
                arrived=arrived,
                instruments=self.instruments,
                health=self.health,
            )
            self._generations.add(generation)
            try:
                async with generation:
                    yield generation
            except RequestError as error:
                # The engine knows the prompt by another name than the client does.
                if error.field != "prompt_token_ids":
                    raise
                raise RequestError(job.param, error.value, error.remedy) from None
            finally:
                self._generations.discard(generation)

    async def _compile(self, job: Job, backend: Backend, encoder: Encoder, params: SamplingParams) -> None:
        mark("compile_grammar")
        try:
            await encoder.compile(lambda: backend.compile_grammar(params), job.form)
        except RequestError as error:
            raise RequestError(job.form, error.value, error.remedy) from None

    def _check_lengths(self, prompts: Sequence[Prompt], job: Job, most: int) -> None:
        # What is embedded takes a place of its own as well: one limit for all prompts.
        wanted = (job.params.max_tokens or 1) if isinstance(job.params, SamplingParams) else 1
        longest = min(most - 1, self.config.max_prompt_tokens or most)
        for prompt in prompts:
            count = len(prompt.token_ids)
            if not count:
                raise RequestError(job.param, "", "it holds no token: write something")
            if count > longest:
                raise too_long(min(most, longest), f"{count} tokens", job.param)
            if count + wanted > most:
                more = f" ({count} in the {job.param}, {wanted} in the completion)"
                raise too_long(most, f"{count + wanted} tokens", job.param, more)

    def metrics(self) -> bytes:
        """For Prometheus."""
        return generate_latest(self.instruments.registry)

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests, and lets those under way go on for a while; then they end with an error.

        Returns:
            Whether all ended by themselves.
        """
        self.health.draining = True
        if await self.admission.wait_empty(seconds):
            return True
        self.end_all()
        await self.admission.wait_empty(2.0)
        return False

    def end_all(self) -> None:
        """Ends every request under way with a typed error."""
        for generation in list(self._generations):
            generation.fail(UnavailableError("The server shut down before the request ended.", Status.DRAINING.value))

    async def close(self) -> None:
        """Ends what is under way, and the engine."""
        self.health.draining = True
        self.end_all()
        if self._watch is not None:
            self._watch.cancel()
        if self._encoder is not None:
            self._encoder.close()
        if self.health.backend is not None:
            await asyncio.to_thread(self.health.backend.close)
        if self.tracing is not None:
            await self.tracing.close()
