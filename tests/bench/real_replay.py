"""A real target in process, through the server's own loop: `replay` counts what drafters win, `effort` takes times.

Several loops may stand around one loaded verifier, each with drafters that know nothing yet. They run one after the
other, each to the end of its requests, and without the prefix cache: K/V pages mean nothing to the next loop.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from drafters.base import Source
from server.config import Settings
from server.encoding import PromptEncoder
from server.errors import InvalidRequest
from server.gguf import resolve
from server.messages import Speculation, Submit
from server.model_files import locate, read
from server.tokenizer import end_ids, load_tokenizer
from server.worker.drafting import Effort
from server.worker.loading import DrafterNeeds, load_verifier, share_weights
from server.worker.loop import Loop
from server.worker.main import assemble
from server.worker.profile import finish
from server.worker.trials import measure, try_all
from tests.bench.real_prompts import Question
from tests.bench.real_report import is_looping
from verifier.plan import SamplingParams

NO_HEAD = "hybrid-no-head"
MASKS = ("trigram", "suffix", "ctc", NO_HEAD, "hybrid")
"""What `replay` compares. Without a head only those that need none."""
OFF, SPECULATOR = "off", "speculator"


@dataclass(slots=True)
class Written:
    """One answer as it came out of the loop. Its first token comes with the prompt and costs no step."""

    task: str
    tokens: list[int] = field(default_factory=list)
    num_told: int = 0

    @property
    def won(self) -> tuple[int, int]:
        """(tokens, steps) behind the first token."""
        return len(self.tokens) - 1, self.num_told - 1


@dataclass(slots=True)
class Counts:
    """Draft tokens of all steps by source, as drafters.base.Source numbers them."""

    drafted: list[int] = field(default_factory=lambda: [0] * len(Source))
    accepted: list[int] = field(default_factory=lambda: [0] * len(Source))

    def shares(self) -> dict[str, dict[str, float]]:
        """Each source's share of all draft tokens, and of all that came true."""
        found = {}
        for name, counts in (("drafted", self.drafted), ("accepted", self.accepted)):
            named = zip(Source, counts, strict=True)
            found[name] = {source.name.lower(): round(n / sum(counts), 3) for source, n in named if n}
        return found


@dataclass(frozen=True, slots=True)
class Asking:
    """How questions are asked."""

    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False


class Target:
    """A loaded model and its tokenizer. Owns the verifier."""

    def __init__(self, settings: Settings, max_rows: int, max_nodes: int) -> None:
        """Raises: StartupError in one line."""
        self.settings = replace(
            settings,
            model=resolve(settings.model),
            enable_prefix_caching=False,
            max_num_seqs=max_rows,
            # While prompts wait, trees get half of a step: even then nothing of them may be cut.
            max_num_batched_tokens=max(settings.max_num_batched_tokens, 2 * max_rows * max_nodes),
        )
        files = read(locate(self.settings.model, settings.revision))
        self._encoder, self._has_chat = PromptEncoder(files), files.chat_template is not None
        self._end_ids = end_ids(files, load_tokenizer(files))
        self.verifier = load_verifier(self.settings)

    def loop(self, **changes: object) -> Loop:
        """A loop whose drafters have learned nothing, with some settings changed. Raises: StartupError."""
        settings, geometry = replace(self.settings, **changes), self.verifier.geometry  # type: ignore[arg-type]
        needs = DrafterNeeds(
            settings, geometry.vocab_size, geometry.device, geometry.dtype, lambda: share_weights(self.verifier)
        )
        return assemble(settings, self.verifier, geometry, needs).loop

    def begin(self, loop: Loop) -> None:
        """What a worker does before it serves: trial requests, and the costs of steps."""
        self.verifier.prepare_first()
        vocab_size = self.verifier.geometry.vocab_size
        try_all(loop, vocab_size)
        while self.verifier.warm(is_idle=True):
            pass
        finish(measure(loop, self.verifier, vocab_size))

    def encode(self, question: Question, max_tokens: int) -> tuple[int, ...]:
        """Its ids. Raises: SystemExit if there is no room for the answer."""
        prompt, limit = question.prompt, self.verifier.geometry.max_model_len - max_tokens
        try:
            if not prompt.messages:
                return tuple(self._encoder.encode(prompt.text, limit, "prompt"))
            if not self._has_chat:
                raise SystemExit(f"--completions: the model has no chat template, so {question.task} belongs there")
            messages = [{"role": role, "content": content} for role, content in prompt.messages]
            return tuple(self._encoder.chat(messages, limit))
        except InvalidRequest as error:
            raise SystemExit(f"{question.task}: {error.message} (--cut-chars shortens prompts)") from error

    def submits(
        self, questions: Sequence[Question], asking: Asking, speculation: Speculation, tenant: str
    ) -> Iterable[Submit]:
        """One request for each question; the place in the list is its id and its seed."""
        stop_ids = () if asking.ignore_eos else self._end_ids
        for seed, question in enumerate(questions):
            sampling = SamplingParams(
                max_tokens=asking.max_tokens, seed=seed, temperature=asking.temperature, stop_ids=stop_ids
            )
            ids = self.encode(question, asking.max_tokens)
            yield Submit(str(seed), ids, sampling, speculation, tenant)


def drive(loop: Loop, submits: Sequence[Submit], concurrency: int, counts: Counts) -> list[Written]:
    """Run requests to their ends, `concurrency` at a time; adds to `counts`. Raises: SystemExit if one fails."""
    waiting = deque(submits)
    written = {submit.id: Written("") for submit in submits}
    num_running = 0
    while waiting or num_running:
        while waiting and num_running < concurrency:
            loop.handle(waiting.popleft())
            num_running += 1
        outcome = loop.step()
        for error in outcome.errors:
            raise SystemExit(f"request {error.id} failed: {error.message}")
        for delta in outcome.deltas:
            written[delta.id].tokens += delta.tokens
            written[delta.id].num_told += 1
            num_running -= delta.finish_reason is not None
        if outcome.stats is None:
            continue
        if outcome.stats.num_preempted:
            raise SystemExit("--kv-cache-gib: too little for so many rows: a request lost its place")
        counts.drafted = [a + b for a, b in zip(counts.drafted, outcome.stats.drafted_by_source, strict=True)]
        counts.accepted = [a + b for a, b in zip(counts.accepted, outcome.stats.accepted_by_source, strict=True)]
    return list(written.values())


# ---- replay


@dataclass(frozen=True, slots=True)
class Cell:
    """What one mask won with trees of one size, at one temperature."""

    mask: str
    max_nodes: int
    temperature: float
    answers: list[Written]
    counts: Counts

    def lengths(self, with_loops: bool) -> dict[str, float | None]:
        """Acceptance length by task, and of all: tokens won per step, the target's own one included."""
        sums: dict[str, tuple[int, int]] = {}
        for answer in self.answers:
            for name in (answer.task, "all"):
                won, steps = sums.get(name, (0, 0))
                if with_loops or not is_looping(answer.tokens):
                    won, steps = won + answer.won[0], steps + answer.won[1]
                sums[name] = won, steps
        return {name: round(won / steps, 3) if steps else None for name, (won, steps) in sums.items()}


def masks_of(settings: Settings, wanted: Sequence[str]) -> list[str]:
    """Those of `wanted` that differ: without a head hybrid is the same as without its head."""
    return [mask for mask in wanted if settings.ctc_head or mask not in ("ctc", NO_HEAD)]


def replay_cell(target: Target, questions: Sequence[Question], asking: Asking, place: tuple[str, int, int]) -> Cell:
    """From a cold start all questions as one tenant's, drafted at full effort, nothing cut.

    Args: `place`, the mask, nodes of a tree with its root, and rows that run at once.
    """
    mask, max_nodes, num_rows = place
    loop = target.loop(**({"ctc_head": ""} if mask == NO_HEAD else {}))
    loop.speculator.trial_effort = Effort.FULL
    speculation = Speculation("hybrid" if mask == NO_HEAD else mask, max_nodes)
    counts = Counts()
    answers = drive(loop, list(target.submits(questions, asking, speculation, "replay")), num_rows, counts)
    for answer, question in zip(answers, questions, strict=True):
        answer.task = question.task
    return Cell(mask, max_nodes, asking.temperature, answers, counts)


def num_different(cells: Sequence[Cell]) -> int:
    """Answers that are not those of the first cell at the same temperature."""
    first: dict[float, Cell] = {}
    pairs = [(cell, first.setdefault(cell.temperature, cell)) for cell in cells]
    return sum(
        mine.tokens != theirs.tokens
        for cell, other in pairs
        for mine, theirs in zip(cell.answers, other.answers, strict=True)
    )


# ---- effort


class EffortArms:
    """The speculator beside fixed trees and none, each as a server of its own around one target. Owns their loops."""

    def __init__(self, target: Target, fixed: Sequence[int], asking: Asking) -> None:
        self._target, self._asking = target, asking
        settings = target.settings
        self._arms: dict[str, tuple[Loop, Speculation]] = {}
        for name, effort, speculation in [
            (SPECULATOR, None, Speculation(settings.drafter, settings.max_nodes)),
            (OFF, Effort.NONE, Speculation("none", 1)),
            *[(f"{nodes} nodes", Effort.FULL, Speculation(settings.drafter, nodes)) for nodes in fixed],
        ]:
            loop = target.loop()
            if effort is None:
                target.begin(loop)
            loop.speculator.trial_effort = effort
            self._arms[name] = loop, speculation

    def measure(self, concurrency: int, rounds: Sequence[Sequence[Question]]) -> tuple[dict[str, list[float]], int]:
        """Tokens/s by arm and round, and how many answers differ from those of the first arm.

        The arms take turns, another one first in each round. Each concurrency is a tenant that no arm has heard of.
        What an arm learned of all tenants (what steps cost, what estimates are worth) stays from those before, as in a
        server that runs on.
        """
        names = list(self._arms)
        for name in names:  # steps of sizes that never ran are slower the first time
            self._turn(name, concurrency, rounds[0][:concurrency], f"warm-up {concurrency}", 16)
        speeds: dict[str, list[float]] = {name: [] for name in names}
        num_different = 0
        for number, questions in enumerate(rounds):
            texts: dict[str, list[list[int]]] = {}
            for name in names[number % len(names) :] + names[: number % len(names)]:
                answers, seconds = self._turn(name, concurrency, questions, str(concurrency), self._asking.max_tokens)
                texts[name] = [answer.tokens for answer in answers]
                speeds[name].append(sum(map(len, texts[name])) / seconds)
                print(f"c={concurrency} round {number + 1} {name}: {speeds[name][-1]:.1f} tok/s", file=sys.stderr)
            num_different += sum(
                mine != first for name in names for mine, first in zip(texts[name], texts[names[0]], strict=True)
            )
        return speeds, num_different

    def _turn(
        self, name: str, concurrency: int, questions: Sequence[Question], tenant: str, max_tokens: int
    ) -> tuple[list[Written], float]:
        loop, speculation = self._arms[name]
        asking = replace(self._asking, max_tokens=max_tokens)
        submits = list(self._target.submits(questions, asking, speculation, tenant))
        began = time.perf_counter()
        answers = drive(loop, submits, concurrency, Counts())
        return answers, time.perf_counter() - began


def median_speeds(speeds: dict[str, list[float]]) -> dict[str, float]:
    """By arm."""
    return {name: round(statistics.median(values), 2) for name, values in speeds.items()}
