"""One answer after another through the real verifier with any drafter: acceptance length, calibration, the texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drafters.base import Drafter, HiddenStates, News, RowContext, Verified
from server.worker.states import chunk_states, tree_states
from tests.bench.tasks import Task
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees

_KV_GIB = 0.25


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer to be written."""

    prompt: list[int]
    max_nodes: int
    """Most nodes of a tree, root included."""
    temperature: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class Tally:
    """What the steps of some answers came to. Owns its counts; the first token of an answer needs no step."""

    num_steps: int = 0
    num_won: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    score: float = 0.0
    """Sum of what the drafter expected of its nodes."""
    propose_s: float = 0.0
    seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens won per step, the target's own one included."""
        return self.num_won / max(1, self.num_steps)

    @property
    def calibration(self) -> float:
        """Expected over real acceptances: 1 is right, more is boastful."""
        return self.score / max(1, self.num_accepted)

    def summary(self) -> dict[str, float]:
        """Rounded figures for a report."""
        return {
            "acceptance_length": round(self.acceptance_length, 3),
            "mean_score": round(self.score / max(1, self.num_drafted), 4),
            "mean_acceptance": round(self.num_accepted / max(1, self.num_drafted), 4),
            "calibration": round(self.calibration, 2),
            "drafted_per_step": round(self.num_drafted / max(1, self.num_steps), 1),
            "propose_us": round(1e6 * self.propose_s / max(1, self.num_steps), 1),
            "steps": self.num_steps,
            "seconds": round(self.seconds, 1),
        }


class Decoder:
    """Decodes with a drafter, in float32 on one thread. Owns a verifier with one row."""

    def __init__(self, task: Task):
        options = VerifierOptions(
            model=str(task.folder),
            dtype="float32",
            device="cpu",
            threads=1,
            max_rows=1,
            kv_cache_gib=_KV_GIB,
        )
        self._task = task
        self._verifier = load_backend(options)
        self.geometry = self._verifier.geometry
        self.shared_weights = self._verifier.shared_weights
        self._pages = tuple(
            (0, index, index) for index in range(-(-self.geometry.max_model_len // self.geometry.page_size))
        )
        self._trees = DraftTrees.allocate(1)

    def answer(self, ask: Ask, drafter: Drafter, tally: Tally) -> list[int]:
        """One answer, to its stop token or as long as the task allows; adds to `tally`."""
        began = time.perf_counter()
        task, prompt = self._task, ask.prompt
        limit = min(self.geometry.max_model_len - len(prompt), task.max_tokens)
        context = RowContext("bench", tuple(prompt), len(prompt), ask.seed, ask.temperature, (task.stop_id,))
        drafter.start(0, context)
        tokens = self._begin(ask, drafter)
        while len(tokens) < limit and tokens[-1] != task.stop_id:
            room = self.geometry.max_model_len - len(prompt) - len(tokens) + 1
            slot = TreeSlot(0, len(prompt) + len(tokens) - 1, min(ask.max_nodes, room))
            tokens += self._step(slot, drafter, limit - len(tokens), tally)
        drafter.stop(0)
        tally.seconds += time.perf_counter() - began
        return tokens

    def _begin(self, ask: Ask, drafter: Drafter) -> list[int]:
        """Run the prompt; the first token."""
        sampling = SamplingParams(max_tokens=self._task.max_tokens, seed=ask.seed, temperature=ask.temperature)
        start = RowStart(0, tuple(ask.prompt), len(ask.prompt), sampling)
        chunk = Chunk(0, 0, tuple(ask.prompt), True)
        plan = StepPlan(starts=(start,), pages=self._pages, chunks=(chunk,))
        self._trees.clear()
        window = max(1, drafter.hidden_window)
        wanted = Wanted(hidden_tail=window if drafter.wants_hidden else 0)
        verdict = self._verifier.run(plan, self._trees, wanted)
        tokens = [int(verdict.tokens[0, 0])]
        hidden = None
        if drafter.wants_hidden:
            assert verdict.hidden is not None, "the verifier gave no hidden states of a prompt"
            hidden = chunk_states(verdict.hidden, plan.chunks, [0], window)
        _tell(drafter, tokens, None, hidden)
        return tokens

    def _step(self, slot: TreeSlot, drafter: Drafter, left: int, tally: Tally) -> list[int]:
        """One tree; the tokens it won, at most `left`, none behind a stop token."""
        trees, stop_id = self._trees, self._task.stop_id
        trees.clear()
        began = time.perf_counter()
        drafter.propose(np.array([0], np.int32), np.array([slot.max_nodes], np.int32), trees)
        tally.propose_s += time.perf_counter() - began
        plan = StepPlan(trees=(slot,))
        verdict = self._verifier.run(plan, trees, Wanted(drafter.num_candidates, int(drafter.wants_hidden)))
        won: list[int] = verdict.tokens[0, : verdict.num_accepted[0] + 1].tolist()[:left]
        if stop_id in won:
            won = won[: won.index(stop_id) + 1]
        tally.num_steps += 1
        tally.num_won += len(won)
        tally.num_drafted += trees.num_nodes - 1
        tally.score += float(trees.scores[1 : trees.num_nodes].sum())
        tally.num_accepted += len(won) - 1
        shown = hidden = None
        if verdict.candidates is not None and verdict.candidate_logits is not None:
            shown = Verified(trees, 0, verdict.candidates, verdict.candidate_logits)
        if drafter.wants_hidden:
            hidden = tree_states(verdict, trees, plan.trees, 0, np.array([len(won)], np.int32))
        _tell(drafter, won, shown, hidden)
        return won


def _tell(drafter: Drafter, tokens: list[int], verified: Verified | None, hidden: HiddenStates | None) -> None:
    starts = np.array([0, len(tokens)], np.int32)
    drafter.update(News(np.array([0], np.int32), starts, np.array(tokens, np.int64), verified, hidden))


def decode_all(
    decoder: Decoder, prompts: Sequence[list[int]], drafter: Drafter, max_nodes: int, temperature: float = 0.0
) -> tuple[Tally, list[list[int]]]:
    """Every prompt in turn, as one tenant's requests; prompt i has seed i. Returns: the tally and the answers."""
    tally = Tally()
    answers = [
        decoder.answer(Ask(prompt, max_nodes, temperature, seed), drafter, tally) for seed, prompt in enumerate(prompts)
    ]
    return tally, answers
