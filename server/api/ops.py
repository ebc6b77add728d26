"""GET /health, /ready, /version and /metrics: for those who keep the server running. No key is asked for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from server.api.answer_schema import Health, Status, Version, errors
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
    @routes.get("/health", responses=errors(500, 503))
    async def health() -> Health:
        """200 while this process lives and its worker is not given up."""
        if engine.is_dead:
            raise EngineUnavailable(why_not_ready(engine))
        info = engine.info if engine.has_worker else None
        if info is None:
            return Health(status="ok")
        return Health(status="ok", backend=info.backend, drafting=engine.is_drafting)

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready", responses=errors(500, 503))
    async def ready() -> Status:
        """200 when a request would be admitted; 503 with a reason while loading, draining or dead."""
        if not engine.is_ready or engine.is_draining or engine.is_dead:
            raise EngineUnavailable(why_not_ready(engine), retry_after_s=LOADING_RETRY_S)
        return Status(status="ready")

    @routes.get("/version", responses=errors(500))
    async def show_version() -> Version:
        """The version of this server."""
        return Version(version=package_version())

    @routes.get("/metrics", response_class=PlainTextResponse, responses=errors(500))
    async def metrics() -> Response:
        """Prometheus text."""
        state = EngineState(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_restarts=engine.num_restarts,
            has_worker=engine.has_worker,
            is_drafting=engine.is_drafting,
        )
        service.metrics.sample_engine(state)
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return routes
