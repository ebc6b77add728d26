"""Stage one of `foretoken train-ctc`: fills a store with answers of the target and their hidden states."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from training.answer_store import AnswerStore, Record
from training.answer_writer import AnswerWriter, WrittenAnswer
from training.prompts import AnswerPrompt


@dataclass(slots=True)
class WritingStats:
    """What stage one came to. Owns its counts."""

    num_answers: int = 0
    num_tokens: int = 0
    num_left_out: int = 0
    """Prompts that are too long for the model's context, and those whose answer failed."""
    seconds: float = 0.0


def fill_store(
    store: AnswerStore, prompts: Sequence[AnswerPrompt], writer: AnswerWriter, *, shows_progress: bool
) -> WritingStats:
    """Write the answers that a store lacks, shard by shard. Raises: StartupError when a shard cannot be kept."""
    plan, stats, began = store.plan, WritingStats(), time.monotonic()
    missing = [
        number for shard in range(plan.num_shards) if shard not in store.shards for number in plan.answers(shard)
    ]
    asked = [number for number in missing if writer.has_room(prompts[number])]
    stats.num_left_out = len(missing) - len(asked)
    waiting = {number // plan.answers_per_shard: set[int]() for number in missing}  # numbers under way, by shard
    for number in asked:
        waiting[number // plan.answers_per_shard].add(number)
    written: dict[int, Record] = {}  # answers of shards that are not whole yet
    for shard in [shard for shard, numbers in waiting.items() if not numbers]:
        store.put(shard, [])  # nothing in it can be asked
    known = plan.num_answers - len(missing)
    with tqdm(total=plan.num_answers, initial=known, desc="answers", disable=not shows_progress) as bar:
        for answer in writer.write(prompts, asked):
            bar.update()
            stats.num_tokens += len(answer.tokens)
            stats.num_left_out += bool(answer.error)
            stats.num_answers += not answer.error
            if record := _record(answer, prompts[answer.number], plan.window):
                written[answer.number] = record
            shard = answer.number // plan.answers_per_shard
            waiting[shard].remove(answer.number)
            if not waiting[shard]:
                found = [written.pop(number, None) for number in plan.answers(shard)]
                store.put(shard, [record for record in found if record is not None])
    stats.seconds = time.monotonic() - began
    return stats


def _record(answer: WrittenAnswer, prompt: AnswerPrompt, window: int) -> Record | None:
    """The answer as it is kept: with the end of its prompt, as far as there are states."""
    if answer.error or answer.states is None:
        return None
    first, states = answer.states
    known = np.array([*prompt.tokens, *answer.tokens], np.int32)
    last = min(first + states.shape[0], known.size - 1)  # the state of the very last token predicts nothing known
    begin = max(first, len(prompt.tokens) - window)
    if last <= begin:
        return None
    return Record(
        tokens=known[begin : last + 1],
        states=states[begin - first : last - first],
        first=begin,
        num_answer=min(last - begin, last + 1 - len(prompt.tokens)),
        temperature=prompt.temperature,
        document=prompt.document,
    )
