"""The OpenAPI document, made of the schemas that requests are checked with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ryzanstein_jax.server.embeddings import EmbeddingRequest
from ryzanstein_jax.server.responses_schema import ResponseRequest
from ryzanstein_jax.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponseRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_READS = {
    "/v1/models": "The model that is served.",
    "/health": "Whether the server lives.",
    "/ready": "Whether tokens come out now.",
    "/status": "What the server, its engine and its devices do now.",
    "/metrics": "Metrics for Prometheus.",
    "/version": "The server's version.",
    "/openapi.json": "This document.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi(version: str) -> dict[str, Any]:
    """The document."""
    template = "#/components/schemas/{model}"
    _, found = models_json_schema([(kind, "validation") for kind in _BODIES.values()], ref_template=template)
    error = {
        "description": "An error.",
        "content": {"application/json": {"schema": {"$ref": template.format(model="Error")}}},
    }
    paths: dict[str, Any] = {}
    for path, kind in _BODIES.items():
        schema = {"$ref": template.format(model=kind.__name__)}
        content = {"application/json": {"schema": {"type": "object"}}}
        if "stream" in kind.model_fields:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "operationId": kind.__name__,
                "summary": (kind.__doc__ or "").splitlines()[0],
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "The answer.", "content": content}, "default": error},
            }
        }
    for path, summary in _READS.items():
        kind_of = "text/plain" if path == "/metrics" else "application/json"
        ok = {"description": summary, "content": {kind_of: {}}}
        paths[path] = {
            "get": {"operationId": path.strip("/"), "summary": summary, "responses": {"200": ok, "default": error}}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "ryzanstein-jax", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**found.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
