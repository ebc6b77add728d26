"""Stage one of `foretoken train-ctc`: the target writes its own answers, and their hidden states go to the store."""

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
from training.answer_store import AnswerStore, Record
from training.prompts import AnswerPrompt
from training.recorder import RecordingDrafter
from verifier.plan import SamplingParams
from verifier.runner import Verifier

_DRAFTER = "recorder"
_TENANT = "train-ctc"
_MAX_NODES = 8
_LEAST_ROOM = 8
"""A prompt that leaves less room for an answer is not asked."""


@dataclass(slots=True)
class WritingStats:
    """What stage one came to. Owns its counts."""

    num_answers: int = 0
    num_tokens: int = 0
    num_failed: int = 0
    num_too_long: int = 0
    """Prompts that leave no room for an answer in the model's context."""
    seconds: float = 0.0
    end: str = ""
    """Why it ended before all was asked; empty if it did not."""


class AnswerWriter:
    """Asks for all answers that the store lacks, several dialogues side by side.

    The turns of a dialogue follow each other, so that the prefix cache knows the beginning of each. Owns the loop that
    runs the target, the recorder, and the answers of shards that are not complete.
    """

    def __init__(
        self,
        verifier: Verifier,
        inner: Drafter,
        store: AnswerStore,
        prompts: Sequence[AnswerPrompt],
        stop_ids: tuple[int, ...],
    ) -> None:
        """`inner` makes the guesses while states are recorded."""
        self._recorder = RecordingDrafter(inner, store.plan.window)
        self._loop = _loop(verifier, self._recorder)
        self._store, self._prompts, self._stop_ids = store, prompts, stop_ids
        self._queue = deque(_dialogues(prompts, store))
        self._turns: list[deque[int]] = [deque() for _ in range(verifier.geometry.max_rows)]
        self._stream_of: dict[int, int] = {}  # by answer under way
        self._tokens: dict[int, list[int]] = {}
        self._open: dict[int, dict[int, Record | None]] = {}  # records by shard, then answer
        self.stats = WritingStats()

    def run(self, *, budget_s: float, least: int, shows_progress: bool) -> WritingStats:
        """Write answers until all are there, or space is up, or time (if not 0) is and there are `least` of them.

        The time counts from the first answer on: what is compiled before it is not its fault. Raises: ShardError when a
        shard cannot be kept.
        """
        began = time.monotonic()
        plan, stats = self._store.plan, self.stats
        known = sum(len(plan.answers(shard)) for shard in self._store.done)
        with tqdm(total=plan.num_answers, initial=known, desc="answers", disable=not shows_progress) as bar:
            for stream in range(len(self._turns)):
                self._feed(stream)
            while self._loop.has_work and not stats.end:
                outcome = self._loop.step()
                for error in outcome.errors:
                    stats.num_failed += 1
                    self._finish(int(error.id), None)
                    bar.update()
                for delta in outcome.deltas:
                    bar.update(self._hear(delta))
                stats.seconds = time.monotonic() - began
                if not stats.num_answers:
                    began = time.monotonic()
                if budget_s and stats.seconds > budget_s and stats.num_answers >= least:
                    stats.end = "the time for answers is up"
        if stats.end and not self._store.is_full:
            for shard in sorted(self._open):  # shorter than planned, but whole
                self._put(shard)
        return stats

    def _feed(self, stream: int) -> None:
        """AnswerPrompt the next question of a stream's dialogue, or of the next dialogue."""
        turns = self._turns[stream]
        while turns or self._queue:
            if not turns:
                turns.extend(self._queue.popleft())
            number = turns.popleft()
            prompt = self._prompts[number]
            room = self._loop.scheduler.limits.context_len - len(prompt.tokens)
            if room >= _LEAST_ROOM:
                sampling = SamplingParams(
                    max_tokens=min(room, self._store.plan.max_tokens),
                    seed=number,
                    temperature=prompt.temperature,
                    stop_ids=self._stop_ids,
                )
                self._stream_of[number] = stream
                self._tokens[number] = []
                self._loop.handle(
                    Submit(str(number), prompt.tokens, sampling, Speculation(_DRAFTER, _MAX_NODES), _TENANT)
                )
                return
            self.stats.num_too_long += 1
            self._keep(number, None)

    def _hear(self, delta: Delta) -> int:
        """Take an answer's next tokens. Returns how many answers ended: 0 or 1."""
        number = int(delta.id)
        self._tokens[number] += delta.tokens
        self.stats.num_tokens += len(delta.tokens)
        if delta.finish_reason is None:
            return 0
        self.stats.num_answers += 1
        self._finish(number, self._record(number))
        return 1

    def _record(self, number: int) -> Record | None:
        """The answer as it is kept: with the end of its prompt, as far as there are states."""
        taken = self._recorder.take(number)
        if taken is None:
            return None
        prompt, answer, plan = self._prompts[number], self._tokens[number], self._store.plan
        first, states = taken
        known = np.array([*prompt.tokens, *answer], np.int32)
        last = min(first + states.shape[0], known.size - 1)  # the state of the very last token predicts nothing known
        begin = max(first, len(prompt.tokens) - plan.window)
        if last <= begin:
            return None
        return Record(
            tokens=known[begin : last + 1],
            states=states[begin - first : last - first],
            first=begin,
            num_answer=min(len(answer), last + 1 - len(prompt.tokens)),
            temperature=prompt.temperature,
            document=prompt.document,
        )

    def _finish(self, number: int, record: Record | None) -> None:
        stream = self._stream_of.pop(number)
        self._tokens.pop(number)
        self._recorder.take(number)
        self._keep(number, record)
        if not self.stats.end:
            self._feed(stream)

    def _keep(self, number: int, record: Record | None) -> None:
        """Remember an answer until its shard is complete."""
        plan = self._store.plan
        shard = number // plan.answers_per_shard
        self._open.setdefault(shard, {})[number] = record
        if len(self._open[shard]) == len(plan.answers(shard)):
            self._put(shard)
            if self._store.is_full and not self.stats.end:
                self.stats.end = "the data have reached --max-data-mib"

    def _put(self, shard: int) -> None:
        records = self._open.pop(shard)
        found = (records[number] for number in sorted(records))
        self._store.put(shard, [record for record in found if record is not None])


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
    return Loop(verifier, Scheduler(limits), drafting, geometry.vocab_size)


def _dialogues(prompts: Sequence[AnswerPrompt], store: AnswerStore) -> Iterator[list[int]]:
    """Numbers of the answers that are not on the store, dialogue by dialogue."""
    done = {number for shard in store.done for number in store.plan.answers(shard)}
    numbers: list[int] = []
    for number, prompt in enumerate(prompts):
        if numbers and prompts[numbers[-1]].document != prompt.document:
            yield numbers
            numbers = []
        if number not in done:
            numbers.append(number)
    if numbers:
        yield numbers
