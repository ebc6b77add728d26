"""The state of a training run on disk: enough to go on after a kill as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.head.files import FileError, read_tensors, write_tensors
from drafters.head.head import Head

FORMAT = "foretoken-ctc-checkpoint"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or gone on from; the message is one line."""


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
    num_misses: int = 0
    """Evaluations since then."""
    is_finished: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run between two steps."""

    state: TrainState
    best: dict[str, Tensor]
    """Weights of the best evaluation; empty before the first one."""


def save_checkpoint(
    path: Path, head: Head, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, settings: Mapping[str, Any]
) -> None:
    """Write the run, whole or not at all. Raises: CheckpointError; the checkpoint before stays."""
    tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors.update({f"best.{name}": tensor for name, tensor in checkpoint.best.items()})
    for name, parameter in head.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors.update({f"{moment}.{name}": state[moment] for moment in _MOMENTS if moment in state})
    metadata = {
        "format": FORMAT,
        "state": json.dumps(asdict(checkpoint.state)),
        "settings": json.dumps(dict(settings), sort_keys=True),
    }
    try:
        write_tensors(path, tensors, metadata)
    except FileError as error:
        raise CheckpointError(f"{error}; the last checkpoint stays, run again to go on") from error


def load_checkpoint(
    path: Path, head: Head, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> Checkpoint:
    """Put `head` and `optimizer` where the run stood.

    Raises: CheckpointError when the file is damaged or belongs to a run with other settings; nothing is changed then.
    """
    try:
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise FileError(f"{path} is no checkpoint of this program")
        found = TrainState(**json.loads(metadata["state"]))
        old = json.loads(metadata["settings"])
    except (FileError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{error}: delete {path} to train from the start") from error
    new = json.loads(json.dumps(dict(settings)))
    changed = [
        f"{name} {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{path} is of a run with other settings ({'; '.join(changed)}): delete it to train from the start"
        )
    head.load_state_dict(_part(tensors, "head"))
    moments = {moment: _part(tensors, moment) for moment in _MOMENTS}
    for name, parameter in head.named_parameters():
        if name in moments[_MOMENTS[0]]:
            state = {moment: moments[moment][name].to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(found.step)), **state}
    return Checkpoint(found, _part(tensors, "best"))


def _part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = kind + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
