"""What `foretoken train-ctc` does with its flags: prompts, answers, training, head, and a word about each."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from drafters.drafter import DrafterOptions, TreeDrafter
from drafters.head.files import FileError
from drafters.head.head import Head, HeadShape
from drafters.head.store import HeadError, HeadInfo, save_head
from drafters.ngram.source import NgramFiles
from drafters.ngram.table import TableError, tokenizer_fingerprint
from server.config import Settings, SettingsError
from server.errors import StartupError
from server.model_files import locate, read
from server.worker.loading import load_verifier
from training.answers import pays_to_compile
from training.build_trigram import Reader
from training.checkpoint import CheckpointError, Standing
from training.dataset import BatchSize, Dataset
from training.journal import draw
from training.objective import Objective
from training.own_answers import OwnAnswers, Tally
from training.own_prompts import Asked, read_asks
from training.shards import DataPlan, ShardError, Shelf
from training.teacher import Target, explains
from training.train import CHECKPOINT_FILE, JOURNAL_FILE, Trainer, TrainError, TrainOptions
from verifier.fingerprint import model_fingerprint
from verifier.model import ModelError
from verifier.runner import Verifier

PICTURE_FILE, ANSWERS_FOLDER = "training.png", "answers"
_ANSWER_SHARE = 0.4
"""Part of --minutes that goes into writing answers."""
_MOST_STEPS = 10**6
_LEAST_WIDTH, _MOST_WIDTH = 256, 1024
"""A narrower head guesses markedly worse, whatever the target; a wider one costs more than it wins."""
_EVALUATIONS = 20
_CHECKED_ANSWERS = 64
_CPU_ROWS, _GPU_ROWS = 16, 64
_CPU_POSITIONS, _GPU_POSITIONS = 512, 4096


def train(arguments: argparse.Namespace) -> int:
    """Run both stages, as far as they are not done, and print what came out. Returns the exit code.

    Raises: StartupError in one line; what is finished stays on disk.
    """
    try:
        return _run(arguments)
    except (FileError, ShardError, CheckpointError, TrainError, HeadError, TableError, ModelError) as error:
        raise StartupError(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise SettingsError(f"--out: {out} is not a folder")
    folder = locate(arguments.model, arguments.revision)
    reader = Reader(read(folder))
    fingerprint = model_fingerprint(arguments.model, arguments.revision)
    asked = read_asks(
        [Path(file) for file in arguments.data], reader, arguments.answers, arguments.separator, arguments.seed
    )
    for line in asked.reading.malformed:
        print(f"left out: {line}", file=sys.stderr)
    verifier = _load(arguments, asked)
    embeddings = verifier.shared_weights
    _shape_for(arguments, embeddings)  # a width that cannot be is told before an hour of answers
    plan = DataPlan(
        fingerprint=fingerprint,
        corpus=asked.digest,
        num_answers=len(asked.asks),
        max_tokens=arguments.max_tokens,
        window=arguments.window,
        hidden_size=embeddings.hidden_size,
        seed=arguments.seed,
    )
    least_mib = math.ceil(plan.shard_bytes / 2**20)
    if arguments.max_data_mib < least_mib:
        raise SettingsError(f"--max-data-mib: one shard may take {least_mib}, got {arguments.max_data_mib}")
    answers = Path(arguments.answers_dir) if arguments.answers_dir else out / ANSWERS_FOLDER
    shelf = Shelf(answers, plan, arguments.max_data_mib * 2**20)
    for line in shelf.damaged:
        print(line, file=sys.stderr)
    tally = _write_answers(arguments, verifier, reader, shelf, asked)
    device = verifier.geometry.device
    del verifier  # its K/V memory; the embeddings stay
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    trainer, standing = _train(arguments, embeddings, shelf, device)
    training = {**asdict(standing), "steps": arguments.steps, "minutes": arguments.minutes, "answers": plan.num_answers}
    info = HeadInfo(
        shape=trainer.head.shape,
        objective=arguments.objective,
        model=folder.resolve().name if Path(arguments.model).is_dir() else arguments.model,
        fingerprint=fingerprint,
        training={**training, "seed": arguments.seed, "batch": arguments.batch},
        coupling=trainer.coupling(),
    )
    save_head(out, trainer.head, info)
    draw(out / JOURNAL_FILE, out / PICTURE_FILE)
    print("\n".join(_lines(asked, shelf, tally, standing, out)))
    return 0


def _load(arguments: argparse.Namespace, asked: Asked) -> Verifier:
    """The target, with room for the longest prompt only where the user says so."""
    is_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    settings = Settings(
        model=arguments.model,
        revision=arguments.revision,
        device=arguments.device,
        threads=arguments.threads,
        max_model_len=arguments.max_model_len,
        max_num_seqs=min(len(asked.asks), _GPU_ROWS if is_gpu else _CPU_ROWS),
        max_num_batched_tokens=_GPU_POSITIONS if is_gpu else _CPU_POSITIONS,
        compile=pays_to_compile(len(asked.asks), arguments.max_tokens),
    )
    return load_verifier(settings)


def _write_answers(
    arguments: argparse.Namespace, verifier: Verifier, reader: Reader, shelf: Shelf, asked: Asked
) -> Tally:
    """Stage one, if the shelf lacks anything."""
    has_begun_training = (Path(arguments.out) / CHECKPOINT_FILE).exists()
    was_cut_short = bool(arguments.minutes) and has_begun_training and not shelf.damaged
    if len(shelf.done) == shelf.plan.num_shards or shelf.is_full or was_cut_short:
        return Tally()
    geometry = verifier.geometry
    files = NgramFiles(
        table=arguments.trigram_table,
        fingerprint=tokenizer_fingerprint(reader.vocab) if arguments.trigram_table else "",
    )
    options = DrafterOptions(vocab_size=geometry.vocab_size, max_rows=geometry.max_rows, files=files)
    drafter = TreeDrafter(options).views()["hybrid"]
    stop_ids = tuple(token for token in reader.eos_ids if token < geometry.vocab_size)
    stage = OwnAnswers(verifier, drafter, shelf, asked.asks, stop_ids)
    budget_s = arguments.minutes * 60.0 * _ANSWER_SHARE
    return stage.run(budget_s=budget_s, least=4 * arguments.batch, shows_progress=not arguments.quiet)


def _train(arguments: argparse.Namespace, target: Target, shelf: Shelf, device: str) -> tuple[Trainer, Standing]:
    """Stage two."""
    shape = _shape_for(arguments, target)
    size = BatchSize(rows=arguments.batch, labels=arguments.slots)
    dataset = Dataset(shelf, size, arguments.seed)
    is_taught = explains(target, dataset.held_out(_CHECKED_ANSWERS))
    if not is_taught:
        print("the model's logits are not what its states say: heads learn from its tokens alone", file=sys.stderr)
    steps = _MOST_STEPS if arguments.minutes else arguments.steps
    options = TrainOptions(
        steps=steps,
        budget_s=arguments.minutes * 60.0 * (1.0 - _ANSWER_SHARE),
        lr=arguments.lr or 2e-3 * math.sqrt(256 / shape.width),
        warm_up=min(50, max(1, steps // 4)),
        eval_every=100 if arguments.minutes else max(10, steps // _EVALUATIONS),
        seed=arguments.seed,
        size=size,
        objective=Objective(is_independent=arguments.objective == "ce", is_taught=is_taught),
    )
    torch.manual_seed(arguments.seed)
    head = Head(shape).to(device)
    # The plan does not say how much of it there is: another bound on the data would mix what is held out with the rest.
    data_key = f"{shelf.plan.key}, {dataset.num_training} answers, {dataset.num_held_out} held out"
    trainer = Trainer(head, target, dataset, options, Path(arguments.out), data_key=data_key)
    return trainer, trainer.run(shows_progress=not arguments.quiet)


def _shape_for(arguments: argparse.Namespace, target: Target) -> HeadShape:
    vocab_size, hidden_size = target.output_embedding.shape
    return head_shape(arguments, (vocab_size, target.input_embedding.shape[1], hidden_size))


def head_shape(arguments: argparse.Namespace, sizes: tuple[int, int, int]) -> HeadShape:
    """The head's shape for a target with (V, E, H). Raises: SettingsError for a width that cannot be."""
    vocab_size, embed_size, hidden_size = sizes
    width = arguments.width or max(_LEAST_WIDTH, min(hidden_size, _MOST_WIDTH) // 16 * 16)
    num_heads = 8 if width >= 384 else 4
    if width % (2 * num_heads):
        raise SettingsError(f"--width: must be a multiple of {2 * num_heads}, got {width}")
    return HeadShape(
        vocab_size=vocab_size,
        embed_size=embed_size,
        hidden_size=hidden_size,
        width=width,
        num_layers=arguments.layers,
        num_heads=num_heads,
        ffn_size=3 * width,
        num_slots=arguments.slots,
        window=arguments.window,
        bias_rank=arguments.bias_rank,
    )


def _lines(asked: Asked, shelf: Shelf, tally: Tally, standing: Standing, out: Path) -> list[str]:
    reading = asked.reading
    lines = [
        f"corpus        {reading.num_documents:,} documents, {len(asked.asks):,} prompts",
        f"answers       {tally.num_answers:,} written now in {tally.seconds:.0f} s ({tally.num_tokens:,} tokens), "
        f"{shelf.num_bytes / 2**20:.0f} MiB kept in {shelf.folder}",
        f"training      {standing.step:,} steps in {standing.elapsed_s:.0f} s, best at {standing.best_step:,}",
        f"held out      {standing.best_loss:.3f} nats a token, acceptance length {standing.best_acceptance:.2f}",
        f"head          {out}",
    ]
    if tally.end:
        lines.append(f"cut short     {tally.end}")
    if tally.num_failed or tally.num_too_long:
        lines.append(f"not answered  {tally.num_failed} failed, {tally.num_too_long} prompts too long")
    if reading.num_malformed:
        lines.append(f"malformed     {reading.num_malformed} lines left out")
    return lines
