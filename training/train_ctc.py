"""`foretoken train-ctc`: a CTC head for a model, in one command: the model's own answers first, then the training."""

from __future__ import annotations

import argparse
import os

from server.config import SettingsError
from server.gguf import resolve

OBJECTIVES = ("ctc", "ce")
_MOST_STEPS = 10**6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken train-ctc`."""
    add = parser.add_argument
    add("--model", required=True, help="folder, GGUF file or Hub id of the model that the head is for")
    add("--revision", default="", help="branch, tag or commit of a Hub model")
    add("--data", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, as of build-trigram: what is asked")
    add("--out", required=True, metavar="DIR", help="folder of the head; a run that was killed goes on there")
    add("--objective", choices=OBJECTIVES, default="ctc", help="ce: independent guesses, the baseline [%(default)s]")
    add("--answers", type=int, default=3000, metavar="N", help="most answers the model writes [%(default)s]")
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer [%(default)s]")
    add("--answers-dir", default="", metavar="DIR", help="where answers are kept, to train on them again [OUT/answers]")
    add("--max-data-mib", type=int, default=4096, metavar="MIB", help="bound on the kept answers [%(default)s]")
    add("--trigram-table", default="", metavar="TABLE", help="makes the writing faster")
    add("--steps", type=int, default=800, metavar="N", help="training steps [%(default)s]")
    add("--minutes", type=float, default=0.0, metavar="M", help="time for all, in place of --steps: 40%% for answers")
    add("--batch", type=int, default=16, metavar="N", help="answers of a step [%(default)s]")
    add("--lr", type=float, default=0.0, help="highest learning rate; 0: by the width [%(default)s]")
    add("--width", type=int, default=0, metavar="D", help="of the head; 0: the model's, 256 to 1024 [%(default)s]")
    add("--layers", type=int, default=2, metavar="L", help="of the head [%(default)s]")
    add("--slots", type=int, default=8, metavar="T", help="frames of one pass [%(default)s]")
    add("--window", type=int, default=64, metavar="W", help="tokens the head looks back at [%(default)s]")
    add("--bias-rank", type=int, default=64, metavar="R", help="of the previous-token bias; 0: none [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[%(default)s]")
    add("--max-model-len", type=int, default=0, metavar="N", help="context while answers are written; 0: the model's")
    add(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="of the CPU; 0: all to train, all but one to write answers [%(default)s]",
    )
    add("--separator", default="<|endoftext|>", help="parts the documents of a .txt file [%(default)s]")
    add("--seed", type=int, default=0, help="[%(default)s]")
    add("--quiet", action="store_true", help="no progress bars")


_LIMITS = {
    "answers": (2, 10**7), "max_tokens": (2, 2**16), "max_data_mib": (1, 2**30), "steps": (1, _MOST_STEPS),
    "batch": (1, 4096), "width": (0, 8192), "layers": (1, 8), "slots": (1, 16), "window": (1, 4096),
    "bias_rank": (0, 1024), "max_model_len": (0, 2**24), "threads": (0, 1024), "seed": (0, 2**31),
    "minutes": (0.0, 1e5), "lr": (0.0, 1.0),
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Write answers, train, and say what came out."""
    for name, (low, high) in _LIMITS.items():
        value = getattr(arguments, name)
        if not low <= value <= high:  # also refuses NaN
            raise SettingsError(f"--{name.replace('_', '-')}: must be {low} to {high}, got {value}")
    arguments.model = resolve(arguments.model)
    # Threads that wait must sleep: where another program takes a core, threads that spin for it were 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from training.head_training import train  # here: help and mistakes need not wait for torch

    return train(arguments)
