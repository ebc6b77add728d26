"""Stage one of `foretoken train-ctc`: fills a store with answers of the target and their hidden states."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from training.answer_store import AnswerStore, Record
from training.answer_writer import AnswerWriter, WrittenAnswer
from training.prompts import AnswerPrompt

_LEAST_ROOM = 8
"""A prompt that leaves room for fewer tokens than this is left out: so short an answer teaches nothing."""


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
    """Why it ended before all answers were written; empty if it did not."""


class StoreFiller:
    """Puts answers into a store, shard by shard. Owns the answers of shards that are not complete."""

    def __init__(self, store: AnswerStore, prompts: Sequence[AnswerPrompt]) -> None:
        self._store, self._prompts = store, prompts
        self._open: dict[int, dict[int, Record | None]] = {}  # by shard, then by number of the answer
        self.stats = WritingStats()

    def fill(self, writer: AnswerWriter, *, budget_s: float, least: int, shows_progress: bool) -> WritingStats:
        """Write answers until all are there, or space is up, or time (if not 0) is and there are `least` of them.

        The time counts from the first answer on: what is compiled before is not the answers' fault. Raises: ShardError
        when a shard cannot be kept.
        """
        plan, stats = self._store.plan, self.stats
        began = time.monotonic()
        known = sum(len(plan.answers(shard)) for shard in self._store.done)
        with tqdm(total=plan.num_answers, initial=known, desc="answers", disable=not shows_progress) as bar:
            for answer in writer.write(self._prompts, self._missing(writer)):
                self._take(answer)
                bar.update()
                stats.seconds = time.monotonic() - began
                if stats.num_answers == 1:
                    began = time.monotonic()
                if self._store.is_full and not self._store.is_complete:
                    stats.end = "the data have reached --max-data-mib"
                elif budget_s and stats.seconds > budget_s and stats.num_answers >= least:
                    stats.end = "the time for answers is up"
                if stats.end:
                    break
        if stats.end and not self._store.is_full:
            for shard in sorted(self._open):  # shorter than planned, but whole
                self._put(shard)
        return stats

    def _missing(self, writer: AnswerWriter) -> Iterator[int]:
        """Numbers of the answers that are neither in the store nor without room."""
        done = {number for shard in self._store.done for number in self._store.plan.answers(shard)}
        for number, prompt in enumerate(self._prompts):
            if number in done:
                continue
            if writer.room(prompt) >= _LEAST_ROOM:
                yield number
            else:
                self.stats.num_too_long += 1
                self._keep(number, None)

    def _take(self, answer: WrittenAnswer) -> None:
        self.stats.num_tokens += len(answer.tokens)
        if answer.error:
            self.stats.num_failed += 1
            self._keep(answer.number, None)
        else:
            self.stats.num_answers += 1
            self._keep(answer.number, self._record(answer))

    def _record(self, answer: WrittenAnswer) -> Record | None:
        """The answer as it is kept: with the end of its prompt, as far as there are states."""
        if answer.states is None:
            return None
        prompt, (first, states) = self._prompts[answer.number], answer.states
        known = np.array([*prompt.tokens, *answer.tokens], np.int32)
        last = min(first + states.shape[0], known.size - 1)  # the state of the very last token predicts nothing known
        begin = max(first, len(prompt.tokens) - self._store.plan.window)
        if last <= begin:
            return None
        return Record(
            tokens=known[begin : last + 1],
            states=states[begin - first : last - first],
            first=begin,
            num_answer=min(len(answer.tokens), last + 1 - len(prompt.tokens)),
            temperature=prompt.temperature,
            document=prompt.document,
        )

    def _keep(self, number: int, record: Record | None) -> None:
        """Remember an answer until its shard is complete."""
        plan = self._store.plan
        shard = number // plan.answers_per_shard
        self._open.setdefault(shard, {})[number] = record
        if len(self._open[shard]) == len(plan.answers(shard)):
            self._put(shard)

    def _put(self, shard: int) -> None:
        records = self._open.pop(shard)
        found = (records[number] for number in sorted(records))
        self._store.put(shard, [record for record in found if record is not None])
