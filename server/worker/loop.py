"""One step: plan, draft, verify, commit, update. The only code that knows their order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Protocol

import msgspec
import numpy as np

from drafters.base import RowContext
from server.messages import Abort, Outcome, RequestError, StepStats, Submit
from server.worker.apart import is_device_lost, run_apart
from server.worker.constraint import RowConstraint
from server.worker.constraint_step import guide_trees, masks_of
from server.worker.grammars import Grammars
from server.worker.scheduler import Scheduler
from server.worker.sequence import Sequence
from server.worker.speculator import Speculator
from server.worker.stats import DraftCounts, Times, count_drafts, step_stats
from verifier.plan import StepPlan, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

_LONG_S = 5.0
"""A step that may take longer is announced, so that nobody takes its silence for a hang: one with a long prompt, on a
slow machine."""

_SLACK = 2.0
"""How many times as long as it should a step may take: long contexts cost more than what was measured at start."""

_SIZES_EVERY = 256
"""Steps after which drafters are asked for their sizes."""

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """What the loop needs of a verifier."""

    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        """One packed pass of the target model and the walk."""


class Loop:
    """Runs requests step by step; knows nothing of processes and sockets.

    Owns the scheduler, the speculator and the errors that wait to be told.
    """

    def __init__(self, verifier: Judge, scheduler: Scheduler, speculator: Speculator, vocab_size: int) -> None:
        self._verifier = verifier
        self._vocab_size = vocab_size
        self._errors: list[RequestError] = []
        self._is_changed = False
        self._logged: set[str] = set()
        self._num_steps = 0
        self._sizes: dict[str, dict[str, int]] = {}  # of the drafters, as they were told last
        self._ended: float | None = None  # when the last step did, if there was more to do
        self.scheduler = scheduler
        self.speculator = speculator
        self.drafting = speculator.drafting
        self.grammars = Grammars(vocab_size)
        self.announce: Callable[[float], None] = lambda seconds: None
        """Told how many seconds the step that begins may take, if these are many."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to run or to tell."""
        return self.scheduler.has_work or self._is_changed or self.grammars.has_ready

    def handle(self, message: Submit | Abort) -> None:
        """Take a message; its consequences come with the next `step`."""
        self._is_changed = True
        roster = self.scheduler.roster
        if isinstance(message, Abort):
            if not self.grammars.drop(message.id):
                roster.abort(message.id)
            self._stop_vacated()
            return
        error = self._refuse(message)
        if error is not None:
            self._errors.append(error)
        elif message.constraint is None:
            self._enqueue(message, None)
        elif (constraint := self.grammars.find(message)) is not None:
            self._enqueue(message, constraint)
        else:
            self.grammars.begin(message)

    def _enqueue(self, submit: Submit, constraint: RowConstraint | None) -> None:
        error = self.scheduler.roster.submit(submit, constraint)
        if error is not None:
            self._errors.append(error)

    def _take_grammars(self) -> None:
        """Queue the requests whose grammars are compiled."""
        for submit, found in self.grammars.take():
            if isinstance(found, RequestError):
                self._errors.append(found)
            else:
                self._enqueue(submit, found)

    def step(self) -> Outcome:
        """Run one step, if there is anything to run, and say what happened."""
        began = perf_counter()
        self._is_changed = False
        self._take_grammars()
        plan = self.scheduler.plan(self.speculator.choose)
        self._stop_vacated()
        if plan is None:
            self._ended = None
            return self._outcome(Outcome((), (), step_stats(self.scheduler.roster, None, DraftCounts(), 0, Times())))
        self._announce(plan)
        self._start_rows(plan)
        planned = perf_counter()
        roster, speculator = self.scheduler.roster, self.speculator
        roots = [roster.sequence(slot.row).tokens[-1] for slot in plan.trees]
        trees = speculator.draft(plan, roots, lambda trees: guide_trees(plan, trees, roster))
        sizes = np.diff(trees.row_starts[: trees.num_rows + 1]).tolist()
        drafted = perf_counter()
        verdict, reasons = self._verify(plan, trees)
        verified = perf_counter()
        committed = self.scheduler.commit(plan, verdict, sizes, reasons, trees)
        speculator.update(plan, verdict, committed.kept)
        paid = (0.0, 0.0) if reasons else self._observe(plan, sum(committed.kept), began)
        self._stop_vacated()
        num_failures = self._disable_failed()
        counts = count_drafts(trees, sizes, verdict, committed.accepted, speculator.num_bypassed)
        ended = perf_counter()
        self._ended = ended if self.scheduler.has_work else None
        rooms = (planned - began, drafted - planned, verified - drafted, ended - verified, verdict.forward_s)
        stats = step_stats(
            roster,
            plan,
            replace(counts, num_won=sum(committed.kept)),
            num_failures,
            Times(*rooms, self.drafting.spent_s, *paid),
        )
        self._num_steps += 1
        if self._num_steps % _SIZES_EVERY == 0:
            stats = self._with_sizes(stats)
        return self._outcome(Outcome(tuple(committed.deltas), tuple(committed.errors), stats))

    def _verify(self, plan: StepPlan, trees: DraftTrees) -> tuple[Verdict, dict[int, str]]:
        """The verdict, and why rows failed, by row."""
        wanted = self.drafting.wanted(plan)
        masks = masks_of(plan, trees, self.scheduler.roster, self._vocab_size)
        try:
            verdict = self._verifier.run(plan, trees, replace(wanted, masks=masks))
        except Exception as error:
            return self._run_apart(plan, error, wanted.num_candidates)
        return verdict, {row: reason for row in verdict.failed if (reason := self._why_stuck(row))}

    def _why_stuck(self, row: int) -> str:
        """Of a constrained row at which no token could be chosen."""
        constraint = self.scheduler.roster.sequence(row).constraint
        if constraint is None or not constraint.is_dead_end:
            return ""
        fault = f": {constraint.fault}" if constraint.fault else ""
        return f"no token can follow that the grammar and the token limits of this request allow{fault}"

    def _announce(self, plan: StepPlan) -> None:
        """Say so if prompts make the step long."""
        cost = self.speculator.cost
        if not plan.chunks or cost is None:
            return
        num_positions = sum(len(chunk.tokens) for chunk in plan.chunks) + sum(slot.max_nodes for slot in plan.trees)
        seconds = _SLACK * cost.bound_s(num_positions, len(plan.chunks) + len(plan.trees))
        if seconds > _LONG_S:
            self.announce(seconds)

    def _observe(self, plan: StepPlan, num_won: int, began: float) -> tuple[float, float]:
        """What the step took. What passed since the last one belongs to it if there was work all the time.

        Returns what a step without chunks took, and what its tokens would have taken in plain steps, as far as known.
        """
        drafting_s, num_rows, cost = sum(self.drafting.spent_s.values()), len(plan.trees), self.speculator.cost
        decode_s = perf_counter() - (began if self._ended is None else self._ended)
        paid = (0.0, 0.0)
        if cost is not None and not plan.chunks:
            paid = decode_s, num_won / num_rows * cost.step_s(num_rows, num_rows)
        self.speculator.observe(plan, self.drafting.trees.num_nodes, decode_s - drafting_s, drafting_s)
        return paid

    def _with_sizes(self, stats: StepStats) -> StepStats:
        """Add the sizes of the drafters if they have changed."""
        sizes = self.drafting.sizes()
        if sizes == self._sizes:
            return stats
        self._sizes = sizes
        return msgspec.structs.replace(stats, drafter_bytes=sizes)

    def _run_apart(self, plan: StepPlan, error: Exception, num_candidates: int) -> tuple[Verdict, dict[int, str]]:
        """The verdict of a step that raised, and why some of its rows fail: only those that raise when they run alone.

        Were the process to die instead, the request that caused it would be resubmitted and kill the next one too. A
        lost device is different: only a new process can use it again.
        """
        if is_device_lost(error):
            raise error
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error("a step failed, its rows run again one by one (trace logged once per kind)", exc_info=error)
        roster, drafting = self.scheduler.roster, self.drafting

        def run(alone: StepPlan, trees: DraftTrees) -> Verdict:
            masks = masks_of(alone, trees, roster, self._vocab_size)
            return self._verifier.run(alone, trees, Wanted(num_candidates, masks=masks))

        apart = run_apart(run, roster, plan, drafting.trees)
        for row, why in apart.errors.items():
            logger.error("request %s fails alone: %s: %s", roster.sequence(row).id, type(why).__name__, why)
        reasons = {
            row: f"the step that ran this request failed ({type(why).__name__})" for row, why in apart.errors.items()
        }
        return apart.verdict, reasons

    def _outcome(self, outcome: Outcome) -> Outcome:
        """Add the refusals of requests that never ran."""
        if self._errors:
            outcome = msgspec.structs.replace(outcome, errors=(*self._errors, *outcome.errors))
            self._errors = []
        return outcome

    def wake(self) -> None:
        """Drafters draft from the next step on, also for requests that run already."""
        self.drafting.is_asleep = False
        for sequence in self.scheduler.roster.running:
            self._start_drafting(sequence)

    def _start_rows(self, plan: StepPlan) -> None:
        for start in plan.starts:
            self._start_drafting(self.scheduler.roster.sequence(start.row))

    def _start_drafting(self, sequence: Sequence) -> None:
        context = RowContext(
            tenant=sequence.tenant,
            tokens=tuple(sequence.tokens),
            num_prompt=sequence.num_prompt,
            seed=sequence.sampling.seed,
            temperature=sequence.sampling.temperature,
            stop_ids=sequence.sampling.stop_ids,
            prediction=sequence.prediction,
        )
        self.speculator.start(sequence.row, sequence.drafter, context)

    def _stop_vacated(self) -> None:
        for row in self.scheduler.roster.take_vacated():
            self.drafting.stop(row)

    def _disable_failed(self) -> int:
        num_failures, rows = self.drafting.take_failures()
        for row in rows:
            self.scheduler.disable_drafts(row)
        return num_failures

    def _refuse(self, submit: Submit) -> RequestError | None:
        """What would break a step for everybody must not get in."""
        name = submit.speculation.drafter
        if name not in self.drafting.names:
            return RequestError(submit.id, f"drafter {name} is not loaded; there are {', '.join(self.drafting.names)}")
        known = [*submit.prompt, *submit.answer, *submit.prediction]
        if known and (min(known) < 0 or max(known) >= self._vocab_size):
            return RequestError(submit.id, f"token ids must be 0 .. {self._vocab_size - 1}")
        biased = [token for token, _ in submit.sampling.logit_bias]
        named = [*submit.sampling.stop_ids, *biased]
        if named and (min(named) < 0 or max(named) >= self._vocab_size):
            return RequestError(submit.id, f"stop and logit_bias token ids must be 0 .. {self._vocab_size - 1}")
        limits = submit.constraint
        if limits is not None:
            named = [*limits.allowed, *(token for banned in limits.banned for token in banned)]
            if named and (min(named) < 0 or max(named) >= self._vocab_size):
                return RequestError(submit.id, f"allowed and banned token ids must be 0 .. {self._vocab_size - 1}")
        if submit.speculation.max_nodes < 1:
            return RequestError(submit.id, f"max_nodes is {submit.speculation.max_nodes}, at least 1 is needed")
        return None
