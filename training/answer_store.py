"""What the target wrote, with its hidden states, on disk: shards of a bounded size that survive a kill.

Answers are numbered. Shard g holds answers g * answers_per_shard and on; it is written when all of them are there, so a
run that was killed goes on behind the last whole shard and makes the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from drafters.head.files import FileError, read_json, write_json, write_tensors
from server.errors import StartupError

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]

FORMAT, VERSION = "foretoken-ctc-data", 1
MANIFEST = "manifest.json"
MAX_SHARD_BYTES = 64 * 2**20
MAX_SHARD_ANSWERS = 256
"""So many answers at most are lost by a kill, however small the states are."""
_STATE_BYTES, _TOKEN_BYTES = 2, 4
_ARRAYS = ("tokens", "starts", "firsts", "num_answers", "temperatures", "documents")  # beside the states


@dataclass(frozen=True, slots=True)
class Record:
    """One answer with the end of its prompt."""

    tokens: Int32  # [S + 1] from absolute position `first` on
    states: Float16  # [S, H] the state at position p predicted the token at p + 1
    first: int
    num_answer: int
    """How many of the last tokens are the target's answer; each has the state that predicted it."""
    temperature: float
    document: int
    """Which text of the corpus the prompt came from: what is held out is held out by text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlan:
    """All that the data depend on. A store holds the data of one plan."""

    fingerprint: str
    """Of the target."""
    corpus: str
    """Digest of the prompts."""
    num_answers: int
    max_tokens: int
    max_model_len: int
    """The target's context in tokens: it decides which prompts are asked, and how long an answer may be."""
    window: int
    """Most tokens of a prompt that are kept."""
    hidden_size: int
    seed: int

    @property
    def answers_per_shard(self) -> int:
        """As many as are sure to fit."""
        return max(1, min(self.num_answers, MAX_SHARD_ANSWERS, MAX_SHARD_BYTES // self.record_bytes))

    @property
    def record_bytes(self) -> int:
        """Largest size of one record."""
        return (self.window + self.max_tokens) * (self.hidden_size * _STATE_BYTES + _TOKEN_BYTES) + 64

    @property
    def num_shards(self) -> int:
        """Shards of the whole data."""
        return -(-self.num_answers // self.answers_per_shard)

    @property
    def key(self) -> str:
        """Digest of the plan."""
        return hashlib.sha256(json.dumps([FORMAT, VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()[:32]

    def answers(self, shard: int) -> range:
        """Numbers of the answers in a shard."""
        first = shard * self.answers_per_shard
        return range(first, min(first + self.answers_per_shard, self.num_answers))


class AnswerStore:
    """The shards of one plan in a folder. Owns the manifest, and opens every shard there is.

    Raises on opening: StartupError if the folder holds data of another plan, which is not touched, or cannot be read.
    """

    def __init__(self, folder: Path, plan: DataPlan) -> None:
        self.folder = folder
        self.plan = plan
        self.shards: dict[int, StoredShard] = {}
        """Whole ones, by number."""
        self.damaged: list[str] = []
        """One line for each shard that has to be made again."""
        if (folder / MANIFEST).exists():
            self._check_plan()
        for shard in range(plan.num_shards):  # also those that the manifest lacks: a kill may have come before it
            try:
                if self.path(shard).exists():
                    self.shards[shard] = StoredShard(self.path(shard), plan, shard)
            except StartupError as error:
                self.damaged.append(f"{error}; it is made again")

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    def put(self, shard: int, records: Sequence[Record]) -> None:
        """Keep a shard. Raises: StartupError, when the disk is full for one; earlier shards stay."""
        hidden = self.plan.hidden_size
        arrays = {
            "tokens": np.concatenate([np.zeros(0, np.int32), *(record.tokens for record in records)]),
            "states": np.concatenate([np.zeros((0, hidden), np.float16), *(record.states for record in records)]),
            "starts": np.cumsum([0, *(record.states.shape[0] for record in records)], dtype=np.int64),
            "firsts": np.array([record.first for record in records], np.int64),
            "num_answers": np.array([record.num_answer for record in records], np.int64),
            "temperatures": np.array([record.temperature for record in records], np.float32),
            "documents": np.array([record.document for record in records], np.int64),
        }
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        metadata = {"format": FORMAT, "version": str(VERSION), "key": self.plan.key, "shard": str(shard)}
        try:
            write_tensors(self.path(shard), tensors, metadata)
            self.shards[shard] = StoredShard(self.path(shard), self.plan, shard)
            self._write_manifest()
        except FileError as error:
            self.shards.pop(shard, None)
            raise StartupError(f"{error}; {len(self.shards)} finished shards stay, run again to go on") from error

    def _check_plan(self) -> None:
        try:
            manifest = read_json(self.folder / MANIFEST)
        except FileError as error:
            raise StartupError(f"{error}: delete {self.folder} to make the data again") from error
        if manifest.get("key") != self.plan.key:
            changed = differences(manifest.get("plan"), asdict(self.plan)) or "another version of the format"
            raise StartupError(
                f"{self.folder} holds the data of another run ({changed}): name another --out, or delete that folder"
            )

    def _write_manifest(self) -> None:
        value = {
            "format": FORMAT,
            "version": VERSION,
            "key": self.plan.key,
            "plan": asdict(self.plan),
            "answers_per_shard": self.plan.answers_per_shard,
            "shards": {str(number): shard.sizes for number, shard in sorted(self.shards.items())},
        }
        write_json(self.folder / MANIFEST, value)


class StoredShard:
    """One shard, read where it lies: states come from the disk as they are asked for. Owns the mapped file.

    Raises on opening: StartupError when it is missing, cut short, or of another plan.
    """

    def __init__(self, path: Path, plan: DataPlan, shard: int) -> None:
        self.path = path
        try:
            file = cast(Any, safetensors.safe_open(str(path), framework="np"))
            metadata = file.metadata() or {}
            if metadata.get("key") != plan.key or metadata.get("shard") != str(shard):
                raise StartupError(f"{path} is not shard {shard} of this run's data")
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            self._states = file.get_slice("states")
        except FileNotFoundError:
            raise StartupError(f"{path} is missing") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise StartupError(f"{path} is damaged: {' '.join(str(error).split())}") from error
        self.starts: Int64 = arrays["starts"]
        self.num_answers: Int64 = arrays["num_answers"]
        self.documents: Int64 = arrays["documents"]
        self._tokens, self._firsts = arrays["tokens"], arrays["firsts"]
        self._temperatures: Float32 = arrays["temperatures"]

    @property
    def sizes(self) -> dict[str, int]:
        """What the manifest tells of it."""
        return {"bytes": self.path.stat().st_size, "records": len(self.documents), "states": int(self.starts[-1])}

    def answer(self, index: int) -> Int32:
        """The tokens of one answer alone."""
        stop = int(self.starts[index + 1]) + index + 1
        tokens: Int32 = self._tokens[stop - int(self.num_answers[index]) : stop]
        return tokens

    def record(self, index: int) -> Record:
        """One answer."""
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        return Record(
            tokens=self._tokens[start + index : stop + index + 1],
            states=self._states[start:stop],
            first=int(self._firsts[index]),
            num_answer=int(self.num_answers[index]),
            temperature=float(self._temperatures[index]),
            document=int(self.documents[index]),
        )


def differences(old: Any, new: Mapping[str, Any]) -> str:
    """Which of some settings differ, in words, those of nested groups one by one; empty if none does."""
    held = old if isinstance(old, dict) else {}
    found: list[str] = []
    for name in sorted({*held, *new}):
        was, now = held.get(name), new.get(name)
        if isinstance(now, dict):
            found.append(differences(was, now))
        elif was != now:
            found.append(f"{name} {str(was)[:40]}, now {str(now)[:40]}")
    return "; ".join(filter(None, found))
