"""POST /v1/completions."""

from __future__ import annotations

import uuid
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from server.api.answer import Answer, Prompt
from server.api.answer_schema import TextChunk, TextCompletion, answers
from server.api.body import read_object
from server.api.chat import body_schema, check_metrics, prediction_ids
from server.api.constraint import constraint_of
from server.api.order import Order, answer_limit, check_token_ids, take_order
from server.api.parse import parse
from server.api.prompt_cut import prompt_cut
from server.api.salt import salted
from server.api.schema import MAX_PROMPTS, CompletionRequest
from server.api.service import Service
from server.api.sse import aborting, respond
from server.api.token_limits import limited, token_limits
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
            order = limited(order, await token_limits(wish, service))
            prompts = await _prompts(wish, order, service)
        echoes = _echoes(wish, prompts, service) if wish.echo else None
        if echoes is not None and order.telling.num_echo_logprobs >= 0:
            # Log-probabilities come from the worker: the echo is the beginning of the answer.
            prompts = [replace(prompt, echo=echo) for prompt, echo in zip(prompts, echoes, strict=True)]
            echoes = None
        tenant = salted(request.state.tenant, wish.cache_salt)
        answer = Answer(f"cmpl-{uuid.uuid4().hex}", order, prompts, tenant, service)
        writer = CompletionWriter(answer, wish.model, service.scribe.text, echoes)
        return await respond(request, answer, writer, service.settings.keep_alive_s)

    return routes


def _order(wish: CompletionRequest, service: Service) -> Order:
    if wish.best_of not in (None, 1, wish.n):
        raise UnsupportedParameter("'best_of' other than 'n' is not supported yet.", param="best_of")
    limit = answer_limit(wish, DEFAULT_MAX_TOKENS)
    if limit.max_tokens == 0 and not wish.echo and wish.prompt_logprobs is None:
        raise InvalidRequest(
            f"'{limit.param}' may be 0 only with 'echo' or 'prompt_logprobs': else nothing is asked for.",
            param=limit.param,
        )
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


async def _prompts(wish: CompletionRequest, order: Order, service: Service) -> list[Prompt]:
    worker = service.worker()
    cut = prompt_cut(wish, order, worker.max_model_len)
    prediction = await prediction_ids(wish, service)
    prompts = []
    entries: list[str | list[int]] = [*wish.prompt]
    for index, prompt in enumerate(entries):
        param = "prompt" if len(wish.prompt) == 1 else f"prompt[{index}]"
        if not prompt:
            raise InvalidRequest(f"'{param}' is empty: at least one token is needed.", param=param)
        if isinstance(prompt, str):
            adds_special = wish.add_special_tokens is not False
            ids = await service.scribe.encode(prompt, cut.max_len, param, add_special_tokens=adds_special)
        else:
            ids = check_token_ids(check_length(tuple(prompt), cut.max_len, param), worker.vocab_size, param)
        prompts.append(Prompt(cut.cut(ids), is_continued=True, prediction=prediction))
    return prompts


def _echoes(wish: CompletionRequest, prompts: list[Prompt], service: Service) -> list[str]:
    """The text of each prompt; of token ids, and of one that may be cut, what the ids read as."""
    texts = []
    for given, prompt in zip(wish.prompt, prompts, strict=True):
        if isinstance(given, str) and wish.truncate_prompt_tokens is None:
            texts.append(given)
        else:
            text = service.scribe.text
            marks = text.special_names if wish.skip_special_tokens is False else ()
            texts.append(text.read_prompt(prompt.ids, marks))
    return texts
