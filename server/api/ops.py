"""GET /health, /ready, /version and /metrics: for those who keep the server running. No key is asked for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response

from server.api.service import LOADING_RETRY_S, Service, why_not_ready
from server.errors import EngineUnavailable
from server.metrics import CONTENT_TYPE, EngineState


def package_version() -> str:
    """The version of the installed package."""
    try:
        return version("foretoken")
    except PackageNotFoundError:
        return "0+unknown"


def router(service: Service) -> APIRouter:
    """The routes, bound to the server's parts."""
    routes = APIRouter()
    engine = service.engine

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> dict[str, str]:
        """200 while this process lives and its worker is not given up."""
        if engine.is_dead:
            raise EngineUnavailable(why_not_ready(engine))
        return {"status": "ok"}

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready")
    async def ready() -> dict[str, str]:
        """200 when a request would be admitted; 503 with a reason while loading, draining or dead."""
        if not engine.is_ready or engine.is_draining or engine.is_dead:
            raise EngineUnavailable(why_not_ready(engine), retry_after_s=LOADING_RETRY_S)
        return {"status": "ready"}

    @routes.get("/version")
    async def show_version() -> dict[str, str]:
        """The version of this server."""
        return {"version": package_version()}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        state = EngineState(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_restarts=engine.num_restarts,
            has_worker=engine.has_worker,
        )
        service.metrics.sample_engine(state)
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return routes
