"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from itertools import takewhile

from fastapi import APIRouter, Request, Response

from server.api.answer import Answer, Prompt
from server.api.answer_schema import ChatChunk, ChatCompletion, answers
from server.api.body import read_object
from server.api.order import Order, answer_limit, take_order
from server.api.parse import parse
from server.api.prompt_cut import prompt_cut
from server.api.salt import salted
from server.api.schema import ChatRequest, Common
from server.api.schema import Message as Turn
from server.api.service import Service
from server.api.sse import aborting, respond
from server.api.token_limits import limited, token_limits
from server.api.token_schema import TokenizeRequest
from server.api.writer import ChatWriter
from server.errors import InvalidRequest
from server.prompt_messages import Ending
from server.template_forms import Message


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
        order = chat_order(wish, service)
        async with aborting(request):
            order = limited(order, await token_limits(wish, service))
            ids = await chat_prompt(wish, order, service)
            is_continued = chat_ending(wish) == "open"
            prompt = Prompt(ids, is_continued=is_continued, prediction=await prediction_ids(wish, service))
        tenant = salted(request.state.tenant, wish.cache_salt)
        answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", order, [prompt], tenant, service)
        writer = ChatWriter(answer, wish.model, service.scribe.text)
        return await respond(request, answer, writer, service.settings.keep_alive_s)

    return routes


async def chat_prompt(wish: ChatRequest, order: Order, service: Service) -> tuple[int, ...]:
    """Ids of the prompt of a chat."""
    cut = prompt_cut(wish, order, service.worker().max_model_len)
    return cut.cut(await service.scribe.chat(turns_of(wish.messages), cut.max_len, ending=chat_ending(wish)))


def turns_of(messages: Iterable[Turn]) -> list[Message]:
    """Messages as a template takes them."""
    return [
        {"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.name else {}) for turn in messages
    ]


def chat_ending(wish: ChatRequest | TokenizeRequest) -> Ending:
    """How the prompt of a chat ends. Raises InvalidRequest for one that should end in two ways."""
    if wish.continue_final_message:
        if wish.add_generation_prompt:
            raise InvalidRequest(
                "'continue_final_message' and 'add_generation_prompt' cannot both be true: the answer either goes on "
                "with the last message or begins a new one.",
                param="continue_final_message",
            )
        return "open"
    return "none" if wish.add_generation_prompt is False else "header"


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
