"""What the target wrote, with its hidden states, on disk: shards of a bounded size that survive a kill.

Answers are numbered. Shard g holds answers g * answers_per_shard and on; it is written when all of them are there, so a
run that was killed goes on behind the last whole shard and makes the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from drafters.head.files import FileError, read_json, write_json, write_tensors

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


class ShardError(Exception):
    """Data that cannot be kept or used; the message is one line."""


@dataclass(frozen=True, slots=True)
class Record:
    """One answer with the end of its prompt."""

    tokens: Int32  # [S + 1] from absolute position `first` on
    states: Float16  # [S, H] the state at position p predicted the token at p + 1
    first: int
    num_answer: int
    """How many of the last tokens are the target's answer."""
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
    window: int
    """Most tokens of a prompt that are kept."""
    hidden_size: int
    seed: int

    @property
    def answers_per_shard(self) -> int:
        """As many as are sure to fit."""
        return max(1, min(self.num_answers, MAX_SHARD_ANSWERS, MAX_SHARD_BYTES // self.record_bytes))

    @property
    def shard_bytes(self) -> int:
        """Largest size of one shard."""
        return self.answers_per_shard * self.record_bytes

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
    """The shards of one plan in a folder. Owns the manifest.

    Raises on opening: ShardError if the folder holds data of another plan, which is not touched, or cannot be read.
    """

    def __init__(self, folder: Path, plan: DataPlan, max_bytes: int = 2**62) -> None:
        self.folder = folder
        self.plan = plan
        self._max_bytes = max_bytes
        self._shards: dict[int, dict[str, int]] = {}
        self.damaged: list[str] = []
        """One line for each shard that has to be made again."""
        if (folder / MANIFEST).exists():
            self._check_plan()
        self._find()

    @property
    def done(self) -> tuple[int, ...]:
        """Shards that are whole, in order."""
        return tuple(sorted(self._shards))

    @property
    def num_bytes(self) -> int:
        """Size of all whole shards."""
        return sum(shard["bytes"] for shard in self._shards.values())

    @property
    def is_complete(self) -> bool:
        """Whether no shard is missing."""
        return len(self._shards) == self.plan.num_shards

    @property
    def is_full(self) -> bool:
        """Whether another shard might break the bound on the data."""
        return self.num_bytes + self.plan.shard_bytes > self._max_bytes

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    def put(self, shard: int, records: Sequence[Record]) -> None:
        """Keep a shard. Raises: ShardError, when the disk is full for one; earlier shards stay."""
        hidden = self.plan.hidden_size
        tokens = np.concatenate([np.zeros(0, np.int32), *(record.tokens for record in records)])
        states = np.concatenate([np.zeros((0, hidden), np.float16), *(record.states for record in records)])
        arrays = {
            "tokens": tokens.astype(np.int32),
            "states": states,
            "starts": np.cumsum([0, *(record.states.shape[0] for record in records)], dtype=np.int64),
            "firsts": np.array([record.first for record in records], np.int64),
            "num_answers": np.array([record.num_answer for record in records], np.int64),
            "temperatures": np.array([record.temperature for record in records], np.float32),
            "documents": np.array([record.document for record in records], np.int64),
        }
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        metadata = {"format": FORMAT, "version": str(VERSION), "key": self.plan.key, "shard": str(shard)}
        try:
            size = write_tensors(self.path(shard), tensors, metadata)
            self._shards[shard] = {"bytes": size, "records": len(records), "states": int(states.shape[0])}
            self._write_manifest()
        except FileError as error:
            self._shards.pop(shard, None)
            raise ShardError(f"{error}; {len(self._shards)} finished shards stay, run again to go on") from error

    def read(self, shard: int) -> StoredShard:
        """Open a shard. Raises: ShardError."""
        return StoredShard(self.path(shard), self.plan, shard)

    def _check_plan(self) -> None:
        try:
            manifest = read_json(self.folder / MANIFEST)
        except FileError as error:
            raise ShardError(f"{error}: delete {self.folder} to make the data again") from error
        if manifest.get("key") != self.plan.key:
            changed = _changed(manifest.get("plan"), asdict(self.plan))
            raise ShardError(
                f"{self.folder} holds the data of another run ({changed}): name another --out, or delete that folder"
            )

    def _find(self) -> None:
        """Look at every shard there is: a kill may have come between a shard and the manifest."""
        for shard in range(self.plan.num_shards):
            path = self.path(shard)
            if not path.exists():
                continue
            try:
                stored = self.read(shard)
            except ShardError as error:
                self.damaged.append(f"{error}; it is made again")
                continue
            counts = {"records": stored.num_records, "states": int(stored.starts[-1])}
            self._shards[shard] = {"bytes": path.stat().st_size, **counts}

    def _write_manifest(self) -> None:
        value = {
            "format": FORMAT,
            "version": VERSION,
            "key": self.plan.key,
            "plan": asdict(self.plan),
            "answers_per_shard": self.plan.answers_per_shard,
            "shards": {str(shard): self._shards[shard] for shard in self.done},
        }
        write_json(self.folder / MANIFEST, value)


class StoredShard:
    """One shard, read where it lies: states come from the disk as they are asked for. Owns the mapped file.

    Raises on opening: ShardError when it is missing, foreign, or its parts do not fit together.
    """

    def __init__(self, path: Path, plan: DataPlan, shard: int) -> None:
        try:
            file = cast(Any, safetensors.safe_open(str(path), framework="np"))
            metadata = file.metadata() or {}
            if metadata.get("key") != plan.key or metadata.get("shard") != str(shard):
                raise ShardError(f"{path} is not shard {shard} of this run's data")
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            self._states = file.get_slice("states")
        except FileNotFoundError:
            raise ShardError(f"{path} is missing") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise ShardError(f"{path} is damaged: {' '.join(str(error).split())}") from error
        self.starts: Int64 = arrays["starts"]
        self.num_answers: Int64 = arrays["num_answers"]
        self.documents: Int64 = arrays["documents"]
        self._tokens, self._firsts = arrays["tokens"], arrays["firsts"]
        self._temperatures: Float32 = arrays["temperatures"]
        count, starts = self.num_records, self.starts
        is_sound = (
            all(arrays[name].size == count for name in ("num_answers", "firsts", "temperatures"))
            and starts.size == count + 1
            and starts[0] == 0
            and bool((np.diff(starts) > 0).all())
            and tuple(self._states.get_shape()) == (int(starts[-1]), plan.hidden_size)
            and self._tokens.size == starts[-1] + count
        )
        if not is_sound:
            raise ShardError(f"{path} is damaged: its parts do not fit together")

    @property
    def num_records(self) -> int:
        """Answers in it."""
        return int(self.documents.size)

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


def _changed(old: Any, new: dict[str, Any]) -> str:
    """Which parts of a plan differ, in words."""
    if not isinstance(old, dict):
        return "its manifest names no plan"
    parts = [
        f"{name} {str(old.get(name))[:12]}, now {str(value)[:12]}"
        for name, value in new.items()
        if old.get(name) != value
    ]
    return "; ".join(parts) or "another version of the format"
