"""POST /tokenize, /detokenize and /v1/chat/completions/render: what the model reads, without an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.answer_schema import ANSWER_ERRORS, Detokenized, Rendered, Tokenized, errors
from server.api.body import read_object
from server.api.chat import body_schema, chat_order, chat_prompt
from server.api.chat_ending import chat_ending
from server.api.conversation import conversation_of, turns_of
from server.api.order import check_token_ids
from server.api.parse import parse
from server.api.schema import ChatRequest
from server.api.service import Service
from server.api.sse import aborting
from server.api.token_schema import MAX_TOKENS_READ, DetokenizeRequest, TokenizeRequest
from server.detokenize import TokenText
from server.errors import InvalidRequest, UnsupportedParameter

_SLICE = 4096
"""Tokens that are read in a row; other requests are served between two slices."""


def router(service: Service) -> APIRouter:
    """The routes, bound to the server's parts."""
    routes = APIRouter()
    answers = errors(*ANSWER_ERRORS)
    max_bytes = service.settings.max_body_bytes

    @routes.post(
        "/tokenize",
        openapi_extra=body_schema(TokenizeRequest.__name__),
        responses={200: {"model": Tokenized}, **answers},
    )
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        wish = parse(TokenizeRequest, await read_object(request, max_bytes))
        _check_model(wish.model, service)
        worker = service.worker()
        async with aborting(request):
            ids = await (_text_ids(wish, service) if wish.messages is None else _chat_ids(wish, service))
        value = {"count": len(ids), "max_model_len": worker.max_model_len, "tokens": ids}
        if wish.return_token_strs:
            value["token_strs"] = list(map(service.scribe.text.name, ids))
        return _json(value)

    @routes.post(
        "/detokenize",
        openapi_extra=body_schema(DetokenizeRequest.__name__),
        responses={200: {"model": Detokenized}, **answers},
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens by their names."""
        wish = parse(DetokenizeRequest, await read_object(request, max_bytes))
        _check_model(wish.model, service)
        ids = check_token_ids(wish.tokens, service.worker().vocab_size, "tokens")
        async with aborting(request):
            return _json({"prompt": await _read(service.scribe.text, ids)})

    @routes.post(
        "/v1/chat/completions/render",
        openapi_extra=body_schema(ChatRequest.__name__),
        responses={200: {"model": Rendered}, **answers},
    )
    async def render(request: Request) -> Response:
        """The prompt that a chat completion with this body would be answered from."""
        wish = parse(ChatRequest, await read_object(request, max_bytes))
        order = chat_order(wish, service)
        async with aborting(request):
            ids = await chat_prompt(wish, conversation_of(wish, service.scribe), order, service)
            text = await _read(service.scribe.text, ids)
        return _json({"model": wish.model, "prompt": text, "token_ids": ids})

    return routes


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _check_model(name: str | None, service: Service) -> None:
    if name:
        service.check_model(name)


async def _text_ids(wish: TokenizeRequest, service: Service) -> tuple[int, ...]:
    if wish.prompt is None:
        raise InvalidRequest("'prompt' or 'messages' is required.", param="prompt")
    for name in ("add_generation_prompt", "continue_final_message"):
        if getattr(wish, name) is not None:
            raise InvalidRequest(f"'{name}' needs 'messages'.", param=name)
    adds_special = wish.add_special_tokens is not False
    try:
        return await service.scribe.encode(wish.prompt, MAX_TOKENS_READ, add_special_tokens=adds_special)
    except InvalidRequest:
        if wish.prompt:
            raise
        return ()  # no answer could follow it, but nobody asked for one


async def _chat_ids(wish: TokenizeRequest, service: Service) -> tuple[int, ...]:
    if wish.prompt is not None:
        raise InvalidRequest("'prompt' and 'messages' are two ways to say it; send one.", param="prompt")
    if wish.add_special_tokens:
        raise UnsupportedParameter(
            "'add_special_tokens' is not supported for 'messages': the chat template brings its own.",
            param="add_special_tokens",
        )
    return await service.scribe.chat(turns_of(wish.messages or []), MAX_TOKENS_READ, ending=chat_ending(wish))


async def _read(text: TokenText, ids: Sequence[int]) -> str:
    reader, parts = text.reader(marks=text.special_names), []
    for start in range(0, len(ids), _SLICE):
        parts.append(reader.feed(ids[start : start + _SLICE]))
        await asyncio.sleep(0)
    return "".join(parts) + reader.finish()
