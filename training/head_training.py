"""What `foretoken train-ctc` does with its flags: prompts, answers, training, head, and a word about each."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from drafters.head.files import FileError
from drafters.head.head import Head, HeadShape
from drafters.head.store import HeadError, HeadInfo, save_head
from server.config import Settings, SettingsError
from server.errors import StartupError
from server.model_files import locate, read
from training.answer_store import AnswerStore, DataPlan, ShardError
from training.answer_writer import AnswerWriter, load_target
from training.checkpoint import CheckpointError, TrainState
from training.dataset import BatchSize, Dataset, draft_tokens
from training.objective import Objective
from training.prompts import PromptSet, corpus_prompts
from training.store_filler import StoreFiller, WritingStats
from training.teacher import Target, explains
from training.text import TextEncoder
from training.train import CHECKPOINT_FILE, LOG_FILE, Trainer, TrainError, TrainOptions
from training.train_log import plot
from verifier.fingerprint import model_fingerprint
from verifier.model import ModelError

PLOT_FILE, ANSWERS_FOLDER = "training.png", "answers"
_ANSWER_SHARE = 0.4
"""Part of --minutes that goes into writing answers."""
_MOST_STEPS = 10**6
_LEAST_WIDTH, _MOST_WIDTH = 256, 1024
"""A narrower head guesses markedly worse, whatever the target; a wider one costs more than it wins."""
_EVALUATIONS = 20
_CHECKED_ANSWERS = 64


def train(arguments: argparse.Namespace) -> int:
    """Run both stages, as far as they are not done, and print what came out. Returns the exit code.

    Raises: StartupError in one line; what is finished stays on disk.
    """
    try:
        return _run(arguments)
    except (FileError, ShardError, CheckpointError, TrainError, HeadError, ModelError) as error:
        raise StartupError(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise SettingsError(f"--out: {out} is not a folder")
    folder = locate(arguments.model, arguments.revision)
    encoder = TextEncoder(read(folder))
    fingerprint = model_fingerprint(arguments.model, arguments.revision)
    files = [Path(file) for file in arguments.data]
    prompt_set = corpus_prompts(files, encoder, arguments.answers, arguments.separator, arguments.seed)
    for line in prompt_set.corpus.malformed:
        print(f"left out: {line}", file=sys.stderr)
    target = load_target(_settings(arguments), len(prompt_set.prompts), arguments.max_tokens)
    embeddings, device = target.shared_weights, target.geometry.device
    shape = _head_shape(arguments, embeddings)  # a width that cannot be is told before an hour of answers
    store = _open_store(arguments, prompt_set, fingerprint, embeddings.hidden_size)
    stats = WritingStats()
    if _lacks_answers(arguments, store):
        plan = store.plan
        writer = AnswerWriter(target, max_tokens=plan.max_tokens, eos_ids=encoder.eos_ids, window=plan.window)
        budget_s, least = arguments.minutes * 60.0 * _ANSWER_SHARE, 4 * arguments.batch
        filler = StoreFiller(store, prompt_set.prompts)
        stats = filler.fill(writer, budget_s=budget_s, least=least, shows_progress=not arguments.quiet)
        del writer
    del target  # its K/V memory; the embeddings stay
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    trainer = _trainer(arguments, shape, embeddings, store, device)
    state = trainer.run(shows_progress=not arguments.quiet)
    settings = {name: getattr(arguments, name) for name in ("steps", "minutes", "seed", "batch")}
    info = HeadInfo(
        shape=shape,
        model=folder.resolve().name if Path(arguments.model).is_dir() else arguments.model,
        fingerprint=fingerprint,
        training={**asdict(state), **settings, "answers": store.plan.num_answers},
        coupling=trainer.coupling(),
    )
    save_head(out, trainer.head, info)
    plot(out / LOG_FILE, out / PLOT_FILE)
    print("\n".join(_lines(prompt_set, store, stats, state, out)))
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """The target's settings, with room for the longest prompt only where the user says so."""
    names = ("model", "revision", "device", "threads", "max_model_len")
    return Settings(**{name: getattr(arguments, name) for name in names})


def _open_store(
    arguments: argparse.Namespace, prompt_set: PromptSet, fingerprint: str, hidden_size: int
) -> AnswerStore:
    """The answers that there are. Raises: SettingsError, ShardError."""
    plan = DataPlan(
        fingerprint=fingerprint,
        corpus=prompt_set.digest,
        num_answers=len(prompt_set.prompts),
        max_tokens=arguments.max_tokens,
        window=arguments.window,
        hidden_size=hidden_size,
        seed=arguments.seed,
    )
    least_mib = math.ceil(plan.shard_bytes / 2**20)
    if arguments.max_data_mib < least_mib:
        raise SettingsError(f"--max-data-mib: one shard may take {least_mib}, got {arguments.max_data_mib}")
    folder = Path(arguments.answers_dir or Path(arguments.out) / ANSWERS_FOLDER)
    store = AnswerStore(folder, plan, arguments.max_data_mib * 2**20)
    for line in store.damaged:
        print(line, file=sys.stderr)
    return store


def _lacks_answers(arguments: argparse.Namespace, store: AnswerStore) -> bool:
    """Whether answers are to be written: not where training has begun on those for which there was time."""
    has_begun_training = (Path(arguments.out) / CHECKPOINT_FILE).exists()
    was_cut_short = bool(arguments.minutes) and has_begun_training and not store.damaged
    return not (store.is_complete or store.is_full or was_cut_short)


def _trainer(
    arguments: argparse.Namespace, shape: HeadShape, target: Target, store: AnswerStore, device: str
) -> Trainer:
    """Stage two, where its checkpoint stands. Raises: ShardError, CheckpointError, FileError."""
    size = BatchSize(rows=arguments.batch, labels=arguments.slots)
    dataset = Dataset(store, size, arguments.seed)
    listed = draft_tokens(dataset.token_counts(shape.vocab_size), shape.num_drafted)
    is_taught = explains(target, dataset.held_out(_CHECKED_ANSWERS))
    if not is_taught:
        print("the model's logits are not what its states say: heads learn from its tokens alone", file=sys.stderr)
    steps = _MOST_STEPS if arguments.minutes else arguments.steps
    options = TrainOptions(
        steps=steps,
        budget_s=arguments.minutes * 60.0 * (1.0 - _ANSWER_SHARE),
        lr=arguments.lr or 2e-3 * math.sqrt(256 / shape.width),  # wider layers take smaller steps
        warm_up=min(50, max(1, steps // 4)),
        eval_every=100 if arguments.minutes else max(10, steps // _EVALUATIONS),
        seed=arguments.seed,
        size=size,
        objective=Objective(is_taught=is_taught),
    )
    torch.manual_seed(arguments.seed)
    head = Head(shape, torch.from_numpy(listed)).to(device)
    # The plan does not say how much of it there is: another bound on the data would mix what is held out with the rest.
    data_key = f"{store.plan.key}, {dataset.num_training} answers, {dataset.num_held_out} held out"
    return Trainer(head, target, dataset, options, Path(arguments.out), data_key=data_key)


def _head_shape(arguments: argparse.Namespace, target: Target) -> HeadShape:
    """The head's shape for a target. Raises: SettingsError for a width that cannot be."""
    vocab_size, hidden_size = target.output_embedding.shape
    width = arguments.width or max(_LEAST_WIDTH, min(hidden_size, _MOST_WIDTH) // 16 * 16)
    num_heads = 8 if width >= 384 else 4
    if width % (2 * num_heads):
        raise SettingsError(f"--width: must be a multiple of {2 * num_heads}, got {width}")
    return HeadShape(
        vocab_size=vocab_size,
        embed_size=target.input_embedding.shape[1],
        hidden_size=hidden_size,
        width=width,
        num_layers=arguments.layers,
        num_heads=num_heads,
        ffn_size=3 * width,
        num_slots=arguments.slots,
        window=arguments.window,
        draft_vocab_size=arguments.draft_vocab if arguments.draft_vocab < vocab_size else 0,
    )


def _lines(prompt_set: PromptSet, store: AnswerStore, stats: WritingStats, state: TrainState, out: Path) -> list[str]:
    corpus = prompt_set.corpus
    lines = [
        f"corpus        {corpus.num_documents:,} documents, {len(prompt_set.prompts):,} prompts",
        f"answers       {stats.num_answers:,} written now in {stats.seconds:.0f} s ({stats.num_tokens:,} tokens), "
        f"{store.num_bytes / 2**20:.0f} MiB kept in {store.folder}",
        f"training      {state.step:,} steps in {state.elapsed_s:.0f} s, best at {state.best_step:,}",
        f"held out      {state.best_loss:.3f} nats a token, acceptance length {state.best_acceptance:.2f}",
        f"head          {out}",
    ]
    if stats.end:
        lines.append(f"cut short     {stats.end}")
    if stats.num_failed or stats.num_too_long:
        lines.append(f"not answered  {stats.num_failed} failed, {stats.num_too_long} prompts too long")
    if corpus.num_malformed:
        lines.append(f"malformed     {corpus.num_malformed} lines left out")
    return lines
