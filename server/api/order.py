"""What a client ordered, as frozen values: the fields of a request checked against this model and this server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.api.schema import Common, StreamOptions
from server.api.service import Service, choice_seed
from server.api.telling import NOTHING_MORE, Telling, telling_of
from server.errors import ContextTooLong, InvalidRequest
from server.messages import Constraint, Ready, Speculation
from server.model_files import GenerationDefaults
from verifier.plan import SamplingParams

Number = TypeVar("Number", int, float)

MIN_TEMPERATURE = 1e-5
"""Below it an answer is greedy: logits divided by less leave nothing but the best token, and at the end overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One request, but for its prompts."""

    n: int
    seed: int
    max_tokens: int | None
    """None: the rest of the context, as neither the request nor the model names a limit."""
    max_tokens_param: str | None
    """The field that set `max_tokens`; None if it is a default, which is cut to the context instead of refused."""
    sampling: SamplingParams
    """For the first choice, with `max_tokens` still open."""
    stop: tuple[str, ...]
    keeps_stop: bool
    is_stream: bool
    includes_usage: bool
    has_continuous_usage: bool
    speculation: Speculation
    wants_metrics: bool
    constraint: Constraint | None = None
    marks: frozenset[str] = frozenset()
    """Special tokens whose names are text of the answer, for the one who reads it."""
    telling: Telling = NOTHING_MORE

    @property
    def has_answer(self) -> bool:
        """Whether any token of an answer is wanted: a prompt may be scored alone."""
        return self.max_tokens != 0

    def sampling_for(self, choice: int, num_prompt: int, max_model_len: int) -> SamplingParams:
        """Sampling of one choice after a prompt of `num_prompt` tokens. Raises ContextTooLong if it cannot fit."""
        room = max_model_len - num_prompt
        max_tokens = room if self.max_tokens is None else self.max_tokens
        if max_tokens > room and self.max_tokens_param is not None:
            raise ContextTooLong(
                f"This model's maximum context length is {max_model_len} tokens. However, you requested "
                f"{num_prompt + max_tokens} tokens ({num_prompt} in the prompt, {max_tokens} in the answer). "
                f"Please shorten the prompt or lower '{self.max_tokens_param}'.",
                param=self.max_tokens_param,
            )
        base = self.sampling
        return SamplingParams(
            max_tokens=max(1, min(max_tokens, room)),  # the engine answers every prompt, if by a token nobody sees
            seed=choice_seed(self.seed, choice),
            temperature=base.temperature,
            top_k=base.top_k,
            top_p=base.top_p,
            min_p=base.min_p,
            presence_penalty=base.presence_penalty,
            frequency_penalty=base.frequency_penalty,
            repetition_penalty=base.repetition_penalty,
            logit_bias=base.logit_bias,
            min_tokens=min(base.min_tokens, room),
            stop_ids=base.stop_ids,
            num_logprobs=base.num_logprobs,
        )


@dataclass(frozen=True, slots=True)
class AnswerLimit:
    """How long an answer may be, and which field said so."""

    max_tokens: int | None
    param: str | None


def answer_limit(request: Common, default: int | None) -> AnswerLimit:
    """The limit that a request sets by either of its two names, or `default`. Raises InvalidRequest if they differ."""
    old, new = request.max_tokens, request.max_completion_tokens
    if new is not None:
        if old is not None and old != new:
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' say different things; send one.", param="max_tokens"
            )
        return AnswerLimit(new, "max_completion_tokens")
    return AnswerLimit(default, None) if old is None else AnswerLimit(old, "max_tokens")


def take_order(request: Common, limit: AnswerLimit, num_logprobs: int, service: Service) -> Order:
    """Check a request against the model and the settings. Raises InvalidRequest, ModelNotFound, EngineUnavailable."""
    service.check_model(request.model)
    worker = service.worker()
    stop = tuple(request.stop or ())
    if len(stop) > service.settings.max_stop_strings:
        most = service.settings.max_stop_strings
        raise InvalidRequest(
            f"'stop' may hold at most {most} strings (--max-stop-strings), got {len(stop)}.", param="stop"
        )
    if num_logprobs > service.settings.max_logprobs:
        raise InvalidRequest(
            f"At most {service.settings.max_logprobs} alternatives per token can be listed, got {num_logprobs}.",
            param="top_logprobs" if hasattr(request, "top_logprobs") else "logprobs",
        )
    n = request.n or 1
    if n > service.settings.max_num_seqs:
        raise InvalidRequest(f"'n' must be at most {service.settings.max_num_seqs} on this server, got {n}.", param="n")
    options = request.stream_options or StreamOptions()
    if any((options.include_usage, options.continuous_usage_stats, options.include_obfuscation)) and not request.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        param = "stream_options.continuous_usage_stats"
        raise InvalidRequest(f"'{param}' needs 'include_usage': true.", param=param)
    if limit.max_tokens is None and service.scribe.defaults.max_new_tokens is not None:
        # The model's own wish; it cuts no explicit one short.
        limit = AnswerLimit(max(service.scribe.defaults.max_new_tokens, request.min_tokens or 0), None)
    seed = service.seeds.draw() if request.seed is None else request.seed % 2**63
    return Order(
        n=n,
        seed=seed,
        max_tokens=limit.max_tokens,
        max_tokens_param=limit.param,
        sampling=_sampling(request, limit, num_logprobs, service, worker),
        stop=stop,
        keeps_stop=bool(request.include_stop_str_in_output),
        is_stream=bool(request.stream),
        includes_usage=bool(options.include_usage),
        has_continuous_usage=bool(options.continuous_usage_stats),
        speculation=_speculation(request, service, worker),
        wants_metrics=request.speculative is not None and bool(request.speculative.metrics),
        telling=telling_of(request, service.settings.max_logprobs),
    )


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> tuple[int, ...]:
    """`ids`, if each is in the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            shown = token if abs(token) < 10**20 else "a number of more than 20 digits"
            raise InvalidRequest(
                f"'{param}' holds {shown}, which is not a token id: the vocabulary has {vocab_size} tokens, 0 to "
                f"{vocab_size - 1}.",
                param=param,
            )
    return tuple(ids)


def check_vocabulary(ids: tuple[int, ...], vocab_size: int) -> None:
    """Refuse a text with a token that the tokenizer has and the model has not. Raises InvalidRequest."""
    if max(ids) >= vocab_size:
        raise InvalidRequest(
            f"The prompt holds a special token with id {max(ids)}, but the model's vocabulary has {vocab_size} tokens.",
            param="prompt",
        )


def _sampling(
    request: Common, limit: AnswerLimit, num_logprobs: int, service: Service, worker: Ready
) -> SamplingParams:
    defaults: GenerationDefaults = service.scribe.defaults
    min_tokens = request.min_tokens or 0
    if limit.max_tokens is not None and min_tokens > limit.max_tokens:
        raise InvalidRequest(
            f"'min_tokens' must be at most the {limit.max_tokens} tokens of the answer, got {min_tokens}.",
            param="min_tokens",
        )
    stop_ids = check_token_ids(request.stop_token_ids or [], worker.vocab_size, "stop_token_ids")
    if not request.ignore_eos:
        # A configuration may name an id that the model's head cannot choose: to stop there means nothing.
        eos_ids = (token for token in service.scribe.eos_ids if 0 <= token < worker.vocab_size)
        stop_ids = tuple(dict.fromkeys((*eos_ids, *stop_ids)))
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    top_p = _first(request.top_p, defaults.top_p, 1.0)
    return SamplingParams(
        max_tokens=1,
        seed=0,
        # The smallest set of tokens that holds no part of the mass is the best token alone.
        temperature=temperature if temperature >= MIN_TEMPERATURE and top_p > 0 else 0.0,
        top_k=max(0, _first(request.top_k, defaults.top_k, 0)),
        top_p=top_p,
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias or {}, worker.vocab_size),
        min_tokens=min_tokens,
        stop_ids=stop_ids,
        num_logprobs=num_logprobs,
    )


def _first(given: Number | None, default: Number | None, fallback: Number) -> Number:
    if given is not None:
        return given
    return fallback if default is None else default


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequest(f"'logit_bias' keys must be token ids, got {key[:40]!r}.", param="logit_bias")
        token = check_token_ids([int(key)], vocab_size, "logit_bias")[0]
        pairs[token] = value
    return tuple(sorted(pairs.items()))


def _speculation(request: Common, service: Service, worker: Ready) -> Speculation:
    """The server's defaults, changed by what the request says."""
    wish = request.speculative
    drafter, max_nodes = service.settings.drafter, service.settings.max_nodes
    if wish is None:
        return Speculation(drafter=drafter, max_nodes=max_nodes)
    if wish.drafter:
        if wish.drafter not in worker.drafters:
            raise InvalidRequest(
                f"There is no drafter {wish.drafter[:80]!r}; this server has {', '.join(worker.drafters)}.",
                param="speculative.drafter",
            )
        drafter = wish.drafter
    if wish.max_nodes is not None:
        max_nodes = wish.max_nodes
    if wish.enabled is False or drafter == "none":
        drafter, max_nodes = "none", 1
    return Speculation(drafter=drafter, max_nodes=max_nodes, wants_record=bool(wish.metrics))
