"""Runs requests through the real corridor (scheduler, drafting, verifier), with a drafter that fuzzes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from drafters.base import Drafter, Int32, News, RowContext, Source
from server.messages import Delta, Speculation, Submit
from server.worker.drafting import Drafting
from server.worker.loop import Loop
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from server.worker.speculator import Speculator
from tests.truth import greedy_answer
from verifier.backend import Backend
from verifier.plan import SamplingParams
from verifier.tree import DraftTrees


class AnswerFuzz(Drafter):
    """Random trees, mixed with the tokens of answers it was told beforehand. Owns the tokens of its rows."""

    max_depth = 63

    def __init__(self, seed: int, vocab_size: int, answers: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size
        self._answers = answers
        self._tokens: dict[int, list[int]] = {}
        self._num_prompt: dict[int, int] = {}
        self.num_accepted = 0

    def start(self, row: int, context: RowContext) -> None:
        self._tokens[row] = list(context.tokens)
        self._num_prompt[row] = context.num_prompt

    def update(self, news: News) -> None:
        for index, row in enumerate(news.rows.tolist()):
            won = news.tokens[news.starts[index] : news.starts[index + 1]].tolist()
            self.num_accepted += len(won) - 1
            self._tokens[row] += won

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        for row, most in zip(rows.tolist(), max_nodes.tolist(), strict=True):
            self._append_tree(row, most, out)

    def _append_tree(self, row: int, most: int, out: DraftTrees) -> None:
        known = self._tokens[row]
        prompt = tuple(known[: self._num_prompt[row]])
        future = list(self._answers.get(prompt, []))[len(known) - len(prompt) :]
        tokens, parents, depth_of_right = [known[-1]], [-1], {0: 0}
        for _ in range(int(self._rng.integers(0, most))):
            parent = int(self._rng.integers(0, len(tokens))) if self._rng.random() < 0.5 else len(tokens) - 1
            depth = depth_of_right.get(parent)
            is_right = depth is not None and depth < len(future) and self._rng.random() < 0.7
            token = future[depth] if is_right and depth is not None else int(self._rng.integers(0, self._vocab_size))
            if (parent, token) in set(zip(parents, tokens, strict=True)):
                continue
            if depth is not None and depth < len(future) and token == future[depth]:
                depth_of_right[len(tokens)] = depth + 1
            tokens.append(token)
            parents.append(parent)
        scores = [1.0] + [0.5] * (len(tokens) - 1)
        out.append(tokens, parents, scores, [0] + [int(Source.OTHER)] * (len(tokens) - 1))

    def stop(self, row: int) -> None:
        self._tokens.pop(row, None)


@dataclass
class Run:
    """What a batch of requests came to."""

    answers: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    deltas: dict[str, list[Delta]] = field(default_factory=dict)
    num_preempted: int = 0
    num_prefix_hits: int = 0
    num_steps: int = 0


def make_loop(
    verifier: Backend,
    drafters: Mapping[str, Drafter],
    max_batched_tokens: int = 64,
    make_speculator: Callable[[Drafting, int], Speculator] = Speculator,
) -> Loop:
    geometry = verifier.geometry
    limits = Limits(
        max_rows=geometry.max_rows,
        max_batched_tokens=max_batched_tokens,
        max_model_len=geometry.max_model_len,
        num_pages=geometry.num_pages,
        page_size=geometry.page_size,
    )
    drafting = Drafting(drafters, max_rows=geometry.max_rows, vocab_size=geometry.vocab_size, is_checked=True)
    speculator = make_speculator(drafting, geometry.max_rows)
    return Loop(verifier, Scheduler(limits), speculator, geometry.vocab_size)


def run_all(loop: Loop, submits: Sequence[Submit], arrivals: Sequence[int] | None = None) -> Run:
    """Run every request to its end; request i arrives before step arrivals[i] (all at once by default)."""
    run = Run()
    pending = sorted(zip(arrivals or [0] * len(submits), range(len(submits)), strict=True))
    while pending or loop.has_work:
        while pending and (pending[0][0] <= run.num_steps or not loop.has_work):
            loop.handle(submits[pending.pop(0)[1]])
        outcome = loop.step()
        run.num_steps += 1
        assert not outcome.errors, outcome.errors
        loop.scheduler.roster.check_integrity()
        if outcome.stats is not None:
            run.num_preempted += outcome.stats.num_preempted
            run.num_prefix_hits += outcome.stats.num_prefix_hit_tokens
        for delta in outcome.deltas:
            run.answers.setdefault(delta.id, []).extend(delta.tokens)
            run.deltas.setdefault(delta.id, []).append(delta)
            if delta.finish_reason is not None:
                run.reasons[delta.id] = delta.finish_reason
    loop.step()
    assert loop.scheduler.roster.book.num_free == loop.scheduler.limits.num_pages - 1, "pages leak"
    return run


def submit(
    name: str, prompt: Sequence[int], sampling: SamplingParams, drafter: str = "fuzz", nodes: int = 16
) -> Submit:
    return Submit(name, tuple(prompt), sampling, Speculation(drafter, nodes), "public")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)


@torch.inference_mode()
def generate(
    folder: str, prompts: Sequence[Sequence[int]], num_tokens: int
) -> tuple[list[list[int]], list[list[float]]]:
    """transformers' own greedy answers, one prompt at a time, and the gap between the two best logits at each token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers, gaps = [], []
    for prompt in prompts:
        tokens, logits = greedy_answer(model, prompt, num_tokens)
        answers.append(tokens)
        best = logits.topk(2, dim=-1).values
        gaps.append((best[:, 0] - best[:, 1]).tolist())
    return answers, gaps


def assert_same(
    actual: Sequence[int], expected: Sequence[int], gaps: Sequence[float], name: str, tie: float = 1e-4
) -> None:
    """Equal token for token, unless the target itself was undecided (top-2 gap below `tie`) where they part."""
    for place, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        if mine != theirs:
            assert gaps[place] < tie, f"{name}: token {place} is {mine}, not {theirs}, with a gap of {gaps[place]}"
            return
