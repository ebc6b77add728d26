"""Stage one of `foretoken train-ctc`: the target writes its own answers, and their hidden states go to the shelf."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from drafters.base import Drafter
from server.messages import Delta, Speculation, Submit
from server.worker.drafting import Drafting
from server.worker.loop import Loop
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from server.worker.speculator import Speculator
from training.own_prompts import Ask
from training.recorder import RecordingDrafter
from training.shards import Record, Shelf
from verifier.plan import SamplingParams
from verifier.runner import Verifier

_DRAFTER = "recorder"
_TENANT = "train-ctc"
_MAX_NODES = 8
_LEAST_ROOM = 8
"""A prompt that leaves less room for an answer is not asked."""


@dataclass(slots=True)
class Tally:
    """What stage one came to. Owns its counts."""

    num_answers: int = 0
    num_tokens: int = 0
    num_failed: int = 0
    num_too_long: int = 0
    """Prompts that leave no room for an answer in the model's context."""
    seconds: float = 0.0
    end: str = ""
    """Why it ended before all was asked; empty if it did not."""


class OwnAnswers:
    """Asks for all answers that the shelf lacks, several dialogues side by side.

    The turns of a dialogue follow each other, so that the prefix cache knows the beginning of each. Owns the loop that
    runs the target, the recorder, and the answers of shards that are not complete.
    """

    def __init__(
        self, verifier: Verifier, inner: Drafter, shelf: Shelf, asks: Sequence[Ask], stop_ids: tuple[int, ...]
    ) -> None:
        """`inner` makes the guesses while states are recorded."""
        self._recorder = RecordingDrafter(inner, shelf.plan.window)
        self._loop = _loop(verifier, self._recorder)
        self._shelf, self._asks, self._stop_ids = shelf, asks, stop_ids
        self._queue = deque(_dialogues(asks, shelf))
        self._turns: list[deque[int]] = [deque() for _ in range(verifier.geometry.max_rows)]
        self._stream_of: dict[int, int] = {}  # by answer under way
        self._tokens: dict[int, list[int]] = {}
        self._open: dict[int, dict[int, Record | None]] = {}  # records by shard, then answer
        self.tally = Tally()

    def run(self, *, budget_s: float, least: int, shows_progress: bool) -> Tally:
        """Write answers until all are there, or space is up, or time (if not 0) is and there are `least` of them.

        The time counts from the first answer on: what is compiled before it is not its fault. Raises: ShardError when a
        shard cannot be kept.
        """
        began = time.monotonic()
        plan, tally = self._shelf.plan, self.tally
        known = sum(len(plan.answers(shard)) for shard in self._shelf.done)
        with tqdm(total=plan.num_answers, initial=known, desc="answers", disable=not shows_progress) as bar:
            for stream in range(len(self._turns)):
                self._feed(stream)
            while self._loop.has_work and not tally.end:
                outcome = self._loop.step()
                for error in outcome.errors:
                    tally.num_failed += 1
                    self._finish(int(error.id), None)
                    bar.update()
                for delta in outcome.deltas:
                    bar.update(self._hear(delta))
                tally.seconds = time.monotonic() - began
                if not tally.num_answers:
                    began = time.monotonic()
                if budget_s and tally.seconds > budget_s and tally.num_answers >= least:
                    tally.end = "the time for answers is up"
        if tally.end and not self._shelf.is_full:
            for shard in sorted(self._open):  # shorter than planned, but whole
                self._put(shard)
        return tally

    def _feed(self, stream: int) -> None:
        """Ask the next question of a stream's dialogue, or of the next dialogue."""
        turns = self._turns[stream]
        while turns or self._queue:
            if not turns:
                turns.extend(self._queue.popleft())
            number = turns.popleft()
            ask = self._asks[number]
            room = self._loop.scheduler.limits.context_len - len(ask.prompt)
            if room >= _LEAST_ROOM:
                sampling = SamplingParams(
                    max_tokens=min(room, self._shelf.plan.max_tokens),
                    seed=number,
                    temperature=ask.temperature,
                    stop_ids=self._stop_ids,
                )
                self._stream_of[number] = stream
                self._tokens[number] = []
                self._loop.handle(Submit(str(number), ask.prompt, sampling, Speculation(_DRAFTER, _MAX_NODES), _TENANT))
                return
            self.tally.num_too_long += 1
            self._keep(number, None)

    def _hear(self, delta: Delta) -> int:
        """Take an answer's next tokens. Returns how many answers ended: 0 or 1."""
        number = int(delta.id)
        self._tokens[number] += delta.tokens
        self.tally.num_tokens += len(delta.tokens)
        if delta.finish_reason is None:
            return 0
        self.tally.num_answers += 1
        self._finish(number, self._record(number))
        return 1

    def _record(self, number: int) -> Record | None:
        """The answer as it is kept: with the end of its prompt, as far as there are states."""
        taken = self._recorder.take(number)
        if taken is None:
            return None
        ask, answer, plan = self._asks[number], self._tokens[number], self._shelf.plan
        first, states = taken
        known = np.array([*ask.prompt, *answer], np.int32)
        last = min(first + states.shape[0], known.size - 1)  # the state of the very last token predicts nothing known
        begin = max(first, len(ask.prompt) - plan.window)
        if last <= begin:
            return None
        return Record(
            tokens=known[begin : last + 1],
            states=states[begin - first : last - first],
            first=begin,
            num_answer=min(len(answer), last + 1 - len(ask.prompt)),
            temperature=ask.temperature,
            document=ask.document,
        )

    def _finish(self, number: int, record: Record | None) -> None:
        stream = self._stream_of.pop(number)
        self._tokens.pop(number)
        self._recorder.take(number)
        self._keep(number, record)
        if not self.tally.end:
            self._feed(stream)

    def _keep(self, number: int, record: Record | None) -> None:
        """Remember an answer until its shard is complete."""
        plan = self._shelf.plan
        shard = number // plan.answers_per_shard
        self._open.setdefault(shard, {})[number] = record
        if len(self._open[shard]) == len(plan.answers(shard)):
            self._put(shard)
            if self._shelf.is_full and not self.tally.end:
                self.tally.end = "the data have reached --max-data-mib"

    def _put(self, shard: int) -> None:
        records = self._open.pop(shard)
        found = (records[number] for number in sorted(records))
        self._shelf.put(shard, [record for record in found if record is not None])


def _loop(verifier: Verifier, recorder: RecordingDrafter) -> Loop:
    geometry = verifier.geometry
    limits = Limits(
        max_rows=geometry.max_rows,
        max_batched_tokens=geometry.max_positions,
        max_model_len=geometry.max_model_len,
        num_pages=geometry.num_pages,
        page_size=geometry.page_size,
    )
    drafting = Drafting({_DRAFTER: recorder}, max_rows=geometry.max_rows, vocab_size=geometry.vocab_size)
    return Loop(verifier, Scheduler(limits), Speculator(drafting, geometry.max_rows), geometry.vocab_size)


def _dialogues(asks: Sequence[Ask], shelf: Shelf) -> Iterator[list[int]]:
    """Numbers of the answers that are not on the shelf, dialogue by dialogue."""
    done = {number for shard in shelf.done for number in shelf.plan.answers(shard)}
    numbers: list[int] = []
    for number, ask in enumerate(asks):
        if numbers and asks[numbers[-1]].document != ask.document:
            yield numbers
            numbers = []
        if number not in done:
            numbers.append(number)
    if numbers:
        yield numbers
