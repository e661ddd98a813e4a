"""The routes of the server, as one ASGI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ryzanstein_jax.errors import RyzansteinError
from ryzanstein_jax.server.answers import Answer, ChatAnswer, CompletionAnswer
from ryzanstein_jax.server.embeddings import EmbeddingAnswer, EmbeddingRequest
from ryzanstein_jax.server.encode import Conversation, Input
from ryzanstein_jax.server.gate import Gate
from ryzanstein_jax.server.generation import Generation
from ryzanstein_jax.server.health import ALIVE
from ryzanstein_jax.server.http import (
    DONE,
    ClientGoneError,
    EventStream,
    closing,
    data,
    error_response,
    note,
    read_body,
    typed_data,
    while_connected,
)
from ryzanstein_jax.server.jobs import chat_job, completion_job, embedding_job, response_job, response_params
from ryzanstein_jax.server.openapi import openapi
from ryzanstein_jax.server.page import pages
from ryzanstein_jax.server.problems import ApiError, as_api_error
from ryzanstein_jax.server.responses import ResponseAnswer
from ryzanstein_jax.server.responses_schema import ResponseRequest
from ryzanstein_jax.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    Schema,
    TokenizeRequest,
    parse,
)
from ryzanstein_jax.server.service import Job, Service
from ryzanstein_jax.server.status import StatusReport

_LARGE_BODY = 64 << 10


class _Routes:
    """Handlers over one service."""

    def __init__(self, service: Service):
        self._service, self._config = service, service.config
        self._created = int(time.time())
        self._openapi = openapi(service.version)
        self._status = StatusReport(service)

    async def _read(self, kind: type[Schema], request: Request) -> Schema:
        body = await read_body(request, self._config)
        # Only large bodies are worth a thread: others wait for the event loop meanwhile.
        return parse(kind, body) if len(body) < _LARGE_BODY else await asyncio.to_thread(parse, kind, body)

    # --- generating

    async def completions(self, request: Request) -> Response | EventStream:
        asked = await self._read(CompletionRequest, request)
        self._service.check_model(asked.model)
        advice = self._service.backend.get_default_sampling_params()
        return await self._answer(request, asked, completion_job(asked, self._config, advice), CompletionAnswer)

    async def chat(self, request: Request) -> Response | EventStream:
        asked = await self._read(ChatRequest, request)
        self._service.check_model(asked.model)
        advice = self._service.backend.get_default_sampling_params()
        job = chat_job(asked, self._config, advice, self._service.encoder.tokenizer)
        return await self._answer(request, asked, job, ChatAnswer)

    async def responses(self, request: Request) -> Response | EventStream:
        asked = await self._read(ResponseRequest, request)
        self._service.check_model(asked.model)
        params = response_params(asked, self._service.backend.get_default_sampling_params())
        return await self._answer(request, asked, response_job(asked, params), partial(ResponseAnswer, params=params))

    async def embeddings(self, request: Request) -> Response:
        asked = await self._read(EmbeddingRequest, request)
        self._service.check_model(asked.model)
        job = embedding_job(asked, self._service.backend.get_pooling_params(asked.dimensions))

        async def whole() -> bytes:
            async with self._service.run(job) as generation:
                answer = EmbeddingAnswer(asked, generation.prompts, model=self._service.model)
                while not generation.ended:
                    piece = await generation.next()
                    if piece is not None:
                        answer.note(piece)
                note(request.scope, inputs=len(asked.input), prompt_tokens=answer.usage()["prompt_tokens"])
                return await asyncio.to_thread(answer.body)

        return Response(await while_connected(request.receive, whole()), media_type="application/json")

    async def _answer(
        self,
        request: Request,
        asked: Sampling | ResponseRequest,
        job: Job,
        kind: Callable[..., Answer | ResponseAnswer],
    ) -> Response | EventStream:
        typed = isinstance(asked, ResponseRequest)
        frame = typed_data if typed else data

        def begin(generation: Generation) -> Answer | ResponseAnswer:
            service = self._service
            fingerprint = f"ryzanstein_{service.version}"
            tokenizer = service.encoder.tokenizer
            return kind(asked, generation.prompts, tokenizer, model=service.model, fingerprint=fingerprint)

        def finish(answer: Answer | ResponseAnswer) -> None:
            usage = answer.usage()
            note(
                request.scope,
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
                cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
                finish_reasons=answer.finish_reasons,
                response_id=answer.id,
            )

        async def whole() -> dict[str, Any]:
            async with self._service.run(job) as generation:
                answer = begin(generation)
                while not generation.ended:
                    piece = await generation.next()
                    if piece is not None:
                        answer.note(piece)
                finish(answer)
                return answer.whole()

        async def events(generation: Generation) -> AsyncIterator[bytes | None]:
            answer = begin(generation)
            for event in answer.first():
                yield frame(event)
            try:
                while not generation.ended:
                    piece = await generation.next(self._config.keep_alive_seconds)
                    if piece is not None:
                        for event in answer.take(piece):
                            yield frame(event)
                    elif not generation.ended:
                        yield None
            except Exception as error:
                if not isinstance(answer, ResponseAnswer):
                    raise
                problem = as_api_error(error)
                note(request.scope, error=problem.code or problem.kind)
                yield frame(answer.failed(problem))
                return
            finish(answer)
            for event in answer.last():
                yield frame(event)

        @asynccontextmanager
        async def opened() -> AsyncIterator[AsyncIterator[bytes | None]]:
            async with self._service.run(job) as generation, closing(events(generation)) as stream:
                yield stream

        if asked.stream:
            note(request.scope, stream=True)
            end = b"" if typed else DONE
            return EventStream(opened, self._config, self._service.instruments.keep_alives.inc, end)
        return JSONResponse(await while_connected(request.receive, whole()))

    # --- tokens

    async def tokenize(self, request: Request) -> Response:
        asked = await self._read(TokenizeRequest, request)
        self._service.check_model(asked.model)
        one: Input = asked.prompt or ""
        if asked.messages is not None:
            messages = [message.plain() for message in asked.messages]
            one = Conversation(messages, asked.add_generation_prompt, asked.chat_template_kwargs or {})
        most = self._service.backend.max_length
        with self._service.admission.enter(1):
            (prompt,) = await self._service.encoder.encode([one], most, special_tokens=asked.add_special_tokens)
        return JSONResponse({"count": len(prompt.token_ids), "max_model_len": most, "tokens": prompt.token_ids})

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(DetokenizeRequest, request)
        self._service.check_model(asked.model)
        with self._service.admission.enter(1):
            return JSONResponse({"prompt": await self._service.encoder.decode(asked.tokens)})

    # --- about the server

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._service.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        backend = self._service.health.backend
        length = {} if backend is None else {"max_model_len": backend.max_length}
        return {
            "id": self._service.model, "object": "model", "created": self._created, "owned_by": "ryzanstein", **length,
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        status = self._service.health.status
        return JSONResponse({"status": status.value}, 200 if status in ALIVE else 503)

    async def ready(self, request: Request) -> Response:
        ready = await self._service.health.is_ready()
        status = self._service.health.status
        return JSONResponse({"status": status.value, "ready": ready}, 200 if ready else 503)

    async def status(self, request: Request) -> Response:
        return JSONResponse(self._status.to_json())

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics(), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": self._service.version})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._openapi)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:200], request.method[:20]
    if error.status_code == 404:
        problem = ApiError(404, f"Invalid URL ({method} {path})", code="unknown_url")
    else:
        message = f"Not allowed to {method} on {path}" if error.status_code == 405 else str(error.detail)
        problem = ApiError(error.status_code, message, headers=error.headers)
    return error_response(problem, request.scope)


async def _our_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGoneError):
        raise error  # there is nobody to answer, and nothing of ours went wrong
    return error_response(error, request.scope)


def make_app(service: Service) -> ASGIApp:
    """The application of a service."""
    routes = _Routes(service)
    table = [
        Route("/v1/completions", routes.completions, methods=["POST"]),
        Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        Route("/v1/embeddings", routes.embeddings, methods=["POST"]),
        Route("/v1/responses", routes.responses, methods=["POST"]),
        Route("/v1/models", routes.models, methods=["GET"]),
        Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
        Route("/tokenize", routes.tokenize, methods=["POST"]),
        Route("/detokenize", routes.detokenize, methods=["POST"]),
        Route("/health", routes.health, methods=["GET"]),
        Route("/ready", routes.ready, methods=["GET"]),
        Route("/status", routes.status, methods=["GET"]),
        Route("/metrics", routes.metrics, methods=["GET"]),
        Route("/version", routes.version, methods=["GET"]),
        Route("/openapi.json", routes.openapi, methods=["GET"]),
        *pages(),
    ]
    app = Starlette(
        routes=table, exception_handlers={HTTPException: _no_route, RyzansteinError: _our_error, Exception: _our_error}
    )
    # A redirect would send the client to whatever its Host header says.
    app.router.redirect_slashes = False
    paths = frozenset(route.path for route in table)
    return Gate(app, service.config, service.instruments, paths, service.tracing)
