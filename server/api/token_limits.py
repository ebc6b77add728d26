"""Which tokens an answer may hold: `allowed_token_ids` and `bad_words`, as a constraint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from server.api.order import Order, check_token_ids
from server.api.schema import Common
from server.api.service import Service
from server.errors import InvalidRequest
from server.messages import Constraint
from server.prompt_messages import MAX_WORD_TOKENS


async def token_limits(wish: Common, service: Service) -> Constraint | None:
    """The constraint that a request's two fields ask for; None if they ask for none. Raises InvalidRequest."""
    if wish.allowed_token_ids is None and not wish.bad_words:
        return None
    vocab_size = service.worker().vocab_size
    allowed: tuple[int, ...] = ()
    if wish.allowed_token_ids is not None:
        if not wish.allowed_token_ids:
            raise InvalidRequest(
                "'allowed_token_ids' is empty, so no token could be chosen; leave it out to allow all.",
                param="allowed_token_ids",
            )
        ids = check_token_ids(wish.allowed_token_ids, vocab_size, "allowed_token_ids")
        allowed = tuple(sorted(set(ids)))
    if not wish.bad_words:
        return Constraint(allowed=allowed)
    spelled = await service.scribe.encode_words(spellings(wish.bad_words), "bad_words")
    return Constraint(allowed=allowed, banned=banned_sequences(spelled, vocab_size))


def spellings(words: Iterable[str]) -> tuple[str, ...]:
    """Each word as it stands at the start of a line and behind a blank; most vocabularies tell these two apart."""
    bare = [word.lstrip() for word in words]
    return tuple(dict.fromkeys(text for word in bare for text in (word, f" {word}")))


def banned_sequences(spelled: Iterable[Sequence[int]], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """What may not occur, each once. Raises InvalidRequest if it is too long in all.

    A sequence with a token that the model cannot say never occurs. One that ends in another banned one goes without
    saying, since its last token is banned there already.
    """
    known = {tuple(ids) for ids in spelled if ids and max(ids) < vocab_size}
    kept: list[tuple[int, ...]] = []
    for ids in sorted(known, key=lambda ids: (len(ids), ids)):
        if not any(ids[-len(shorter) :] == shorter for shorter in kept):
            kept.append(ids)
    total = sum(map(len, kept))
    if total > MAX_WORD_TOKENS:
        raise InvalidRequest(
            f"'bad_words' may have at most {MAX_WORD_TOKENS} tokens in all, each word with and without a blank before "
            f"it; these have {total}.",
            param="bad_words",
        )
    return tuple(kept)


def limited(order: Order, limits: Constraint | None) -> Order:
    """`order` with these limits beside the grammar that it may have. Raises InvalidRequest if nothing can be said."""
    if limits is None:
        return order
    _check_way_out(order, limits)
    grammar = "" if order.constraint is None else order.constraint.grammar
    return replace(order, constraint=msgspec.structs.replace(limits, grammar=grammar))


def _check_way_out(order: Order, limits: Constraint) -> None:
    """Refuse a dead end that shows at the first token: every allowed token is banned, or cannot come yet."""
    if not limits.allowed:
        return
    banned = {ids[0] for ids in limits.banned if len(ids) == 1}
    stops = set(order.sampling.stop_ids)
    is_open = bool(stops - banned) and not order.sampling.min_tokens
    if is_open or not set(limits.allowed) <= banned | (stops if order.sampling.min_tokens else set()):
        return
    raise InvalidRequest(
        "'allowed_token_ids' leaves no token that could come first: all of them are banned by 'bad_words', or are stop "
        "tokens, which 'min_tokens' forbids.",
        param="allowed_token_ids",
    )
