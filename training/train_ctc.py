"""`foretoken train-ctc`: a CTC head for a model, in one command: the model's own answers first, then the training."""

from __future__ import annotations

import argparse
import os

from server.gguf import resolve
from training.flags import add_shared, check_limits

_LIMITS = {  # of window and slots: drafters.rows, what a server has at hand; importing it takes half a second
    "answers": (2, 10**7), "max_tokens": (2, 2**16), "steps": (1, 10**6), "batch": (1, 4096), "lr": (0.0, 1.0),
    "width": (0, 8192), "layers": (1, 8), "slots": (1, 32), "window": (1, 511), "draft_vocab": (0, 2**20),
    "max_model_len": (0, 2**24), "threads": (0, 1024), "seed": (0, 2**31),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken train-ctc`."""
    add = parser.add_argument
    add("--model", required=True, help="folder, GGUF file or Hub id of the model that the head is for")
    add("--data", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, as of build-trigram: what is asked")
    add("--out", required=True, metavar="DIR", help="folder of the head; a run that was killed goes on there")
    add("--answers", type=int, default=3000, metavar="N", help="most answers the model writes [%(default)s]")
    add("--answers-dir", default="", metavar="DIR", help="where answers are kept, for several heads [OUT/answers]")
    add("--steps", type=int, default=800, metavar="N", help="training steps [%(default)s]")
    add("--batch", type=int, default=16, metavar="N", help="answers of a step [%(default)s]")
    add("--lr", type=float, default=0.0, help="highest learning rate; 0: by the width [%(default)s]")
    add("--width", type=int, default=0, metavar="D", help="of the head; 0: the model's, 256 to 1024 [%(default)s]")
    add("--layers", type=int, default=2, metavar="L", help="of the head [%(default)s]")
    add("--slots", type=int, default=8, metavar="T", help="frames of one pass [%(default)s]")
    add("--window", type=int, default=64, metavar="W", help="tokens the head looks back at [%(default)s]")
    add("--draft-vocab", type=int, default=8192, metavar="N", help="tokens it can guess; 0: all [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[%(default)s]")
    add("--max-model-len", type=int, default=0, metavar="N", help="context while answers are written; 0: the model's")
    add("--threads", type=int, default=0, metavar="N", help="0: all cores, all but one while answers are written [0]")
    add("--seed", type=int, default=0, help="[%(default)s]")
    add_shared(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write answers, train, and say what came out."""
    check_limits(arguments, _LIMITS)
    arguments.model = resolve(arguments.model)
    # Threads that wait must sleep: where another program takes a core, threads that spin for it were 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from training.head_training import train  # here: help and mistakes need not wait for torch

    return train(arguments)
