"""A toy target model with strict bookkeeping, and a drafter that guesses at random.

The toy's next token is a pure function of (seed, tokens so far), so every test can say what the text must be. Its K/V
memory holds, per slot, a hash of all tokens up to that position: a wrong page, a stale page, a missed move or a
shared page that was written again shows up as a wrong hash the next time it is read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from drafters.base import Drafter, Int32, Int64, News, RowContext, Source
from server.messages import Speculation, Submit
from server.worker.drafting import Drafting, Effort
from server.worker.loop import Loop
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from server.worker.speculator import Speculator
from server.worker.step_cost import Profile, StepCost, StepSample
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees, walk
from verifier.verdict import Hidden, TokenLogprobs, Verdict

_EMPTY = 17  # hash of no tokens; memory starts at 0


def extend_hash(value: int, token: int) -> int:
    """Hash of a prefix with one more token."""
    return ((value ^ (token + 0x9E3779B9)) * 6364136223846793005 + 1442695040888963407) % (1 << 62)


def prefix_hashes(tokens: Iterable[int], value: int = _EMPTY) -> list[int]:
    """Entry i: hash of the tokens up to and including i, going on from `value`."""
    hashes = []
    for token in tokens:
        value = extend_hash(value, token)
        hashes.append(value)
    return hashes


def next_token(sampling: SamplingParams, value: int, num_answer: int, vocab_size: int) -> int:
    """What the toy says after a prefix of hash `value`, with `num_answer` answer tokens in it."""
    token = extend_hash(value, sampling.seed) // 7 % vocab_size
    while num_answer < sampling.min_tokens and token in sampling.stop_ids:
        token = (token + 1) % vocab_size
    return token


def plain_answer(submit: Submit, vocab_size: int, context_len: int) -> tuple[list[int], str]:
    """The answer without any machinery, stop token included, and why it ends."""
    value = prefix_hashes(submit.prompt)[-1]
    answer: list[int] = []
    while True:
        token = next_token(submit.sampling, value, len(answer), vocab_size)
        value = extend_hash(value, token)
        answer.append(token)
        if token in submit.sampling.stop_ids:
            return answer, "stop"
        if len(answer) == submit.sampling.max_tokens or len(submit.prompt) + len(answer) == context_len:
            return answer, "length"


@dataclass
class FakeGeometry:
    max_model_len: int = 256
    vocab_size: int = 50
    num_pages: int = 64
    page_size: int = 4
    max_rows: int = 8
    max_positions: int = 128
    device: str = "toy"
    dtype: str = "none"


@dataclass
class _Row:
    tokens: list[int]
    hashes: list[int]
    num_prompt: int
    sampling: SamplingParams


@dataclass
class FakeVerifier:
    """The toy target. Owns its memory, page table and rows; asserts the contract of StepPlan and DraftTrees."""

    geometry: FakeGeometry = field(default_factory=FakeGeometry)
    poison: int | None = None
    """A row with this token in it has numbers that are not finite."""

    def __post_init__(self) -> None:
        g = self.geometry
        self.memory = np.zeros(g.num_pages * g.page_size, np.int64)
        self.table = np.full((g.max_rows, -(-g.max_model_len // g.page_size)), -1, np.int64)
        self.rows: dict[int, _Row] = {}
        self.num_steps = 0

    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        self.num_steps += 1
        self._apply(plan)
        trees.check([slot.max_nodes for slot in plan.trees])
        assert trees.num_rows == len(plan.trees)
        num_positions = trees.num_nodes + sum(len(chunk.tokens) for chunk in plan.chunks)
        assert 1 <= num_positions <= self.geometry.max_positions, num_positions
        seen = [slot.row for slot in plan.trees] + [chunk.row for chunk in plan.chunks]
        assert len(set(seen)) == len(seen), f"a row runs twice: {seen}"
        node_hashes = [self._write_tree(slot, trees, index) for index, slot in enumerate(plan.trees)]
        for chunk in plan.chunks:
            self._write_chunk(chunk)
        hidden = self._hidden(plan, node_hashes, wanted.hidden_tail)
        written = [s for i, slot in enumerate(plan.trees) for s in self._slots(slot, len(node_hashes[i]))]
        written += [s for chunk in plan.chunks for s in self._slots(chunk, len(chunk.tokens))]
        assert len(set(written)) == len(written), "two rows write one slot"
        won, accepted = [], []
        for index, slot in enumerate(plan.trees):
            tokens, nodes = self._walk_tree(slot, trees, index, node_hashes[index])
            won.append(tokens)
            accepted.append(nodes)
        last = [chunk for chunk in plan.chunks if chunk.is_last]
        for chunk in last:
            row = self.rows[chunk.row]
            won.append([self._choose(row, row.hashes[-1], len(row.tokens))])
            accepted.append([])
        rows = [slot.row for slot in plan.trees] + [chunk.row for chunk in last]
        candidates = self._candidates(plan, trees, node_hashes, wanted.num_candidates)
        return replace(self._verdict(rows, won, accepted, candidates), hidden=hidden)

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.stops:
            self.rows.pop(row, None)  # a plan that raised may be told again in part
            self.table[row] = -1
        for start in plan.starts:
            assert start.row not in self.rows, f"row {start.row} is taken"
            self.rows[start.row] = self._row(start)
        for row, index, page in plan.pages:
            assert row in self.rows, f"a page for the empty row {row}"
            assert 1 <= page < self.geometry.num_pages, f"page {page}"
            self.table[row, index] = page

    def _row(self, start: RowStart) -> _Row:
        return _Row(list(start.tokens), prefix_hashes(start.tokens), start.num_prompt, start.sampling)

    def _slot(self, row: int, position: int) -> int:
        size = self.geometry.page_size
        page = int(self.table[row, position // size])
        assert page > 0, f"row {row} has no page for position {position}"
        return page * size + position % size

    def _slots(self, what: TreeSlot | Chunk, count: int) -> list[int]:
        return [self._slot(what.row, what.num_cached + index) for index in range(count)]

    def _check_prefix(self, row: int, num_cached: int) -> None:
        found = [int(self.memory[self._slot(row, position)]) for position in range(num_cached)]
        assert found == self.rows[row].hashes[:num_cached], f"row {row}: K/V of other tokens"

    def _write_tree(self, slot: TreeSlot, trees: DraftTrees, index: int) -> list[int]:
        row = self.rows[slot.row]
        assert slot.num_cached == len(row.tokens) - 1, f"{slot.num_cached} cached of {len(row.tokens)}"
        nodes = trees.span(index)
        tokens, parents = trees.tokens[nodes].tolist(), trees.parents[nodes].tolist()
        assert tokens[0] == row.tokens[-1], "the root is not the last token"
        self._check_prefix(slot.row, slot.num_cached)
        hashes = [row.hashes[-1]]
        for node in range(1, len(tokens)):
            hashes.append(extend_hash(hashes[parents[node]], tokens[node]))
        for node, value in enumerate(hashes):
            self.memory[self._slot(slot.row, slot.num_cached + node)] = value
        return hashes

    def _write_chunk(self, chunk: Chunk) -> None:
        row = self.rows[chunk.row]
        stop = chunk.num_cached + len(chunk.tokens)
        assert list(chunk.tokens) == row.tokens[chunk.num_cached : stop], "not the row's tokens"
        assert chunk.is_last == (stop == len(row.tokens))
        assert chunk.tokens, "an empty chunk"
        self._check_prefix(chunk.row, chunk.num_cached)
        for position in range(chunk.num_cached, stop):
            self.memory[self._slot(chunk.row, position)] = row.hashes[position]

    def _choose(self, row: _Row, value: int, length: int) -> int:
        return next_token(row.sampling, value, length - row.num_prompt, self.geometry.vocab_size)

    def _walk_tree(
        self, slot: TreeSlot, trees: DraftTrees, index: int, hashes: list[int]
    ) -> tuple[list[int], list[int]]:
        row = self.rows[slot.row]
        length = len(row.tokens)
        won, nodes = walk(trees, index, lambda node, path: self._choose(row, hashes[node], length + len(path)))
        for step, node in enumerate(nodes):
            source = self._slot(slot.row, slot.num_cached + node)
            self.memory[self._slot(slot.row, slot.num_cached + 1 + step)] = self.memory[source]
        return won, nodes

    def _candidates(self, plan: StepPlan, trees: DraftTrees, hashes: list[list[int]], count: int) -> np.ndarray | None:
        if count == 0:
            return None
        best = []
        for index, slot in enumerate(plan.trees):
            row = self.rows[slot.row]
            depths = trees.depths[trees.span(index)].tolist()
            best += [self._choose(row, v, len(row.tokens) + d) for v, d in zip(hashes[index], depths, strict=True)]
        return (np.array(best, np.int32)[:, None] + np.arange(count, dtype=np.int32)) % self.geometry.vocab_size

    def _hidden(self, plan: StepPlan, node_hashes: list[list[int]], tail: int) -> Hidden | None:
        """The toy's state at a position is the hash of all tokens up to there; what nobody may look at is -1."""
        if tail == 0:
            return None
        import torch  # the toy worker process starts without it

        states = [value for hashes in node_hashes for value in hashes]
        states += [-1 for chunk in plan.chunks if chunk.is_last]
        chunk_starts = [len(states)]
        for chunk in plan.chunks:
            stop = chunk.num_cached + len(chunk.tokens)
            states += self.rows[chunk.row].hashes[max(chunk.num_cached, stop - tail) : stop]
            chunk_starts.append(len(states))
        return Hidden(torch.tensor(states).reshape(-1, 1), np.array(chunk_starts, np.int32))

    def _verdict(
        self, rows: list[int], won: list[list[int]], accepted: list[list[int]], candidates: np.ndarray | None
    ) -> Verdict:
        depth = max([len(nodes) for nodes in accepted], default=0)
        tokens = np.full((len(rows), depth + 1), -1, np.int64)
        nodes = np.full((len(rows), depth), -1, np.int32)
        logprobs = {}
        for index, row in enumerate(rows):
            tokens[index, : len(won[index])] = won[index]
            nodes[index, : len(accepted[index])] = accepted[index]
            owner = self.rows[row]
            owner.hashes += prefix_hashes(won[index], owner.hashes[-1])
            owner.tokens += won[index]
            if owner.sampling.num_logprobs >= 0:
                top = [
                    tuple((token + k, -float(k)) for k in range(owner.sampling.num_logprobs)) for token in won[index]
                ]
                logprobs[index] = [TokenLogprobs(-token / 8, one) for token, one in zip(won[index], top, strict=True)]
        return Verdict(
            rows=np.array(rows, np.int32),
            tokens=tokens,
            num_accepted=np.array([len(n) for n in accepted], np.int32),
            nodes=nodes,
            failed=tuple(row for row in rows if self.poison is not None and self.poison in self.rows[row].tokens),
            logprobs=logprobs,
            candidates=candidates,
            candidate_logits=None
            if candidates is None
            else -np.arange(candidates.size, dtype=np.float32).reshape(candidates.shape),
        )


class FuzzDrafter(Drafter):
    """Random trees mixed with right tokens, given the toy's function; checks that the news it gets is true.

    Owns the tokens of its rows.
    """

    max_depth = 63
    num_candidates = 2

    def __init__(self, seed: int, vocab_size: int, hit_rate: float = 0.6, fail_rate: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.vocab_size = vocab_size
        self.hit_rate = hit_rate
        self.fail_rate = fail_rate
        self.rows: dict[int, tuple[list[int], RowContext]] = {}
        self.num_verified = 0

    def start(self, row: int, context: RowContext) -> None:
        assert row not in self.rows, f"row {row} started twice"
        self.rows[row] = (list(context.tokens), context)

    def stop(self, row: int) -> None:
        del self.rows[row]

    def update(self, news: News) -> None:
        self._maybe_fail()
        for index, row in enumerate(news.rows.tolist()):
            tokens, context = self.rows[row]
            told = news.tokens[news.starts[index] : news.starts[index + 1]].tolist()
            assert told, "no news of a row"
            if news.verified is not None:
                nodes = news.verified.trees.span(news.verified.first + index)
                assert news.verified.trees.tokens[nodes.start] == tokens[-1]
                assert news.verified.candidates[nodes.start, 0] == told[0]
                self.num_verified += 1
            for token in told:
                assert token == self._oracle(tokens, context), "not what the target says"
                tokens.append(token)

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        for row, limit in zip(rows.tolist(), max_nodes.tolist(), strict=True):
            self._maybe_fail()
            tokens, context = self.rows[row]
            drawn = self._tree(tokens, context, self.rng.randint(1, limit))
            out.append(*drawn)

    def _tree(self, prefix: Sequence[int], context: RowContext, size: int) -> tuple[list[int], ...]:
        paths: list[list[int]] = [[]]
        tokens, parents = [prefix[-1]], [-1]
        edges: set[tuple[int, int]] = set()
        for _ in range(size - 1):
            parent = len(tokens) - 1 if self.rng.random() < 0.6 else self.rng.randrange(len(tokens))
            right = self._oracle([*prefix, *paths[parent]], context)
            token = right if self.rng.random() < self.hit_rate else self.rng.randrange(self.vocab_size)
            if (parent, token) in edges:
                continue
            edges.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            paths.append([*paths[parent], token])
        scores = [1] * len(tokens)
        return tokens, parents, scores, [Source.ROOT] + [Source.OTHER] * (len(tokens) - 1)

    def _oracle(self, tokens: Sequence[int], context: RowContext) -> int:
        sampling = SamplingParams(max_tokens=1, seed=context.seed)
        return next_token(sampling, prefix_hashes(tokens)[-1], 0, self.vocab_size)

    def _maybe_fail(self) -> None:
        if self.rng.random() < self.fail_rate:
            raise RuntimeError("the fuzz drafter was told to fail")


class StatesDrafter(FuzzDrafter):
    """A fuzz drafter that wants hidden states, and checks that it gets those of its rows' own text, all of them."""

    wants_hidden = has_cheap = True

    def __init__(self, seed: int, vocab_size: int, window: int) -> None:
        super().__init__(seed, vocab_size)
        self.num_cheap = 0
        self.hidden_window = window
        self.num_gaps = 0
        self.num_unfinished = 0
        self.num_drafted = 0

    def propose_cheap(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        self.num_cheap += rows.size
        self.propose(rows, max_nodes, out)

    def update(self, news: News) -> None:
        before = {row: len(tokens) for row, (tokens, _) in self.rows.items()}
        super().update(news)
        if news.hidden is None:
            self.num_gaps += 1
            return
        hidden = news.hidden
        assert news.rows.tolist() in ([], hidden.rows.tolist())
        assert hidden.starts[0] == 0
        assert hidden.starts[-1] == len(hidden.states)
        for index, row in enumerate(hidden.rows.tolist()):
            tokens, first = self.rows[row][0], int(hidden.first[index])
            states = hidden.states[hidden.starts[index] : hidden.starts[index + 1], 0].tolist()
            assert states
            assert states == prefix_hashes(tokens)[first : first + len(states)]
            if not news.rows.size:
                assert first + len(states) < before[row], "a prompt that has ended"
                self.num_unfinished += 1
                continue
            assert first + len(states) == len(tokens) - 1, "the last state is not that of the last guessed token"
            if news.verified is not None:
                assert first == before[row] - 1, "not from the root on"
                self.num_drafted += len(states) - 1
            else:
                assert len(states) <= max(1, self.hidden_window)


def submit_of(
    prompt: Sequence[int],
    request_id: str = "r",
    *,
    drafter: str = "none",
    max_nodes: int = 16,
    tenant: str = "",
    answer: Sequence[int] = (),
    max_tokens: int = 16,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
    num_logprobs: int = -1,
) -> Submit:
    """A request with the usual fields."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, stop_ids=stop_ids, num_logprobs=num_logprobs)
    return Submit(request_id, tuple(prompt), sampling, Speculation(drafter, max_nodes), tenant, tuple(answer))


def make_loop(
    geometry: FakeGeometry | None = None,
    drafters: dict[str, Drafter] | None = None,
    *,
    has_prefix_cache: bool = True,
    poison: int | None = None,
    make_speculator: Callable[[Drafting, int], Speculator] = Speculator,
) -> Loop:
    """A loop over the toy target, trees checked."""
    g = geometry or FakeGeometry()
    limits = Limits(
        max_rows=g.max_rows,
        max_batched_tokens=g.max_positions,
        max_model_len=g.max_model_len,
        num_pages=g.num_pages,
        page_size=g.page_size,
        has_prefix_cache=has_prefix_cache,
    )
    drafting = Drafting(drafters or {}, max_rows=g.max_rows, vocab_size=g.vocab_size, is_checked=True)
    speculator = make_speculator(drafting, g.max_rows)
    return Loop(FakeVerifier(g, poison), Scheduler(limits), speculator, g.vocab_size)


def linear_cost(base_s: float, slope_s: float, max_positions: int = 512) -> StepCost:
    """Steps of N positions take base_s + slope_s * N."""
    return StepCost(Profile(tuple(StepSample(size, 1, base_s + slope_s * size) for size in (1, 64))), max_positions)


class FuzzSpeculator(Speculator):
    """Decides at random what is drafted, verified and told. Whatever a speculator decides, the text stays."""

    def __init__(self, drafting: Drafting, max_rows: int, seed: int = 0) -> None:
        super().__init__(drafting, max_rows)
        self.begin(linear_cost(0.001, 0.0001))
        self.rng = random.Random(seed)
        self.num_asleep = self.num_cheap = self.num_cut = 0

    def choose(self, rows: Sequence[int], limits: Sequence[int], num_trees: int, has_prompts: bool) -> list[int]:
        super().choose(rows, limits, num_trees, has_prompts)
        self._size, self._is_paired = 0, self.rng.random() < 0.3
        self.effort = self.rng.choice(list(Effort)[1:])
        self.drafting.hears_states = self.rng.random() < 0.7
        chosen = [self.rng.randint(2, limit) if self.rng.random() < 0.6 else 1 for limit in limits]
        self.num_cheap += self.effort is Effort.CHEAP and any(nodes > 1 for nodes in chosen)
        self.num_asleep += not self.drafting.hears_states
        self.num_bypassed = chosen.count(1)
        return chosen

    def _look(self, plan: StepPlan, trees: DraftTrees, effort: Effort, cost: StepCost) -> tuple[float, Int64, int]:
        rate, order, _ = super()._look(plan, trees, effort, cost)
        count = self.rng.randint(0, order.size)
        self.num_cut += order.size - count
        return rate, order, count
