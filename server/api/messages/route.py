"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request, Response

from server.api.answer_schema import ANSWER_ERRORS
from server.api.body import read_object
from server.api.chat import body_schema, take_chat
from server.api.conversation import conversation_of
from server.api.messages.answer_schema import TokenCount, message_answers, message_errors
from server.api.messages.schema import CountRequest, MessageRequest
from server.api.messages.take import take
from server.api.messages.translate import chat_prompt, chat_request, names
from server.api.messages.writer import MessageWriter
from server.api.service import Service
from server.api.sse import aborting, respond
from server.api.translation import renaming

PATH = "/v1/messages"


def router(service: Service) -> APIRouter:
    """The routes, bound to the server's parts."""
    routes = APIRouter()

    @routes.post(PATH, openapi_extra=body_schema(MessageRequest.__name__), responses=message_answers())
    async def create_message(request: Request) -> Response:
        """Answer a conversation, in Anthropic's Messages API."""
        wish = take(MessageRequest, await read_object(request, service.settings.max_body_bytes))
        with renaming(names(wish)):
            taken = await take_chat(request, chat_request(wish), f"msg_{secrets.token_hex(24)}", service)
        return await respond(request, taken.answer, MessageWriter(taken, wish.model), service.settings.keep_alive_s)

    @routes.post(
        PATH + "/count_tokens",
        openapi_extra=body_schema(CountRequest.__name__),
        responses={200: {"model": TokenCount}, **message_errors(*ANSWER_ERRORS)},
    )
    async def count_tokens(request: Request) -> TokenCount:
        """Tokens of the prompt that a conversation makes."""
        wish = take(CountRequest, await read_object(request, service.settings.max_body_bytes))
        service.check_model(wish.model)
        with renaming(names(wish)):
            conversation = conversation_of(chat_prompt(wish), service.scribe)
            async with aborting(request):
                ids = await conversation.prompt(service.scribe, service.worker().max_model_len)
        return TokenCount(input_tokens=len(ids))

    return routes
