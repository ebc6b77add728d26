"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.api.service import LOADING_RETRY_S, Service, why_not_ready
from server.errors import EngineUnavailable


def router(service: Service) -> APIRouter:
    """The routes, bound to the server's parts."""
    routes = APIRouter()

    def card(name: str) -> dict[str, Any]:
        info = service.engine.info
        if info is None:  # without its context length a card would mislead clients that plan by it
            raise EngineUnavailable(why_not_ready(service.engine), retry_after_s=LOADING_RETRY_S)
        return {
            "id": name,
            "object": "model",
            "created": service.started_s,
            "owned_by": "foretoken",
            "root": service.settings.model,
            "parent": None,
            "max_model_len": info.max_model_len,
        }

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Every name under which the model is served."""
        return {"object": "list", "data": [card(name) for name in service.names]}

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        """One card; names may hold slashes."""
        service.check_model(model_id)
        return card(model_id)

    return routes
