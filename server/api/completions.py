"""POST /v1/completions."""

from __future__ import annotations

import uuid
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from server.api.answer import Answer, Prompt
from server.api.answer_schema import TextChunk, TextCompletion, answers
from server.api.body import read_object
from server.api.chat import body_schema, check_metrics
from server.api.constraint import constraint_of
from server.api.order import Order, answer_limit, check_token_ids, take_order
from server.api.parse import parse
from server.api.schema import MAX_PROMPTS, CompletionRequest
from server.api.service import Service
from server.api.sse import aborting, respond
from server.api.writer import CompletionWriter
from server.errors import InvalidRequest, UnsupportedParameter
from server.prompt_limits import check_length

DEFAULT_MAX_TOKENS = 16
"""What OpenAI answers when nothing is said."""


def router(service: Service) -> APIRouter:
    """The route, bound to the server's parts."""
    routes = APIRouter()

    @routes.post(
        "/v1/completions",
        openapi_extra=body_schema(CompletionRequest.__name__),
        responses=answers(TextCompletion, TextChunk),
    )
    async def completions(request: Request) -> Response:
        """Go on with a text."""
        wish = parse(CompletionRequest, await read_object(request, service.settings.max_body_bytes))
        order = _order(wish, service)
        async with aborting(request):
            order = replace(order, constraint=await constraint_of(wish, service))
            prompts = await _prompts(wish, service)
        echoes = _echoes(wish, prompts, service) if wish.echo else None
        answer = Answer(f"cmpl-{uuid.uuid4().hex}", order, prompts, request.state.tenant, service)
        writer = CompletionWriter(answer, wish.model, service.scribe.text, echoes)
        return await respond(request, answer, writer, service.settings.keep_alive_s)

    return routes


def _order(wish: CompletionRequest, service: Service) -> Order:
    if wish.echo and wish.logprobs is not None:
        raise UnsupportedParameter("'echo' together with 'logprobs' is not supported yet.", param="echo")
    if wish.best_of not in (None, 1, wish.n):
        raise UnsupportedParameter("'best_of' other than 'n' is not supported yet.", param="best_of")
    limit = answer_limit(wish, DEFAULT_MAX_TOKENS)
    order = take_order(wish, limit, -1 if wish.logprobs is None else wish.logprobs, service)
    check_metrics(order, len(wish.prompt))
    if order.n * len(wish.prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"'n' times the number of prompts must be at most {MAX_PROMPTS}.", param="n")
    _check_admissible(order.n, len(wish.prompt), service)
    return order


def _check_admissible(n: int, num_prompts: int, service: Service) -> None:
    """Refuse for good what a client would retry for ever: more choices than this server ever holds at once."""
    settings = service.settings
    most = settings.max_num_seqs + settings.max_queued
    if n * num_prompts > most:
        raise InvalidRequest(
            f"'n' times the number of prompts must be at most {most} on this server (--max-num-seqs plus "
            f"--max-queued), got {n * num_prompts}.",
            param="n" if n > 1 else "prompt",
        )


async def _prompts(wish: CompletionRequest, service: Service) -> list[Prompt]:
    worker = service.worker()
    prompts = []
    entries: list[str | list[int]] = [*wish.prompt]
    for index, prompt in enumerate(entries):
        param = "prompt" if len(wish.prompt) == 1 else f"prompt[{index}]"
        if not prompt:
            raise InvalidRequest(f"'{param}' is empty: at least one token is needed.", param=param)
        if isinstance(prompt, str):
            adds_special = wish.add_special_tokens is not False
            ids = await service.scribe.encode(prompt, worker.max_model_len, param, add_special_tokens=adds_special)
        else:
            ids = check_token_ids(check_length(tuple(prompt), worker.max_model_len, param), worker.vocab_size, param)
        prompts.append(Prompt(ids, is_continued=True))
    return prompts


def _echoes(wish: CompletionRequest, prompts: list[Prompt], service: Service) -> list[str]:
    """The text of each prompt; of token ids what they read as."""
    texts = []
    for given, prompt in zip(wish.prompt, prompts, strict=True):
        if isinstance(given, str):
            texts.append(given)
        else:
            texts.append(service.scribe.text.read_prompt(prompt.ids))
    return texts
