"""Replaying recorded answers through a drafter, with no model: how much would it have won, at what cost?

    python -m tests.bench.simulate RECORDINGS.jsonl --table TABLE --max-nodes 16

A recording is one JSON object per line: "prompt" and "answer" (token ids), and optionally "candidates" and "logits"
(for every answer token the target's best tokens there and their raw logits), "tenant", "seed", "temperature". The
target's candidates at rejected nodes are not in a recording: a drafter that learns from them does better in service.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drafters.base import Drafter, Float32, Int32, News, RowContext, Verified
from verifier.plan import MAX_TREE_NODES
from verifier.tree import DraftTrees


class RecordingError(Exception):
    """A recording that cannot be replayed; the message is one line with file and line number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One answer of the target. `candidates[i]` and `logits[i]` stand where answer[i] was chosen."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...] = ()
    logits: tuple[tuple[float, ...], ...] = ()
    tenant: str = ""
    seed: int = 0
    temperature: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a replay measured. Times are host microseconds per row."""

    num_answers: int
    num_tokens: int
    """Tokens won by steps: the first token of each answer comes from its prompt."""
    num_steps: int
    num_nodes: int
    """Nodes proposed, roots not counted."""
    acceptance_length: float
    """Tokens won per step and row, the target's own one included."""
    mean_score: float
    """What the drafter expected of a node; its acceptance, if it is calibrated."""
    mean_acceptance: float
    propose_us: float
    read_us: float


@dataclass(slots=True)
class _Replay:
    """A recording in a row. Owns how far it got."""

    recording: Recording
    won: int = 1

    @property
    def is_finished(self) -> bool:
        return self.won >= len(self.recording.answer)


def read_recordings(path: Path) -> Iterator[Recording]:
    """Recordings of a file, in order. Raises: RecordingError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _parse(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise RecordingError(f"{path}:{number}: {error!s}") from error


def _parse(row: dict[str, Any]) -> Recording:
    candidates = tuple(tuple(int(token) for token in tokens) for tokens in row.get("candidates", ()))
    logits = tuple(tuple(float(value) for value in values) for values in row.get("logits", ()))
    answer = tuple(int(token) for token in row["answer"])
    prompt = tuple(int(token) for token in row["prompt"])
    if not prompt:
        raise ValueError("the prompt is empty")
    if candidates and not len(candidates) == len(logits) == len(answer):
        raise ValueError(f"{len(candidates)} candidates and {len(logits)} logits for {len(answer)} answer tokens")
    shapes = {len(values) for values in (*candidates, *logits)}
    if len(shapes) > 1:
        raise ValueError(f"candidates and logits of several lengths: {sorted(shapes)}")
    return Recording(
        prompt=prompt,
        answer=answer,
        candidates=candidates,
        logits=logits,
        tenant=str(row.get("tenant", "")),
        seed=int(row.get("seed", 0)),
        temperature=float(row.get("temperature", 0.0)),
    )


class Simulator:
    """Replays recordings through a drafter, several at a time.

    Owns the trees and the tally of one run.
    """

    def __init__(self, drafter: Drafter, max_nodes: int, batch: int = 1):
        assert 1 <= max_nodes <= MAX_TREE_NODES, f"{max_nodes} nodes"
        self._drafter = drafter
        self._max_nodes = max_nodes
        self._trees = DraftTrees.allocate(batch)
        self._free = list(range(batch))[::-1]
        self._live: dict[int, _Replay] = {}
        self._answers = self._steps = self._tokens = self._nodes = self._accepted = 0
        self._score = self._propose_s = self._read_s = 0.0

    def run(self, recordings: Iterable[Recording]) -> Simulation:
        """Replay all of them. Returns: the figures; all zero when no answer has two tokens."""
        for recording in recordings:
            if len(recording.answer) < 2:
                continue
            self._start(recording)
            while not self._free:
                self._step()
        while self._live:
            self._step()
        steps, nodes = max(1, self._steps), max(1, self._nodes)
        return Simulation(
            num_answers=self._answers,
            num_tokens=self._tokens,
            num_steps=self._steps,
            num_nodes=self._nodes,
            acceptance_length=self._tokens / steps,
            mean_score=self._score / nodes,
            mean_acceptance=self._accepted / nodes,
            propose_us=self._propose_s / steps * 1e6,
            read_us=self._read_s / steps * 1e6,
        )

    def _start(self, recording: Recording) -> None:
        row = self._free.pop()
        self._live[row] = _Replay(recording)
        self._answers += 1
        prompt = recording.prompt
        self._drafter.start(
            row, RowContext(recording.tenant, prompt, len(prompt), recording.seed, recording.temperature)
        )
        self._tell([row], [recording.answer[:1]], None)

    def _step(self) -> None:
        """One verify step of all live rows."""
        rows = list(self._live)
        self._trees.clear()
        began = time.perf_counter()
        self._drafter.propose(np.array(rows, np.int32), np.full(len(rows), self._max_nodes, np.int32), self._trees)
        self._propose_s += time.perf_counter() - began
        won, paths = [], []
        for index, row in enumerate(rows):
            tokens, path = self._walk(index, self._live[row])
            won.append(tokens)
            paths.append(path)
        began = time.perf_counter()
        self._tell(rows, won, self._verified(rows, paths))
        self._read_s += time.perf_counter() - began
        for row, tokens in zip(rows, won, strict=True):
            replay = self._live[row]
            replay.won += len(tokens)
            self._tokens += len(tokens)
            if replay.is_finished:
                self._drafter.stop(row)
                del self._live[row]
                self._free.append(row)
        self._steps += len(rows)

    def _walk(self, index: int, replay: _Replay) -> tuple[tuple[int, ...], list[int]]:
        """Tokens won with tree `index`, and the nodes on the true path, root first."""
        span = self._trees.span(index)
        tokens, parents = self._trees.tokens[span].tolist(), self._trees.parents[span].tolist()
        children = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
        left = replay.recording.answer[replay.won :]
        path = [0]
        for token in left[:-1]:
            node = children.get((path[-1], token))
            if node is None:
                break
            path.append(node)
        self._nodes += len(tokens) - 1
        self._accepted += len(path) - 1
        self._score += float(self._trees.scores[span][1:].sum())
        return left[: len(path)], path

    def _tell(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], verified: Verified | None) -> None:
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(won) for won in tokens], out=starts[1:])
        packed = np.array([token for won in tokens for token in won], np.int64)
        self._drafter.update(News(np.array(rows, np.int32), starts, packed, verified))

    def _verified(self, rows: Sequence[int], paths: Sequence[list[int]]) -> Verified | None:
        """Recorded candidates at the nodes of the true paths; at the others the logits are NaN: unknown."""
        recordings = [self._live[row].recording for row in rows]
        width = max((len(recording.candidates[0]) for recording in recordings if recording.candidates), default=0)
        width = min(width, self._drafter.num_candidates)
        if not width:
            return None
        candidates: Int32 = np.zeros((self._trees.num_nodes, width), np.int32)
        logits: Float32 = np.full((self._trees.num_nodes, width), np.nan, np.float32)
        for index, (row, recording) in enumerate(zip(rows, recordings, strict=True)):
            if not recording.candidates or len(recording.candidates[0]) < width:
                continue
            start = self._trees.span(index).start
            for depth, node in enumerate(paths[index]):
                place = self._live[row].won + depth
                candidates[start + node] = recording.candidates[place][:width]
                logits[start + node] = recording.logits[place][:width]
        return Verified(self._trees, 0, candidates, logits)


def simulate(drafter: Drafter, recordings: Iterable[Recording], max_nodes: int, batch: int = 1) -> Simulation:
    """Replay `recordings` through `drafter` with trees of at most `max_nodes` nodes, `batch` rows at a time."""
    return Simulator(drafter, max_nodes, batch).run(recordings)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: replay a file of recordings. Returns: the exit code."""
    from drafters import MASKS
    from drafters.drafter import EXPLORATION, DrafterOptions, TreeDrafter
    from drafters.ngram.source import NgramFiles
    from drafters.ngram.table import TableError

    parser = argparse.ArgumentParser(prog="python -m tests.bench.simulate", description="Replay recorded answers.")
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--table", default="", help="corpus table; without one the drafter only learns on line")
    parser.add_argument("--drafter", choices=[name for name in MASKS if name != "ctc"], default="hybrid")
    parser.add_argument("--exploration", type=float, default=EXPLORATION[0], help="weight of the exploration bonus")
    parser.add_argument("--max-nodes", type=int, default=16, help="nodes of a tree, root included (1 to 64)")
    parser.add_argument("--batch", type=int, default=1, help="rows at a time")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.max_nodes <= MAX_TREE_NODES or arguments.batch < 1:
        parser.error(f"--max-nodes must be 1 to {MAX_TREE_NODES}, --batch at least 1")
    try:
        recordings = list(read_recordings(arguments.recordings))
        if not recordings:
            raise RecordingError(f"{arguments.recordings}: no recordings")
        size = 1 + max(max((*entry.prompt, *entry.answer)) for entry in recordings)
        options = DrafterOptions(
            vocab_size=size,
            max_rows=arguments.batch,
            files=NgramFiles(table=arguments.table),
            exploration=(arguments.exploration, 0.0),
        )
        drafter = TreeDrafter(options).views()[arguments.drafter]
        result = simulate(drafter, recordings, arguments.max_nodes, arguments.batch)
    except (RecordingError, TableError, OSError) as error:
        parser.exit(2, f"{error}\n")
    for name, value in asdict(result).items():
        print(f"{name:18} {value:12.3f}" if isinstance(value, float) else f"{name:18} {value:12d}")
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
