"""What the CTC-drafter paper's 1.36x over Medusa measures: the trunk, the loss, the collapse, or what comes on top.

Run: python -m tests.bench.head_trunks --model DIR --answers DIR --out DIR [--steps 400] [--bias 0 64] [--seed 0]
       [--trunks published medusa context ours] [--objectives ce ctc-8 ctc-12] [--nodes 8 16 64]

ANSWERS is a folder of answers that `foretoken train-ctc --model DIR` wrote. All heads are trained on the same ones, in
the same batches and steps, by the project's trainer, and replayed on held-out ones (a tenth, by text) without the
target's noise; no tree is deeper than the 8 labels. All trunks share the target's output embedding, and have the
project's residual, blank and, with --bias, previous-token bias:

  published  Medusa's heads (arXiv 2401.10774): of the last state alone, one residual block and output matrix a slot
  medusa     four blocks a slot, of the last state and the last token; about as many weights as the next two
  context    the project's head, but no slot sees another
  ours       the project's head

Objectives: ce (frame k guesses token k) and ctc-T (T frames); ctc-T-held is helped to blanks for half of the steps. A
ctc head is also asked for trees that are not collapsed. Heads found in OUT are not trained again. Prints a table with
ratios over ce on the same trunk and their standard error over the replayed answers; the last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from drafters.head.drafter import CtcOptions
from drafters.head.files import FileError, read_json
from drafters.head.frames import MAX_DEPTH
from drafters.head.head import Context, Head, HeadShape
from training.acceptance import acceptance_length
from training.checkpoint import CheckpointError
from training.dataset import BatchSize, Dataset, collate
from training.objective import Objective, Surprise, slot_states
from training.shards import MANIFEST, DataPlan, Record, ShardError, Shelf
from training.train import Trainer, TrainOptions
from verifier.fingerprint import model_fingerprint
from verifier.weights import SharedWeights, shared_weights

LABELS = 8
SIZE = BatchSize(labels=LABELS)
WIDTH = 128
HELD_OUT = 0.1
REPLAYED = 64
"""Most answers of each temperature."""
OBJECTIVES = {"ce": LABELS, "ctc-8": 8, "ctc-12": 12, "ctc-12-held": 12}
"""How many frames each one has."""
TEMPERATURES = (0.0, 1.0)
Key = tuple[float, int]
"""A temperature and the most nodes of a tree."""


class Answers(Dataset):
    """Holds more out than training itself does: differences are small."""

    def _held_out(self, documents: Sequence[int], least: int) -> set[int]:
        return super()._held_out(documents, max(least, math.ceil(HELD_OUT * len(documents))))


class Blocks(nn.Module):
    """A residual block for each slot: x + silu(W x + b), zero to begin with, as published."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape.num_slots, shape.width, shape.width))
        self.bias = nn.Parameter(torch.zeros(shape.num_slots, shape.width))

    def forward(self, slots: Tensor) -> Tensor:
        return slots + functional.silu(torch.einsum("ratd,tde->rate", slots, self.weight) + self.bias)


class MedusaHead(Head):
    """Slots that see the anchor's feature and nothing else."""

    num_blocks = 4

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.layers = nn.ModuleList(Blocks(shape) for _ in range(self.num_blocks))
        del self.context_kv

    def context(self, features: Tensor, positions: Tensor) -> Context:
        return Context(features, features)  # never looked at

    def frames(
        self, anchors: Tensor, positions: Tensor, temperatures: Tensor, context: Context, is_visible: Tensor
    ) -> Tensor:
        slots = anchors[:, :, None] + self.slots + temperatures[:, None, None, None] * self.heat
        for layer in self.layers:
            slots = layer(slots)
        return self.out_norm(slots)


class PublishedHead(MedusaHead):
    """Medusa as it is: one block, an output matrix per slot, and the last token is not told."""

    num_blocks = 1

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.own_output = nn.Parameter(torch.zeros(shape.num_slots, shape.vocab_size, shape.width))
        del self.from_token, self.token_norm

    def read(self, states: Tensor, embedded: Tensor) -> Tensor:
        return self.context_norm(self.from_state(self.state_norm(states)))

    def logits(self, frames: Tensor, output_embedding: Tensor) -> Tensor:
        own = torch.einsum("ntd,tvd->ntv", frames, self.own_output)
        return super().logits(frames, output_embedding) + functional.pad(own, (0, 1))


class ContextHead(Head):
    """Slots that see the context, but not each other."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)

        def without_slots(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            *others, mask = arguments
            return (*others, functional.pad(mask[..., : -shape.num_slots], (0, shape.num_slots), value=False))

        for layer in self.layers:
            layer.register_forward_pre_hook(without_slots)


TRUNKS = {"published": PublishedHead, "medusa": MedusaHead, "context": ContextHead, "ours": Head}


class HelpedTrainer(Trainer):
    """Adds to the score of the blank, which would begin unlikely; the help falls to nothing over half of the steps."""

    def _step(self) -> Surprise:
        help_left = math.log(self.head.shape.vocab_size) * max(0.0, 1.0 - 2.0 * self._progress())
        hook = self.head.to_blank.register_forward_hook(lambda _, __, scores: scores + help_left)
        try:
            return super()._step()
        finally:
            hook.remove()


class BoundedOptions(CtcOptions):
    """Trees no deeper than there are labels, however many frames there are."""

    def limits(self, head: Head) -> NDArray[np.float64]:
        limits = super().limits(head)
        limits[MAX_DEPTH] = LABELS
        return limits


@dataclass(slots=True)
class Cell:
    """One head asked for trees in one way. Owns what was measured."""

    name: dict[str, Any]
    blanks: list[float]
    """Mean probability of the blank, by frame."""
    steps: dict[Key, NDArray[np.float64]] = field(default_factory=dict)
    """Verify steps that each replayed answer took."""
    lengths: dict[Key, float] = field(default_factory=dict)
    """Acceptance lengths."""

    def over(self, base: Cell, key: Key) -> tuple[float, float]:
        """Ratio of the acceptance lengths, and its standard error over the answers (jackknife)."""
        mine, other = self.steps[key], base.steps[key]
        without = (other.sum() - other) / (mine.sum() - mine)
        return float(other.sum() / mine.sum()), math.sqrt((mine.size - 1) * float(without.var()))


@dataclass(frozen=True, slots=True)
class Bench:
    """All that the heads have in common."""

    arguments: argparse.Namespace
    target: SharedWeights
    dataset: Answers
    replayed: dict[float, list[Record]]

    def cells(self, trunk: str, objective: str, bias: int) -> Iterator[Cell]:
        """Train one head, and replay its trees."""
        head = self._trained(trunk, objective, bias)
        weights = sum(parameter.numel() for parameter in head.parameters())
        is_ce = objective == "ce"
        for tree in ["independent"] if is_ce else ["collapsed", "not collapsed"]:
            name = {"trunk": trunk, "objective": objective, "bias": bias, "tree": tree, "weights": weights}
            cell = Cell(name, [] if is_ce else self._blanks(head))
            options = BoundedOptions(is_independent=tree != "collapsed")
            for temperature, records in self.replayed.items():
                answers = [min(one.num_answer, one.states.shape[0]) - 1 for one in records]
                for nodes in self.arguments.nodes:
                    won = [acceptance_length(head, self.target, [one], nodes, options) for one in records]
                    steps = cell.steps[temperature, nodes] = np.array(answers) / won
                    cell.lengths[temperature, nodes] = round(sum(answers) / float(steps.sum()), 3)
            yield cell

    def _trained(self, trunk: str, objective: str, bias: int) -> Head:
        arguments, outputs = self.arguments, self.target.output_embedding
        shape = HeadShape(
            vocab_size=outputs.shape[0],
            embed_size=self.target.input_embedding.shape[1],
            hidden_size=outputs.shape[1],
            width=WIDTH,
            ffn_size=3 * WIDTH,
            num_slots=OBJECTIVES[objective],
            bias_rank=bias,
        )
        options = TrainOptions(
            steps=arguments.steps,
            lr=2e-3 * math.sqrt(256 / WIDTH),
            warm_up=min(50, max(1, arguments.steps // 4)),
            eval_every=arguments.steps,
            checkpoint_s=1e9,
            seed=arguments.seed,
            size=SIZE,
            objective=Objective(is_independent=objective == "ce"),
        )
        name = f"{trunk}-{objective}-{bias}-{WIDTH}-{arguments.steps}-{arguments.seed}"
        (arguments.out / name).mkdir(parents=True, exist_ok=True)
        torch.manual_seed(arguments.seed)
        maker = HelpedTrainer if objective.endswith("-held") else Trainer
        trainer = maker(TRUNKS[trunk](shape), self.target, self.dataset, options, arguments.out / name)
        trainer.run(shows_progress=False)
        return trainer.head.eval()

    def _blanks(self, head: Head) -> list[float]:
        records = [record for found in self.replayed.values() for record in found]
        batch = collate(records, SIZE, np.random.default_rng(0), is_hiding=False)
        with torch.inference_mode():
            slots = slot_states(head, self.target, batch)[batch.is_label[..., 0]]
            parts = [head.logits(part, self.target.output_embedding) for part in slots.split(256)]
            blanks = torch.cat([part.softmax(-1)[..., -1] for part in parts])
        return [round(mean, 4) for mean in blanks.mean(0).tolist()]


def row_of(cell: Cell, base: Cell, nodes: Sequence[int]) -> str:
    """A line of the table."""
    name = cell.name
    parts = [f"{name['trunk']}, bias {name['bias']}", f"{name['objective']}, {name['tree']}"]
    for temperature in TEMPERATURES:
        keys = [(temperature, size) for size in nodes]
        parts.append(" / ".join(f"{cell.lengths[key]:.2f}" for key in keys))
        ratios, errors = zip(*(cell.over(base, key) for key in keys), strict=True)
        shown = " / ".join(f"{ratio:.2f}" for ratio in ratios)
        parts.append("" if cell is base else f"{shown} (±{max(errors):.3f})")
    parts += [" ".join(f"{blank:.2f}" for blank in cell.blanks), f"{name['weights'] / 1e3:.0f}K"]
    return f"| {' | '.join(parts)} |"


def run(bench: Bench) -> dict[str, Any]:
    """All cells; prints the table."""
    arguments = bench.arguments
    nodes, over = " / ".join(str(size) for size in arguments.nodes), f"over {arguments.objectives[0]}"
    print(f"| trunk | objective, tree | greedy, {nodes} nodes | {over} | temperature 1 | {over} | blank | weights |")
    print("|---|---|---|---|---|---|---|---|")
    told: list[dict[str, Any]] = []
    for bias, trunk in itertools.product(arguments.bias, arguments.trunks):
        base: Cell | None = None
        for cell in (cell for objective in arguments.objectives for cell in bench.cells(trunk, objective, bias)):
            base = base or cell
            print(row_of(cell, base, arguments.nodes), flush=True)
            lengths = {f"{t:g}, {size}": length for (t, size), length in cell.lengths.items()}
            told.append({**cell.name, "blank_by_slot": cell.blanks, "acceptance_length": lengths})
    return {"steps": arguments.steps, "seed": arguments.seed, "cells": told}


def open_bench(arguments: argparse.Namespace) -> Bench:
    """Open the answers. Raises: FileError, ShardError when there are none, too few, or another model's."""
    plan = DataPlan(**read_json(arguments.answers / MANIFEST)["plan"])
    if plan.fingerprint != model_fingerprint(arguments.model):
        raise ShardError(f"--answers: {arguments.answers} holds the answers of another model than {arguments.model}")
    network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, trust_remote_code=False)
    dataset = Answers(Shelf(arguments.answers, plan), SIZE, arguments.seed)
    held = dataset.held_out(dataset.num_held_out)
    replayed = {t: [one for one in held if one.temperature == t][:REPLAYED] for t in TEMPERATURES}
    counts = " and ".join(f"{len(records)} of temperature {t:g}" for t, records in replayed.items())
    print(f"{dataset.num_training} answers to train on, {counts} replayed; {arguments.steps} steps", flush=True)
    return Bench(arguments, shared_weights(network, network.config.vocab_size), dataset, replayed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--answers", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="where the heads are kept")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--trunks", nargs="+", choices=list(TRUNKS), default=list(TRUNKS))
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=["ce", "ctc-8", "ctc-12"])
    parser.add_argument("--bias", nargs="+", type=int, default=[0, 64], help="ranks of the previous-token bias")
    parser.add_argument("--nodes", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    torch.set_num_threads(1)
    try:
        print(json.dumps(run(open_bench(parse()))))
    except (FileError, ShardError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
