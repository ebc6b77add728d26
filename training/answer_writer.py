"""Answers that the target writes by itself: what a head is trained on, and a table counted from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from drafters.base import Drafter, Int32, News, RowContext
from server.config import Settings
from server.messages import Speculation, Submit
from server.worker.drafting import Drafting
from server.worker.loading import load_verifier
from server.worker.loop import Loop
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from server.worker.speculator import Speculator
from training.answer_store import Float16
from training.prompts import AnswerPrompt
from verifier.backend import Backend
from verifier.plan import SamplingParams
from verifier.tree import DraftTrees

_CPU_ROWS, _GPU_ROWS = 32, 64
"""Answers that are written side by side, by plain decoding. Many rows read the weights once for all of them, so there
is no idle arithmetic left for drafts to use: on two cores 16 rows with trees of 8 nodes were slower than 32 without."""
_CPU_POSITIONS, _GPU_POSITIONS = 512, 4096
"""Most positions of a step: parts of prompts and one token a row."""
_PAYING_TOKENS = 50_000
"""Compiling a pass takes about as long as it saves on so many tokens of a small model."""
_LEAST_ROOM = 8
"""A prompt that leaves room for fewer tokens than this is not asked: so short an answer teaches nothing."""
_RECORDER, _TENANT = "recorder", "training"
_LARGEST = 65504.0
"""Largest finite number of float16."""
_MAX_NODES = 2
"""The recorder drafts nothing, but a request that allows one node has no drafter, and states are told to drafters."""


def load_target(settings: Settings, num_answers: int, max_tokens: int) -> Backend:
    """The target with as many rows as writing takes, compiled if that pays. Raises: StartupError in one line."""
    is_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    needs = replace(
        settings,
        max_num_seqs=min(num_answers, _GPU_ROWS if is_gpu else _CPU_ROWS),
        max_num_batched_tokens=_GPU_POSITIONS if is_gpu else _CPU_POSITIONS,
        compile=num_answers * max_tokens >= _PAYING_TOKENS,
    )
    return load_verifier(needs)


class StateRecorder(Drafter):
    """A drafter that guesses nothing and is told everything.

    Owns the hidden states of each answer, by its sampling seed (the caller gives each answer its own), and the last
    token of each row.
    """

    wants_hidden = True
    max_depth = 0

    def __init__(self, window: int) -> None:
        """`window`: how many states at the end of a prompt are kept."""
        self.hidden_window = window
        self._seeds: dict[int, int] = {}  # of each live row
        self._last: dict[int, int] = {}
        self._states: dict[int, dict[int, Float16]] = {}  # by position, [H] each

    def start(self, row: int, context: RowContext) -> None:
        """A new answer, or one that was preempted."""
        self._seeds[row], self._last[row] = context.seed, context.tokens[-1]

    def update(self, news: News) -> None:
        """Keep the states, as float16 on the host."""
        for index, row in enumerate(news.rows.tolist()):
            self._last[row] = int(news.tokens[news.starts[index + 1] - 1])
        hidden = news.hidden
        if hidden is None:
            return
        states: Float16 = hidden.states.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
        starts = hidden.starts.tolist()
        for index, (row, first) in enumerate(zip(hidden.rows.tolist(), hidden.first.tolist(), strict=True)):
            # A copy: a part of the step's array would keep all of it in memory.
            piece = states[starts[index] : starts[index + 1]].copy()
            self._states.setdefault(self._seeds[row], {}).update(enumerate(piece, first))

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """Bare roots."""
        for row in rows.tolist():
            out.append_root(self._last[row])

    def stop(self, row: int) -> None:
        """The row is free; its states stay until they are taken."""
        self._seeds.pop(row, None)
        self._last.pop(row, None)

    def take(self, seed: int) -> tuple[int, Float16] | None:
        """The last states [S, H] of an answer at consecutive positions, with the first of these; and forget them.

        Those before a gap are left out: a prefix cache or a failed step made it. An answer that was preempted goes on
        with its old states.
        """
        found = self._states.pop(seed, {})
        if not found:
            return None
        begin = end = max(found) + 1
        while begin - 1 in found:
            begin -= 1
        return begin, np.stack([found[place] for place in range(begin, end)])


@dataclass(frozen=True, slots=True)
class WrittenAnswer:
    """What came of one prompt."""

    number: int
    tokens: list[int]
    states: tuple[int, Float16] | None = None
    """Position of the first state in prompt and answer, and the states [S, H] from there on; None if there are none."""
    error: str = ""
    """Why the answer was not finished; empty if it was."""


class AnswerWriter:
    """Writes answers, as many side by side as the target has rows. Answer n has the sampling seed `first_seed` + n.

    Owns the loop that runs the target, and the answers under way.
    """

    def __init__(
        self, verifier: Backend, *, max_tokens: int, eos_ids: Iterable[int], first_seed: int = 0, window: int = 0
    ) -> None:
        """`window`: hidden states are recorded, also of so many tokens at the end of a prompt. 0: none are."""
        geometry = verifier.geometry
        self._limits = Limits(
            max_rows=geometry.max_rows,
            max_batched_tokens=geometry.max_positions,
            max_model_len=geometry.max_model_len,
            num_pages=geometry.num_pages,
            page_size=geometry.page_size,
        )
        self._recorder, self._max_nodes = StateRecorder(window), _MAX_NODES if window else 1
        drafting = Drafting({_RECORDER: self._recorder}, max_rows=geometry.max_rows, vocab_size=geometry.vocab_size)
        speculator = Speculator(drafting, geometry.max_rows)
        self._loop = Loop(verifier, Scheduler(self._limits), speculator, geometry.vocab_size)
        self._stop_ids = tuple(token for token in eos_ids if token < geometry.vocab_size)
        self._max_tokens, self._first_seed = max_tokens, first_seed
        self._tokens: dict[int, list[int]] = {}  # by answer under way
        self._later: dict[int, deque[int]] = {}  # by answer under way, the rest of its dialogue

    def has_room(self, prompt: AnswerPrompt) -> bool:
        """Whether the target's context leaves room for an answer to this prompt that is worth writing."""
        return len(prompt.tokens) + _LEAST_ROOM <= self._limits.context_len

    def write(self, prompts: Sequence[AnswerPrompt], numbers: Iterable[int]) -> Iterator[WrittenAnswer]:
        """Answer the prompts of these numbers; each has room for an answer. Whoever stops listening ends the writing.

        The turns of a dialogue follow each other, so that the prefix cache knows the beginning of each.
        """
        dialogues = (deque(turns) for _, turns in groupby(numbers, key=lambda number: prompts[number].document))
        for _ in range(self._limits.max_rows):
            self._submit(prompts, next(dialogues, deque()))
        while self._loop.has_work:
            outcome = self._loop.step()
            ended = {int(error.id): error.message for error in outcome.errors}
            for delta in outcome.deltas:
                self._tokens[int(delta.id)] += delta.tokens
                if delta.finish_reason is not None:
                    ended[int(delta.id)] = ""
            for number, error in ended.items():
                states = self._recorder.take(self._first_seed + number)
                later = self._later.pop(number) or next(dialogues, deque())
                self._submit(prompts, later)
                yield WrittenAnswer(number, self._tokens.pop(number), states, error)

    def _submit(self, prompts: Sequence[AnswerPrompt], numbers: deque[int]) -> None:
        """Ask for the first of these, which are of one dialogue, if there is one."""
        if not numbers:
            return
        number = numbers.popleft()
        prompt = prompts[number]
        sampling = SamplingParams(
            max_tokens=min(self._limits.context_len - len(prompt.tokens), self._max_tokens),
            seed=self._first_seed + number,
            temperature=prompt.temperature,
            stop_ids=self._stop_ids,
        )
        self._tokens[number], self._later[number] = [], numbers
        speculation = Speculation(_RECORDER, self._max_nodes)
        self._loop.handle(Submit(str(number), prompt.tokens, sampling, speculation, _TENANT))
