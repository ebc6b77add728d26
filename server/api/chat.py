"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from itertools import takewhile

from fastapi import APIRouter, Request, Response

from server.api.answer import Answer, Prompt
from server.api.answer_schema import ChatChunk, ChatCompletion, answers
from server.api.body import read_object
from server.api.constraint import constraint_of
from server.api.conversation import Conversation, conversation_of
from server.api.order import Order, answer_limit, take_order
from server.api.parse import parse
from server.api.prompt_cut import prompt_cut
from server.api.salt import salted
from server.api.schema import ChatRequest, Common
from server.api.service import Service
from server.api.sse import aborting, respond
from server.api.token_limits import limited, token_limits
from server.api.tool_writer import chat_writer
from server.errors import InvalidRequest
from server.tools.answer import Reading


def router(service: Service) -> APIRouter:
    """The route, bound to the server's parts."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions",
        openapi_extra=body_schema(ChatRequest.__name__),
        responses=answers(ChatCompletion, ChatChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        wish = parse(ChatRequest, await read_object(request, service.settings.max_body_bytes))
        taken = await take_chat(request, wish, f"chatcmpl-{uuid.uuid4().hex}", service)
        writer = chat_writer(taken.answer, wish.model, service.scribe.text, taken.reading)
        return await respond(request, taken.answer, writer, service.settings.keep_alive_s)

    return routes


@dataclass(frozen=True, slots=True)
class TakenChat:
    """The answer to a chat request, ready to be opened, and how its text is read."""

    answer: Answer
    reading: Reading


async def take_chat(request: Request, wish: ChatRequest, id_: str, service: Service) -> TakenChat:
    """Take a chat request; also of other APIs, which say theirs as one of chat. Raises ServingError."""
    order = chat_order(wish, service)
    conversation = conversation_of(wish, service.scribe)
    async with aborting(request):
        limits = await token_limits(wish, service)
        ids = await chat_prompt(wish, conversation, order, service)
        form = conversation.after_thinking(await constraint_of(wish, service), ids, service.scribe.text)
        # Where both are asked for, the answer has to be a call, and the form is one of the content that it has not.
        constraint = await conversation.constraint(ids, service.scribe) or form
        is_continued = conversation.ending == "open"
        prompt = Prompt(ids, is_continued=is_continued, prediction=await prediction_ids(wish, service))
    reading = conversation.reading(ids, service.scribe.text)
    order = limited(replace(order, marks=reading.marks, constraint=constraint), limits)
    tenant = salted(request.state.tenant, wish.cache_salt)
    return TakenChat(Answer(id_, order, [prompt], tenant, service), reading)


async def chat_prompt(wish: ChatRequest, conversation: Conversation, order: Order, service: Service) -> tuple[int, ...]:
    """Ids of the prompt of a chat."""
    cut = prompt_cut(wish, order, service.worker().max_model_len)
    return cut.cut(await conversation.prompt(service.scribe, cut.max_len))


async def prediction_ids(wish: Common, service: Service) -> tuple[int, ...] | None:
    """Ids of the prediction, up to the first one that this model cannot say; None if there is none."""
    if wish.prediction is None:
        return None
    worker = service.worker()
    ids = await service.scribe.predict(wish.prediction.content, worker.max_model_len)
    return tuple(takewhile(lambda token: token < worker.vocab_size, ids))


def body_schema(name: str) -> dict[str, object]:
    """Says in /openapi.json what the body is: routes read it themselves, to bound it."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {"requestBody": {"required": True, "content": content}}


def check_metrics(order: Order, num_prompts: int) -> None:
    """Speculation is reported for one choice: raise InvalidRequest for more."""
    if order.wants_metrics and order.n * num_prompts > 1:
        raise InvalidRequest("'speculative.metrics' needs 'n': 1 and a single prompt.", param="speculative.metrics")


def chat_order(wish: ChatRequest, service: Service) -> Order:
    """What a chat orders, but for its prompt. Raises InvalidRequest and what `take_order` raises."""
    if wish.top_logprobs and not wish.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    limit = answer_limit(wish, default=None)
    order = take_order(wish, limit, (wish.top_logprobs or 0) if wish.logprobs else -1, service)
    check_metrics(order, 1)
    return order
