"""create_app: every route behind one door."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic.json_schema import models_json_schema

from server.api import chat, completions, failures, models, ops, tokens
from server.api.answer_schema import ChatChunk, TextChunk
from server.api.body import Intake
from server.api.cors import Cors
from server.api.door import Door, Keys
from server.api.messages import route as messages
from server.api.messages.answer_schema import MessageEvent
from server.api.messages.schema import CountRequest, MessageRequest
from server.api.responses import route as responses
from server.api.responses.answer_schema import ResponseEvent
from server.api.responses.schema import ResponseRequest
from server.api.schema import ChatRequest, CompletionRequest
from server.api.service import Gate, SeedSource, Service
from server.api.sse import leave_shutdown_to_us
from server.api.token_schema import DetokenizeRequest, TokenizeRequest
from server.config import Settings
from server.metrics import Metrics, ServerFacts
from server.model_files import served_names
from server.prompt import Scribe


def create_app(engine: Gate, scribe: Scribe, metrics: Metrics, settings: Settings) -> FastAPI:
    """The HTTP side, as an ASGI app. The caller starts and stops the engine; the app only uses it."""
    leave_shutdown_to_us()
    service = Service(
        engine=engine,
        scribe=scribe,
        metrics=metrics,
        settings=settings,
        names=served_names(settings),
        seeds=SeedSource(settings.seed),
        started_s=int(time.time()),
    )
    metrics.describe(
        ServerFacts(
            version=ops.package_version(),
            model=service.names[0],
            drafter=settings.drafter,
            max_rows=settings.max_num_seqs,
            page_size=settings.page_size,
            has_vllm_aliases=settings.metrics_vllm_aliases,
        )
    )
    app = FastAPI(title="Foretoken", version=ops.package_version(), docs_url=None, redoc_url=None)
    # For /openapi.json alone: the door has looked at the key before.
    bearer = Depends(HTTPBearer(auto_error=False, description="An API key, where the server has any (`--api-key`)."))
    key = Depends(
        APIKeyHeader(name="x-api-key", auto_error=False, description="The same, as Anthropic's clients say it.")
    )
    for part in (chat, completions, responses, messages, models, tokens):
        app.include_router(part.router(service), dependencies=[bearer, key])
    app.include_router(ops.router(service))
    app.state.intake = Intake()
    failures.install(app)
    app.add_middleware(Door, keys=Keys(settings.api_key), metrics=metrics)
    if settings.allowed_origins:
        app.add_middleware(Cors, origins=settings.allowed_origins)
    _describe_bodies(app)
    return app


def _describe_bodies(app: FastAPI) -> None:
    """Put what routes read and stream by hand into /openapi.json: FastAPI does not know it."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = make()
        _, schema = models_json_schema(
            [
                (ChatRequest, "validation"),
                (CompletionRequest, "validation"),
                (TokenizeRequest, "validation"),
                (DetokenizeRequest, "validation"),
                (ResponseRequest, "validation"),
                (MessageRequest, "validation"),
                (CountRequest, "validation"),
                (ChatChunk, "serialization"),
                (TextChunk, "serialization"),
                (ResponseEvent, "serialization"),
                (MessageEvent, "serialization"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(schema["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]
