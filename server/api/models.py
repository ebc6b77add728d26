"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.api.service import Service


def router(service: Service) -> APIRouter:
    """The routes, bound to the server's parts."""
    routes = APIRouter()

    def card(name: str) -> dict[str, Any]:
        info = service.engine.info
        return {
            "id": name,
            "object": "model",
            "created": service.started_s,
            "owned_by": "foretoken",
            "root": service.settings.model,
            "parent": None,
            "max_model_len": None if info is None else info.max_model_len,
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
