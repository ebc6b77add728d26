"""Learning: committed tokens and the target's own candidates go into the caches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from drafters.base import Float32, Int32, Int64
from drafters.compiled import Index, compiled, inlined
from drafters.ngram.backoff import Ngram
from drafters.ngram.cache import MAX_ORDER, claim_slot, extend_key, observe
from drafters.rows import token_back
from verifier.plan import MAX_TREE_NODES

MAX_CANDIDATES = 64
"""More of the target's tokens at one node are not looked at."""
SHARPNESS = 1.5
"""The target's probabilities at a verified node are raised to this power before they are learned: its favourite is what
the next draft needs. Measured."""

COMMITTED, VERIFIED = 0, 1
"""What a cache can learn from: a token that became true, the target's candidates at a verified node."""
STRENGTHS = (0.5, 1.0)
"""How much one observation counts, by event. Measured."""

APPETITE = np.dtype(
    [
        ("decay", np.float64),  # what is left of a context's old observations after a new one
        ("orders", np.int64),  # context lengths that learn: bit k for k + 1 tokens
    ]
)
LESSON = np.dtype(
    [
        ("appetites", APPETITE, (2, 2)),  # by cache (request, tenant) and event (COMMITTED, VERIFIED)
        ("stamp", np.int64),  # the time
        ("contexts", np.int64, (MAX_TREE_NODES, MAX_ORDER)),  # working memory, like what follows
        ("tokens", np.int64, (MAX_CANDIDATES,)),
        ("weights", np.float32, (MAX_CANDIDATES,)),
    ]
)


@compiled
def _observe(
    caches: tuple[Index, Index], context: Int64, count: Index, event: Index, ngram: Ngram, lesson: Any
) -> None:
    """Tell the caches of request and tenant (-1: none) what followed a context: `count` tokens of the lesson."""
    tokens, weights = lesson.tokens[:count], lesson.weights[:count]
    for kind in range(2 if caches[1] >= 0 else 1):
        cache = ngram.request[caches[0]] if kind == 0 else ngram.tenant[caches[1]]
        appetite = lesson.appetites[kind, event]
        key = np.uint64(0)
        for order in range(MAX_ORDER):
            if context[order] < 0 or (appetite.orders >> order) == 0:
                break
            key = extend_key(key, context[order])
            if (appetite.orders >> order) & 1:
                slot = cache[claim_slot(cache, key)]
                slot.stamp = lesson.stamp
                observe(slot, tokens, weights, STRENGTHS[event], appetite.decay)


@compiled
def _take_candidates(candidates: Int32, logits: Float32, lesson: Any) -> Index:
    """Note the target's tokens at a node [K] with their softmax. Returns how many, 0 if a logit is not finite."""
    count = min(logits.size, MAX_CANDIDATES)
    highest = -np.inf
    for index in range(count):
        if not math.isfinite(logits[index]):
            return 0
        highest = max(highest, np.float64(logits[index]))
    total = 0.0
    for index in range(count):
        weight = math.exp((logits[index] - highest) * SHARPNESS)
        lesson.weights[index] = weight
        total += weight
        lesson.tokens[index] = candidates[index]
    for index in range(count):
        lesson.weights[index] /= np.float32(total)
    return count


@inlined
def learn_tree(row: Any, caches: tuple[Index, Index], tree: Any, seen: Any, ngram: Ngram, lesson: Any) -> None:
    """What the target would have said after each node of one verified tree, rejected ones included.

    Args: `tree`, its tokens and parents [nodes]; `seen`, candidates and logits [nodes, K].
    """
    tokens, parents = tree
    contexts = lesson.contexts
    for node in range(tokens.size):
        contexts[node, 0] = tokens[node]
        for order in range(1, MAX_ORDER):
            parent = parents[node]
            contexts[node, order] = contexts[parent, order - 1] if parent >= 0 else token_back(row, order)
        count = _take_candidates(seen[0][node], seen[1][node], lesson)
        if count > 0:
            _observe(caches, contexts[node], count, np.int64(VERIFIED), ngram, lesson)


@inlined
def learn_token(row: Any, caches: tuple[Index, Index], token: Index, ngram: Ngram, lesson: Any) -> None:
    """A token became true behind the row's text."""
    lesson.weights[0], lesson.tokens[0] = 1.0, token
    for order in range(MAX_ORDER):
        lesson.contexts[0, order] = token_back(row, order)
    _observe(caches, lesson.contexts[0], np.int64(1), np.int64(COMMITTED), ngram, lesson)
