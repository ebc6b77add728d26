"""POST /v1/responses, and the routes of responses that are kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.answer_schema import ANSWER_ERRORS, Responses, errors
from server.api.body import read_object
from server.api.chat import TakenChat, body_schema, take_chat
from server.api.responses.answer_schema import DeletedResponse, InputItems, ResponseEvent, ResponseObject
from server.api.responses.items import input_items
from server.api.responses.objects import Item, new_id, response_frame
from server.api.responses.pages import Page, page_parameters
from server.api.responses.schema import MAX_ITEMS, ResponseRequest
from server.api.responses.store import ResponseStore, Stored
from server.api.responses.take import take
from server.api.responses.translate import NAMES, chat_request
from server.api.responses.writer import Keep, ResponseWriter
from server.api.service import Service
from server.api.sse import respond
from server.api.translation import renaming
from server.errors import InvalidRequest, NotFound, UnsupportedParameter

PATH = "/v1/responses"


def router(service: Service) -> APIRouter:
    """The routes, bound to the server's parts and to a store of their own."""
    routes = APIRouter()
    store = ResponseStore(service.settings.max_stored_responses, service.settings.max_stored_bytes)

    @routes.post(PATH, openapi_extra=body_schema(ResponseRequest.__name__), responses=_answers())
    async def create_response(request: Request) -> Response:
        """Answer a conversation, in OpenAI's Responses API."""
        wish = take(await read_object(request, service.settings.max_body_bytes))
        tenant = request.state.tenant
        inputs = input_items(wish.input)
        items = [*_history(store, tenant, wish), *inputs]
        if len(items) > MAX_ITEMS:
            raise InvalidRequest(f"A conversation may have at most {MAX_ITEMS} items, got {len(items)}.", param="input")
        id_ = new_id("resp")
        with renaming(NAMES):
            taken = await take_chat(request, chat_request(wish, items), id_, service)
            _check_logprobs(taken)
        frame = response_frame(id_, wish, taken.answer.order, int(time.time()))
        frame["store"] = frame["store"] and store.keeps
        keep = _keeper(store if frame["store"] else None, (tenant, id_), inputs, items)
        writer = ResponseWriter(taken, frame, service.scribe.text, keep)
        return await respond(request, taken.answer, writer, service.settings.keep_alive_s)

    @routes.get(PATH + "/{response_id}", responses=_kept(ResponseObject), openapi_extra=_ID)
    async def get_response(request: Request) -> Response:
        """A response that is kept."""
        if set(request.query_params) & {"stream", "starting_after"}:
            raise UnsupportedParameter("A kept response is not streamed again.", param="stream")
        return Response(_find(store, request).response, media_type="application/json")

    @routes.delete(PATH + "/{response_id}", responses=_kept(DeletedResponse), openapi_extra=_ID)
    async def delete_response(request: Request) -> DeletedResponse:
        """Forget a response."""
        id_ = request.path_params["response_id"]
        if not store.delete(request.state.tenant, id_):
            raise _not_kept(id_)
        return DeletedResponse(id=id_, object="response", deleted=True)

    @routes.get(
        PATH + "/{response_id}/input_items",
        responses=_kept(InputItems, 400),
        openapi_extra={"parameters": [*_ID["parameters"], *page_parameters()]},
    )
    async def list_input_items(request: Request) -> Response:
        """The items that a response was asked with, those of earlier responses not among them."""
        page = Page.of(request.query_params)
        items = msgspec.json.decode(_find(store, request).inputs)
        return Response(msgspec.json.encode(page.cut(items)), media_type="application/json")

    return routes


def _history(store: ResponseStore, tenant: str, wish: ResponseRequest) -> list[Item]:
    """The items of the conversation that a request goes on with. Raises InvalidRequest."""
    id_ = wish.previous_response_id
    if not id_:
        return []
    stored = store.get(tenant, id_)
    if stored is None:
        raise InvalidRequest(
            f"'previous_response_id' names no response that is kept, got '{id_[:80]}': it was not stored, was deleted, "
            "or had to make room for newer ones.",
            param="previous_response_id",
        )
    items: list[Item] = msgspec.json.decode(stored.history)
    return items


def _keeper(store: ResponseStore | None, key: tuple[str, str], inputs: Sequence[Item], items: Sequence[Item]) -> Keep:
    """What is done with a response that has ended."""

    def keep(response: bytes, output: Sequence[Item]) -> None:
        if store is not None:
            history = msgspec.json.encode([*items, *output])
            store.put(*key, Stored(response, msgspec.json.encode(inputs), history))

    return keep


def _check_logprobs(taken: TakenChat) -> None:
    """Log-probabilities belong to the text of a message: refuse them where the text is read for something else too."""
    if taken.answer.order.sampling.num_logprobs >= 0 and not taken.reading.is_plain:
        raise UnsupportedParameter(
            "Log-probabilities are not supported together with 'tools' or with a model that thinks.", param="logprobs"
        )


def _find(store: ResponseStore, request: Request) -> Stored:
    id_ = request.path_params["response_id"]
    stored = store.get(request.state.tenant, id_)
    if stored is None:
        raise _not_kept(id_)
    return stored


def _not_kept(id_: str) -> NotFound:
    return NotFound(f"Response with id '{id_[:80]}' not found.", param="response_id")


_ID: dict[str, list[dict[str, Any]]] = {
    "parameters": [{"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}]
}


def _answers() -> Responses:
    event = {"$ref": f"#/components/schemas/{ResponseEvent.__name__}"}
    told = {
        "model": ResponseObject,
        "description": "The response; with `stream`, events, the last one with the whole response.",
        "content": {"text/event-stream": {"schema": event}},
    }
    return {200: told, **errors(*ANSWER_ERRORS)}


def _kept(model: type[Any], *more: int) -> Responses:
    return {200: {"model": model}, **errors(*sorted({400, 401, 404, 500, *more}))}
