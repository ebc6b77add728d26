"""The training loop of a head: from a store of answers to the weights that guess held-out ones best."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from drafters.coupling import Coupling
from drafters.head.head import Head
from drafters.head.precision import has_bfloat16
from server.errors import StartupError
from training.acceptance import acceptance_length
from training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from training.dataset import BatchSize, Dataset, collate
from training.draws import draws_of, fit
from training.objective import surprise
from verifier.weights import SharedWeights

_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0
_WARM_UP = 50
"""Steps in which the learning rate rises, a quarter of them at most; then it goes down by a cosine."""
_EVALUATIONS = 20
"""Of a run, each with a checkpoint behind it."""
_LEAST_RATE = 0.02
"""Share of the learning rate that is left at the end of the cosine."""
_HELD_OUT_ANSWERS = 64
_COUPLED_ANSWERS = 256
_REPLAYED_ANSWERS = 16
_REPLAYED_NODES = 16
"""Of the trees whose acceptance is measured."""
_NOT_DECAYED = ("slots", "heat")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How a head is trained."""

    steps: int
    lr: float = 2e-3
    seed: int = 0
    size: BatchSize = field(default_factory=BatchSize)
    data: str = ""
    """Names the answers: a run does not go on with others."""


class Trainer:
    """Trains one head. Owns the head, the optimiser, the state of the run and its files.

    Begins where the checkpoint in the folder stands, if there is one. Raises on making: StartupError.
    """

    def __init__(
        self, head: Head, target: SharedWeights, dataset: Dataset, options: TrainOptions, folder: Path
    ) -> None:
        assert head.shape.num_slots <= options.size.labels, "a slot without a label has nothing to be fitted on"
        self._device = str(head.slots.device)
        is_short = has_bfloat16(self._device)
        self._autocast = torch.autocast(self._device.split(":")[0], dtype=torch.bfloat16, enabled=is_short)
        # In the types that training reads: views where the target has them.
        self._target = replace(
            target,
            input_embedding=target.input_embedding.to(self._device),
            output_embedding=target.output_embedding.to(self._device, torch.bfloat16 if is_short else torch.float32),
        )
        self.head = head
        self._dataset, self._options, self._folder = dataset, options, folder
        self._optimizer = make_optimizer(head, options)
        self._settings = {**asdict(options), "shape": asdict(head.shape)}
        self._checkpoint = load_checkpoint(folder, head, self._optimizer, self._settings)
        self.state = self._checkpoint.state
        self._held = dataset.held_out(_HELD_OUT_ANSWERS)
        greedy = [record for record in self._held if record.temperature == 0.0] or self._held
        self._replayed = greedy[:_REPLAYED_ANSWERS]

    def run(self, *, shows_progress: bool) -> TrainState:
        """Train to the end, and leave the best weights in `head`.

        Raises: StartupError when something cannot be written, or the loss is no number.
        """
        state, steps = self.state, self._options.steps
        eval_every = max(10, steps // _EVALUATIONS)
        began = time.monotonic() - state.elapsed_s
        with tqdm(total=steps, initial=state.step, unit="step", desc="training", disable=not shows_progress) as bar:
            while state.step < steps:
                loss = self._step()
                bar.set_postfix(loss=f"{loss:.3f}", accepted=f"{state.best_acceptance:.2f}", refresh=False)
                bar.update()
                if state.step % eval_every == 0 or state.step == steps:
                    self._evaluate(loss)
                    state.elapsed_s = time.monotonic() - began
                    save_checkpoint(self._folder, self._checkpoint, self.head, self._optimizer, self._settings)
        self.head.load_state_dict(self._checkpoint.best)
        return state

    def coupling(self) -> Coupling:
        """How much the noise says beside the trained head's estimates, fitted on what is held out."""
        sampled = [record for record in self._dataset.held_out(_COUPLED_ANSWERS) if record.temperature > 0.0]
        draws = draws_of(self.head, self._target, sampled, self._options.size, self._autocast)
        return fit(self.head.shape.num_slots, draws)

    def _step(self) -> float:
        """One batch. Returns its surprise in nats a token."""
        batch = self._dataset.batch(self.state.step).to(self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.lr * self._rate()
        self._optimizer.zero_grad(set_to_none=True)
        loss = surprise(self.head, self._target, batch, self._autocast)
        nn.utils.clip_grad_norm_(self.head.parameters(), _CLIP_NORM)
        self._optimizer.step()
        self.state.step += 1
        return loss

    def _rate(self) -> float:
        """Factor of the learning rate: warm-up, then a cosine."""
        step, steps = self.state.step, self._options.steps
        warm = min(1.0, (step + 1) / max(1, min(_WARM_UP, steps // 4)))
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        return warm * (_LEAST_RATE + (1.0 - _LEAST_RATE) * cosine)

    def _evaluate(self, training_loss: float) -> None:
        """Measure on what is held out, and keep the weights if they are the best so far."""
        state, size = self.state, self._options.size
        losses = []
        stream = np.random.default_rng(0)  # the same places in every evaluation
        with torch.no_grad():
            for first in range(0, len(self._held), size.rows):
                batch = collate(self._held[first : first + size.rows], size, stream, is_hiding=False)
                losses.append(surprise(self.head, self._target, batch.to(self._device), self._autocast))
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss):
            raise StartupError(
                f"training diverged by step {state.step}: the held-out loss is {loss}; lower the learning rate, "
                "and train from the start in another folder"
            )
        with self._autocast:
            accepted = acceptance_length(self.head, self._target, self._replayed, _REPLAYED_NODES)
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.best_acceptance = loss, state.step, accepted
            self._checkpoint.best = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}
        found = {"loss": training_loss, "held_out_loss": loss, "acceptance_length": accepted}
        self._checkpoint.log.append({"step": state.step, **{name: round(value, 5) for name, value in found.items()}})


def make_optimizer(head: Head, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW; weight decay pulls on matrices only."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in head.named_parameters():
        (free if parameter.ndim < 2 or name in _NOT_DECAYED else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=_BETAS)
