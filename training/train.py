"""The training loop of a head: from a store of answers to the weights that guess held-out ones best."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from drafters.coupling import Coupling
from drafters.head.head import Head
from drafters.head.precision import has_bfloat16
from training.acceptance import acceptance_length
from training.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint
from training.dataset import BatchSize, Dataset, collate
from training.draws import draws_of, fit
from training.objective import Objective, Surprise, surprise
from training.teacher import Target
from training.train_log import TrainLog

CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "train.jsonl"

_BETAS = (0.9, 0.95)
_CLIP_NORM = 1.0
_LEAST_RATE = 0.02
"""Share of the learning rate that is left at the end of the cosine."""
_LOG_EVERY = 20
_HELD_OUT_ANSWERS = 64
_COUPLED_ANSWERS = 256
_REPLAYED_ANSWERS = 16
_NOT_DECAYED = ("slots", "heat")


class TrainError(Exception):
    """Training that cannot come to anything; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How a head is trained."""

    steps: int
    """Last step; the learning rate reaches its end there."""
    budget_s: float = 0.0
    """If not 0, training ends when it has taken this long, and the learning rate goes by that time."""
    lr: float = 2e-3
    weight_decay: float = 0.01
    warm_up: int = 50
    eval_every: int = 100
    patience: int = 8
    """Evaluations in a row without a better held-out surprise after which training stops early."""
    checkpoint_s: float = 30.0
    """Most seconds between two checkpoints."""
    max_nodes: int = 16
    """Of the trees whose acceptance is measured."""
    seed: int = 0
    size: BatchSize = field(default_factory=BatchSize)
    objective: Objective = field(default_factory=Objective)

    def settings(self) -> dict[str, Any]:
        """What may not change when a run goes on."""
        return {name: value for name, value in asdict(self).items() if name != "checkpoint_s"}


class SharedEmbeddings:
    """The target's two embeddings in the types that training reads: views where they have them. Never changed."""

    def __init__(self, target: Target, device: str, output_dtype: torch.dtype) -> None:
        self.input_embedding: Tensor = target.input_embedding.to(device)
        self.output_embedding: Tensor = target.output_embedding.to(device, output_dtype)
        self.form = target.form


class Trainer:
    """Trains one head. Owns the head, the optimiser and the files of the run in its folder.

    Begins where the checkpoint in the folder stands, if there is one. Raises on making: CheckpointError, FileError.
    """

    def __init__(
        self,
        head: Head,
        target: Target,
        dataset: Dataset,
        options: TrainOptions,
        folder: Path,
        data_key: str = "",
    ) -> None:
        self._device = str(head.slots.device)
        is_short = has_bfloat16(self._device)
        self._autocast = torch.autocast(self._device.split(":")[0], dtype=torch.bfloat16, enabled=is_short)
        self._target = SharedEmbeddings(target, self._device, torch.bfloat16 if is_short else torch.float32)
        self.head = head
        self._dataset, self._options, self._folder = dataset, options, folder
        self._optimizer = make_optimizer(head, options)
        self._settings = {**options.settings(), "shape": asdict(head.shape), "data": data_key}
        self.state, self._best = TrainState(), dict[str, Tensor]()
        if (folder / CHECKPOINT_FILE).exists():
            found = load_checkpoint(folder / CHECKPOINT_FILE, head, self._optimizer, self._settings)
            self.state, self._best = found.state, found.best
        self._log = TrainLog(folder / LOG_FILE, self.state.step)
        self._held = dataset.held_out(_HELD_OUT_ANSWERS)
        greedy = [record for record in self._held if record.temperature == 0.0] or self._held
        self._replayed = greedy[:_REPLAYED_ANSWERS]
        self._began = self._saved = 0.0  # by time.monotonic(); when training would have begun without interruptions

    def run(self, *, shows_progress: bool) -> TrainState:
        """Train to the end, and leave the best weights in `head`.

        Raises: CheckpointError, FileError when something cannot be written; TrainError when the loss is no number.
        """
        state = self.state
        self._began = time.monotonic() - state.elapsed_s
        self._saved = time.monotonic()
        budget_s = self._options.budget_s
        total, unit = (round(budget_s), "s") if budget_s else (self._options.steps, "step")
        with tqdm(total=total, unit=unit, desc="training", disable=not shows_progress) as bar, _ignored_warning():
            bar.update(self._amount() - bar.n)
            while not state.is_finished:
                loss = self._advance()
                accepted = f"{state.best_acceptance:.2f}"
                bar.set_postfix(loss=f"{loss.per_token:.3f}", accepted=accepted, refresh=False)
                bar.update(min(total, self._amount()) - bar.n)
        self.head.load_state_dict(self._best)
        return state

    def coupling(self) -> Coupling:
        """How much the noise says beside the trained head's estimates, fitted on what is held out."""
        if not self._options.objective.is_taught:
            return Coupling.plain(self.head.shape.num_slots)
        records, size = self._dataset.held_out(_COUPLED_ANSWERS), self._options.size
        with _ignored_warning():
            draws = draws_of(self.head, self._target, records, size, self._autocast)
            return fit(self.head.shape.num_slots, draws, self._options.seed)

    def _amount(self) -> int:
        """How far the run is, in the unit that ends it."""
        return int(self.state.elapsed_s) if self._options.budget_s else self.state.step

    def _advance(self) -> Surprise:
        """One step and what is due behind it. Returns the surprise of its batch."""
        state, options = self.state, self._options
        loss = self._step()
        state.elapsed_s = time.monotonic() - self._began
        if state.step % _LOG_EVERY == 0:
            self._log.add({"step": state.step, "loss": round(loss.per_token, 5), **self._pace()})
        is_last = self._progress() >= 1.0
        is_due = state.step % options.eval_every == 0 or is_last
        if is_due:
            self._evaluate()
            state.elapsed_s = time.monotonic() - self._began
            state.is_finished = is_last or state.num_misses >= options.patience
        if is_due or time.monotonic() - self._saved > options.checkpoint_s:
            self._save()
            self._saved = time.monotonic()
        return loss

    def _step(self) -> Surprise:
        """One batch. Returns its surprise."""
        batch = self._dataset.batch(self.state.step).to(self._device)
        rate = self._options.lr * self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = surprise(self.head, self._target, batch, self._options.objective, self._autocast)
        nn.utils.clip_grad_norm_(self.head.parameters(), _CLIP_NORM)
        self._optimizer.step()
        self.state.step += 1
        return loss

    def _progress(self) -> float:
        """Which part of the run is done, 0 to 1."""
        options, state = self._options, self.state
        by_time = state.elapsed_s / options.budget_s if options.budget_s else 0.0
        return min(1.0, max(state.step / options.steps, by_time))

    def _rate(self) -> float:
        """Factor of the learning rate: warm-up, then a cosine."""
        warm = min(1.0, (self.state.step + 1) / self._options.warm_up)
        cosine = 0.5 * (1.0 + math.cos(math.pi * self._progress()))
        return warm * (_LEAST_RATE + (1.0 - _LEAST_RATE) * cosine)

    def _pace(self) -> dict[str, float]:
        return {"lr": round(self._options.lr * self._rate(), 8), "elapsed_s": round(self.state.elapsed_s, 2)}

    def _evaluate(self) -> None:
        """Measure on what is held out, and keep the weights if they are the best so far."""
        state, size = self.state, self._options.size
        losses = []
        stream = np.random.default_rng(0)  # the same places in every evaluation
        with torch.no_grad():
            for first in range(0, len(self._held), size.rows):
                batch = collate(self._held[first : first + size.rows], size, stream, is_hiding=False)
                losses.append(
                    surprise(self.head, self._target, batch.to(self._device), self._options.objective, self._autocast)
                )
        loss = sum(one.per_token for one in losses) / len(losses)
        if not math.isfinite(loss):
            raise TrainError(
                f"training diverged by step {state.step}: the held-out loss is {loss}; lower the learning rate, "
                "and train from the start in another folder"
            )
        with self._autocast:
            accepted = acceptance_length(self.head, self._target, self._replayed, self._options.max_nodes)
        state.num_misses += 1
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.num_misses = loss, state.step, 0
            state.best_acceptance = accepted
            self._best = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}
        line = {"held_out_loss": round(loss, 5), "acceptance_length": round(accepted, 4)}
        self._log.add({"step": state.step, **line, **self._pace()})

    def _save(self) -> None:
        checkpoint = Checkpoint(self.state, self._best)
        save_checkpoint(self._folder / CHECKPOINT_FILE, self.head, self._optimizer, checkpoint, self._settings)


def make_optimizer(head: Head, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW; weight decay pulls on matrices only."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in head.named_parameters():
        (free if parameter.ndim < 2 or name in _NOT_DECAYED else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=_BETAS)


@contextmanager
def _ignored_warning() -> Iterator[None]:
    """Autocast runs norms of bfloat16 states with float32 weights, and torch warns that this is not its fastest way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
