"""Which tokens may come next in one answer: a grammar, the only tokens allowed, sequences that are banned.

What may follow is a function of the answer's tokens alone, so a text does not depend on drafts, on what else is in the
batch, or on a worker's death.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from drafters.base import Source
from server.messages import Constraint
from verifier.tree import DraftTrees

Int32 = NDArray[np.int32]

_WORD = 32


def num_words(vocab_size: int) -> int:
    """Words of a mask of one bit per token."""
    return -(-vocab_size // _WORD)


@dataclass(frozen=True, slots=True)
class Rules:
    """What an answer must keep to, and what ends it."""

    constraint: Constraint
    stop_ids: tuple[int, ...]
    vocab_size: int


class RowConstraint:
    """What may follow in one answer. Owns the matcher, which has read the answer so far, and the answer's last tokens.

    A token that ends the answer is never given to the matcher: nothing comes after it.
    """

    def __init__(self, rules: Rules, matcher: LLMatcher | None, answer: Sequence[int]) -> None:
        """`matcher` is at its start, and the constraint's own from now on; `answer` is what was won before."""
        self._rules = rules
        self._matcher = matcher
        self._fresh = None if matcher is None else matcher.deep_copy()  # at the start of the answer
        self._answer: list[int] = []  # what the matcher has read
        self._stops = frozenset(rules.stop_ids)
        self._allowed = _bits_of(rules.constraint.allowed, rules.vocab_size) if rules.constraint.allowed else None
        self._num_tail = max((len(banned) for banned in rules.constraint.banned), default=1) - 1
        self._tail: list[int] = []
        self._forced: list[int] | None = None
        self.is_dead_end = False
        """Whether there was a place of the last tree at which no token may follow."""
        self.advance(answer)

    @property
    def fault(self) -> str:
        """Why nothing can follow any more, if the grammar says so."""
        return self._matcher.get_error() if self._matcher is not None and self._matcher.is_error() else ""

    def advance(self, tokens: Sequence[int]) -> None:
        """The answer goes on with these."""
        self._forced = None
        self._tail = [*self._tail, *tokens][-self._num_tail :] if self._num_tail else []
        if self._matcher is not None:
            self._answer += tokens
            self._matcher.consume_tokens(list(tokens))

    @property
    def num_forced(self) -> int:
        """How many of the next tokens are certain, the one that ends the answer among them."""
        if self._forced is None:
            self._forced = self._next_forced()
        return len(self._forced)

    def _next_forced(self) -> list[int]:
        """The tokens that must come next after what the matcher has read."""
        matcher, rules = self._matcher, self._rules.constraint
        if matcher is None or rules.allowed or rules.banned or matcher.is_error():
            return []
        if matcher.is_stopped():
            return list(self._rules.stop_ids[:1])
        return [int(token) for token in matcher.compute_ff_tokens()]

    # ---- one tree

    def guide(
        self, trees: DraftTrees, index: int, max_nodes: int
    ) -> tuple[list[int], list[int], list[float], list[int]]:
        """Tree `index` without the nodes that may not be, and with those that must: tokens, parents, scores, sources.

        Certain tokens are drafted wherever there is room for them, after the drafted ones that are kept.
        """
        nodes = trees.span(index)
        drafted = _Drafted(
            trees.tokens[nodes].tolist(),
            trees.scores[nodes].tolist(),
            trees.sources[nodes].tolist(),
            _children(trees.parents[nodes].tolist()),
        )
        made = _Made([drafted.tokens[0]], [-1], [drafted.scores[0]], [drafted.sources[0]])
        self._grow(drafted, made, (0, 0, []), max_nodes)
        return made.tokens, made.parents, made.scores, made.sources

    def _grow(self, drafted: _Drafted, made: _Made, at: tuple[int, int | None, list[int]], max_nodes: int) -> None:
        """Add what may follow node `at`: its place in the new tree, in the drafted one, and the tokens on the way."""
        place, node, path = at
        children = [] if node is None else drafted.children[node]
        forced = self._next_forced()[:1]
        if forced:
            same = next((child for child in children if drafted.tokens[child] == forced[0]), None)
            steps: list[tuple[int, int | None]] = [(forced[0], same)]
        else:
            steps = [(drafted.tokens[child], child) for child in children]
        for token, child in steps:
            if len(made.tokens) >= max_nodes:
                return
            is_end = token in self._stops
            if not self._may_follow(path, token) or not (is_end or self._enter(token)):
                continue
            made.tokens.append(token)
            made.parents.append(place)
            made.scores.append(made.scores[place] if forced else drafted.scores[child or 0])
            made.sources.append(Source.GRAMMAR if forced else drafted.sources[child or 0])
            if not is_end:
                self._grow(drafted, made, (len(made.tokens) - 1, child, [*path, token]), max_nodes)
                self._leave(path)

    def fill(self, tokens: Sequence[int], parents: Sequence[int], bits: Int32) -> None:
        """Fill the masks [T, W] of what may follow each node of a tree that `guide` made, or that holds a root only."""
        self._fill((tokens, _children(parents)), (0, []), bits)
        self.is_dead_end = not bits.any(axis=1).all()

    def _fill(self, tree: tuple[Sequence[int], list[list[int]]], at: tuple[int, list[int]], bits: Int32) -> None:
        tokens, children = tree
        node, path = at
        self._write(path, bits[node])
        for child in children[node]:
            token = tokens[child]
            if token in self._stops or not self._enter(token):
                bits[child] = -1  # nothing after it counts
                continue
            self._fill(tree, (child, [*path, token]), bits)
            self._leave(path)

    def _write(self, path: list[int], bits: Int32) -> None:
        """What may follow the answer so far and `path`, as a mask [W]."""
        if self._matcher is None:
            bits[:] = -1
        else:
            bits[:] = 0
            if not self._matcher.is_error():
                found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
                # At a dead end the mask lets the answer end; that this is an error is known only now.
                if not self._matcher.is_error():
                    bits[: found.size] = found[: bits.size]
        if self._allowed is not None:
            bits &= self._allowed
        view = bits.view(np.uint32)
        for token in self._banned_after(path):
            view[token // _WORD] &= np.uint32(~(1 << token % _WORD) & 0xFFFFFFFF)

    def _may_follow(self, path: list[int], token: int) -> bool:
        """Whether the limits on tokens let `token` follow; of a token that ends the answer, also the grammar."""
        allowed = self._rules.constraint.allowed
        if (allowed and token not in allowed) or token in self._banned_after(path):
            return False
        return token not in self._stops or self._matcher is None or self._matcher.is_accepting()

    def _banned_after(self, path: list[int]) -> set[int]:
        """Tokens that would complete a banned sequence."""
        tail = [*self._tail, *path]
        return {
            banned[-1]
            for banned in self._rules.constraint.banned
            if len(banned) == 1 or tuple(tail[1 - len(banned) :]) == banned[:-1]
        }

    def _enter(self, token: int) -> bool:
        """Let the matcher read a token, if it may follow."""
        return self._matcher is None or self._matcher.try_consume_tokens([token]) == 1

    def _leave(self, path: Sequence[int]) -> None:
        """Go back to `path`, of which the matcher has read one token more."""
        if self._matcher is None or self._fresh is None:
            return
        if not self._matcher.is_error():
            self._matcher.rollback(1)
            return
        # It met a dead end, and stays at it: what a draft ran into must not end the answer.
        self._matcher = self._fresh.deep_copy()
        self._matcher.consume_tokens([*self._answer, *path])


@dataclass(frozen=True, slots=True)
class _Drafted:
    """A tree as drafters made it."""

    tokens: list[int]
    scores: list[float]
    sources: list[int]
    children: list[list[int]]


@dataclass(frozen=True, slots=True)
class _Made:
    """A tree under construction, parents first."""

    tokens: list[int]
    parents: list[int]
    scores: list[float]
    sources: list[int]


def _children(parents: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            found[parent].append(node)
    return found


def _bits_of(tokens: Sequence[int], vocab_size: int) -> Int32:
    flags = np.zeros(num_words(vocab_size) * _WORD, np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
