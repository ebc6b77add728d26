"""ADED's draft maker, the arm to beat: a tree search with an exploration bonus (arXiv 2407.12021), its reward mended.

Each iteration walks from the root to a leaf by

    Q(c) / N(c) + (c1 + ln((N(s) + c2 + 1) / c2)) * P(c | s) * sqrt(N(s)) / (1 + N(c)),   unvisited first,

opens the leaf, finishes the path by sampling, and credits every node on the way with 1 + the sum of P along the path.
The published code looks up the probability of a token of the context in place of the token appended, so its reward is
nearly constant; here it is the probability of the token appended. The tree is made of the most visited prefixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from drafters import MASKS, NGRAM
from drafters.base import Int32, Source
from drafters.candidates import offer
from drafters.combine import finish, pool_estimates, powers_of
from drafters.compiled import Index, compiled
from drafters.drafter import TreeDrafter, TreeView
from drafters.ngram.backoff import Ngram, expand
from drafters.ngram.cache import MAX_ORDER
from drafters.ngram.table import mix
from drafters.rows import RECENT, is_stop, token_back
from drafters.tree_search import Memory
from verifier.plan import MAX_TREE_NODES
from verifier.tree import DraftTrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The constants; the defaults are the published ones."""

    c1: float = 32.0
    c2: float = 8.0
    iterations: int = 150
    depth: int = 4
    branch: int = 12
    """Successors of a node that are looked at."""


SEARCH = np.dtype(
    [("c1", np.float64), ("c2", np.float64), ("iterations", np.int64), ("depth", np.int64), ("branch", np.int64)]
)
NODE = np.dtype(
    [
        ("token", np.int64),
        ("parent", np.int64),
        ("first", np.int64),  # of its children, -1 while it is closed
        ("count", np.int64),
        ("level", np.int64),
        ("visits", np.int64),
        ("place", np.int64),  # in the tree that is handed in, -1 for none
        ("prior", np.float64),
        ("score", np.float64),
        ("total", np.float64),
    ]
)


@compiled
def _load_context(node: Index, record: Any, nodes: Any, found: Any) -> None:
    """The context of a node, last token first: its path, then the row's text."""
    order = 0
    while order < MAX_ORDER and nodes[node].parent >= 0:
        found.contexts[0, order] = nodes[node].token
        node = nodes[node].parent
        order += 1
    for back in range(MAX_ORDER - order):
        found.contexts[0, order + back] = token_back(record, back)


@compiled
def _expand(row: Index, level: Index, memory: Memory, ngram: Ngram) -> None:
    """Candidates and chances of the context that is loaded, at place 0."""
    record, found = memory.rows[row], memory.found[0]
    found.sizes[0] = 0
    expand(np.int64(0), (row, record.tenant_cache), 0.0, ngram, found, memory.marks)
    for index in range(found.sizes[0]):
        found.cells[0, index] = NGRAM
        memory.marks[found.tokens[0, index]] = -1
    pool_estimates(
        np.int64(0), powers_of(record, NGRAM, level, -1.0), 4.0 if record.temperature == 0.0 else 16.0, True, found
    )
    finish(np.int64(0), level, NGRAM, 0.0, record, memory.worth, found)


@compiled
def _open_leaf(node: Index, size: Any, row: Index, nodes: Any, search: Any, memory: Memory, ngram: Ngram) -> Index:
    """Append the best successors of `node`, most probable first. Returns the new number of nodes."""
    found = memory.found[0]
    _load_context(node, memory.rows[row], nodes, found)
    _expand(row, nodes[node].level, memory, ngram)
    nodes[node].first = size
    for _ in range(search.branch):
        offer(np.int64(0), 1.0, found)
        choice = found.choices[0]
        if choice < 0 or size >= nodes.size:
            break
        child = nodes[size]
        child.token, child.parent, child.first, child.count = found.tokens[0, choice], node, -1, 0
        child.level, child.visits, child.total = nodes[node].level + 1, 0, 0.0
        child.prior = found.chances[0, choice]
        child.score = nodes[node].score * child.prior
        found.ranks[0, choice] = 0.0
        nodes[node].count += 1
        size += 1
    return size


@compiled
def _pick(node: Index, nodes: Any, search: Any) -> Index:
    """The child that the bonus favours."""
    first, seen = nodes[node].first, np.float64(nodes[node].visits)
    bonus = (search.c1 + math.log((seen + search.c2 + 1.0) / search.c2)) * math.sqrt(seen)
    best, highest = first, -1.0
    for child in range(first, first + nodes[node].count):
        visits = nodes[child].visits
        if visits == 0:
            return child
        value = nodes[child].total / visits + bonus * nodes[child].prior / (1.0 + visits)
        if value > highest:
            best, highest = child, value
    return best


@compiled
def _finish_path(node: Index, row: Index, random: Any, nodes: Any, search: Any, memory: Memory, ngram: Ngram) -> float:
    """Sample on from `node` to full depth. Returns the sum of the probabilities of the tokens appended."""
    record, found, gained = memory.rows[row], memory.found[0], 0.0
    _load_context(node, record, nodes, found)
    for level in range(nodes[node].level, search.depth):
        _expand(row, np.int64(level), memory, ngram)
        total = 0.0
        for index in range(found.sizes[0]):
            total += found.chances[0, index]
        if total <= 0.0:
            break
        random = mix(random + np.uint64(0x9E3779B97F4A7C15))
        rest = np.float64(random >> np.uint64(11)) * 2.0**-53 * total
        choice = 0
        while choice < found.sizes[0] - 1 and rest >= found.chances[0, choice]:
            rest -= found.chances[0, choice]
            choice += 1
        gained += found.chances[0, choice]
        token = found.tokens[0, choice]
        if is_stop(record, token):
            break
        for order in range(MAX_ORDER - 1, 0, -1):
            found.contexts[0, order] = found.contexts[0, order - 1]
        found.contexts[0, 0] = token
    return gained


@compiled
def explore(row: Index, held_nodes: Any, held_search: Any, held_memory: Any, held_ngram: Any) -> Index:
    """Run all iterations of one row. Returns the number of nodes."""
    memory, ngram, search, nodes = Memory(*held_memory), Ngram(*held_ngram), held_search[0], held_nodes
    record, root = memory.rows[row], nodes[0]
    root.parent = root.first = -1
    root.count = root.level = root.visits = 0
    root.prior, root.score, root.total = 1.0, 1.0, 0.0
    size: Index = np.int64(1)
    random = mix(record.seed + np.uint64(record.length))
    for _ in range(search.iterations):
        node, reward = np.int64(0), 1.0
        while nodes[node].count > 0:
            node = _pick(node, nodes, search)
            reward += nodes[node].prior
        is_last = node > 0 and is_stop(record, nodes[node].token)
        if nodes[node].level < search.depth and not is_last:
            # A node is opened on its second visit (the root on its first), so that most leaves cost one path only.
            if nodes[node].first < 0 and (nodes[node].visits > 0 or node == 0):
                size = _open_leaf(node, size, row, nodes, search, memory, ngram)
            random = mix(random + np.uint64(1))
            reward += _finish_path(node, row, random, nodes, search, memory, ngram)
        while node >= 0:
            nodes[node].visits += 1
            nodes[node].total += reward
            node = nodes[node].parent
    return size


class MctsDrafter(TreeView):
    """The n-gram of a TreeDrafter, its trees made by the published search. Owns the nodes it looks at."""

    def __init__(self, drafter: TreeDrafter, constants: Published | None = None) -> None:
        super().__init__(drafter, MASKS["trigram"])
        constants = constants or Published()
        self.max_depth = constants.depth
        self._search = np.zeros(1, SEARCH)
        for name in SEARCH.names or ():
            self._search[name] = getattr(constants, name)
        self._nodes = np.zeros(1 + (constants.iterations + 1) * constants.branch, NODE)

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row. It teaches the calibration nothing."""
        drafter = self.drafter
        for row, most in zip(rows.tolist(), max_nodes.tolist(), strict=True):
            record = drafter.memory.rows[row]
            root = int(record["recent"][(record["length"] - 1) % RECENT])
            if most == 1:
                out.append_root(root)
                continue
            memory, ngram = tuple(drafter.memory), tuple(drafter.ngram.arrays)
            size = explore(row, self._nodes, self._search, memory, ngram)
            self._keep_most_visited(root, self._nodes[:size], min(most, MAX_TREE_NODES), out)

    def _keep_most_visited(self, root: int, nodes: Any, most: int, out: DraftTrees) -> None:
        """The tree: the most visited nodes whose parent is in it."""
        visited = sorted(range(1, nodes.size), key=lambda node: (-nodes["visits"][node], -nodes["score"][node], node))
        places, tokens, parents, scores = {0: 0}, [root], [-1], [1.0]
        while len(tokens) < most:
            fitting = (node for node in visited if node not in places and int(nodes["parent"][node]) in places)
            best = next(fitting, None)
            if best is None:
                break
            places[best] = len(tokens)
            tokens.append(int(nodes["token"][best]))
            parents.append(places[int(nodes["parent"][best])])
            scores.append(float(nodes["score"][best]))
        out.append(tokens, parents, scores, [int(Source.ROOT), *[int(Source.TRIGRAM)] * (len(tokens) - 1)])
