"""The state of a training run on disk: enough to go on after a kill as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.head.files import FileError, read_tensors, write_tensors, write_whole
from drafters.head.head import Head
from server.errors import StartupError
from training.answer_store import differences

CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "train.jsonl"
FORMAT = "foretoken-ctc-checkpoint-2"


@dataclass(slots=True)
class TrainState:
    """How far a run is. Owns nothing but its numbers."""

    step: int = 0
    """Steps that are done."""
    elapsed_s: float = 0.0
    """Time they took, evaluations included."""
    best_loss: float = float("inf")
    """Lowest held-out negative log-likelihood per token, in nats."""
    best_step: int = 0
    best_acceptance: float = 0.0
    """Acceptance length measured at that step."""


@dataclass(slots=True)
class Checkpoint:
    """A run between two steps, beside head and optimiser. Owns its parts."""

    state: TrainState = field(default_factory=TrainState)
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best evaluation; empty before the first one."""
    log: list[dict[str, float]] = field(default_factory=list)
    """What each evaluation found."""


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, head: Head, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> None:
    """Write the run, whole or not at all, and its log. Raises: StartupError; the checkpoint before stays."""
    tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in checkpoint.best.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    told = {"state": asdict(checkpoint.state), "log": checkpoint.log, "settings": settings}
    metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in told.items()}}
    try:
        write_tensors(folder / CHECKPOINT_FILE, tensors, metadata)
        write_whole(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in checkpoint.log).encode())
    except FileError as error:
        raise StartupError(f"{error}; the last checkpoint stays, run again to go on") from error


def load_checkpoint(
    folder: Path, head: Head, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> Checkpoint:
    """Put `head` and `optimizer` where the run in a folder stood; a new run where there is none.

    Raises: StartupError when the file is damaged or belongs to a run with other settings; nothing is changed then.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return Checkpoint()
    try:
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise FileError(f"{path} is no checkpoint of this program")
        state, log = TrainState(**json.loads(metadata["state"])), json.loads(metadata["log"])
        old = json.loads(metadata["settings"])
    except (FileError, ValueError, TypeError, KeyError) as error:
        raise StartupError(f"{error}: delete {path} to train from the start") from error
    if changed := differences(old, json.loads(json.dumps(settings))):
        raise StartupError(f"{path} is of a run with other settings ({changed}): delete it to train from the start")
    head.load_state_dict(_part(tensors, "head"))
    moments: dict[int, dict[str, Tensor]] = {}
    for place, tensor in _part(tensors, "optimizer").items():
        index, name = place.split(".")
        moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return Checkpoint(state, _part(tensors, "best"), log)


def _part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = kind + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
