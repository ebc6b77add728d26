"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request

from server.api.answer_schema import ModelCard, ModelList, errors
from server.api.service import LOADING_RETRY_S, Service, why_not_ready
from server.errors import EngineUnavailable

_PARAMETERS = {"parameters": [{"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}]}


def router(service: Service) -> APIRouter:
    """The routes, bound to the server's parts."""
    routes = APIRouter()

    def card(name: str) -> ModelCard:
        info = service.engine.info
        if info is None:  # without its context length a card would mislead clients that plan by it
            raise EngineUnavailable(why_not_ready(service.engine), retry_after_s=LOADING_RETRY_S)
        model = service.settings.model
        root = service.names[0] if Path(model).exists() else model  # where a model lies is nobody's business
        return ModelCard(id=name, created=service.started_s, root=root, max_model_len=info.max_model_len)

    @routes.get("/v1/models", responses=errors(401, 500, 503))
    async def list_models() -> ModelList:
        """Every name under which the model is served."""
        return ModelList(data=[card(name) for name in service.names])

    # The name is read by hand: any text is one, and FastAPI would tell of a 422 that cannot be.
    @routes.get("/v1/models/{model_id:path}", responses=errors(401, 404, 500, 503), openapi_extra=_PARAMETERS)
    async def get_model(request: Request) -> ModelCard:
        """One card; names may hold slashes."""
        name = request.path_params["model_id"]
        service.check_model(name)
        return card(name)

    return routes
