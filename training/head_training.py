"""What `foretoken train-ctc` does with its flags: prompts, answers, training, head, and a word about each."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from drafters.head.files import FileError
from drafters.head.head import Head, HeadShape
from drafters.head.store import HeadInfo, save_head
from server.config import Settings, SettingsError
from server.errors import StartupError
from server.model_files import locate, read
from training.answer_store import AnswerStore, DataPlan
from training.answer_writer import AnswerWriter, load_target
from training.checkpoint import TrainState
from training.corpus_reader import CorpusStats
from training.dataset import BatchSize, Dataset
from training.prompts import AnswerPrompt, corpus_prompts, digest_of
from training.store_filler import WritingStats, fill_store
from training.text import TextEncoder
from training.train import Trainer, TrainOptions
from verifier.fingerprint import model_fingerprint
from verifier.model import ModelError
from verifier.weights import SharedWeights

ANSWERS_FOLDER = "answers"
_LEAST_WIDTH, _MOST_WIDTH = 256, 1024
"""A narrower head guesses markedly worse, whatever the target; a wider one costs more than it wins."""


def train(arguments: argparse.Namespace) -> int:
    """Run both stages, as far as they are not done, and print what came out. Returns the exit code.

    Raises: StartupError in one line; what is finished stays on disk.
    """
    # Autocast runs norms of bfloat16 states with float32 weights; torch warns that this is not its fastest way.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    try:
        return _run(arguments)
    except (FileError, ModelError) as error:
        raise StartupError(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise SettingsError(f"--out: {out} is not a folder")
    folder = locate(arguments.model, arguments.revision)
    encoder = TextEncoder(read(folder))
    fingerprint = model_fingerprint(arguments.model, arguments.revision)
    files = [Path(file) for file in arguments.data]
    prompts, corpus = corpus_prompts(files, encoder, arguments.answers, arguments.separator, arguments.seed)
    for line in corpus.malformed:
        print(f"left out: {line}", file=sys.stderr)
    names = ("model", "revision", "device", "threads", "max_model_len")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    target = load_target(settings, len(prompts), arguments.max_tokens)
    embeddings, device = target.shared_weights, target.geometry.device
    shape = _head_shape(arguments, embeddings)  # a width that cannot be is told before an hour of answers
    facts = {"hidden_size": embeddings.hidden_size, "max_model_len": target.geometry.max_model_len}
    store = _open_store(arguments, prompts, fingerprint=fingerprint, **facts)
    writer = AnswerWriter(target, max_tokens=arguments.max_tokens, eos_ids=encoder.eos_ids, window=arguments.window)
    stats = fill_store(store, prompts, writer, shows_progress=not arguments.quiet)
    del writer
    del target  # its K/V memory; the embeddings stay
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    trainer = _trainer(arguments, shape, embeddings, store, device)
    state = trainer.run(shows_progress=not arguments.quiet)
    flags = {name: getattr(arguments, name) for name in ("steps", "seed", "batch")}
    info = HeadInfo(
        shape=shape,
        model=folder.resolve().name if Path(arguments.model).is_dir() else arguments.model,
        fingerprint=fingerprint,
        training={**asdict(state), **flags, "answers": store.plan.num_answers},
        coupling=trainer.coupling(),
    )
    save_head(out, trainer.head, info)
    print("\n".join(_lines(corpus, store, stats, state, out)))
    return 0


def _open_store(arguments: argparse.Namespace, prompts: Sequence[AnswerPrompt], **facts: Any) -> AnswerStore:
    """The answers that there are. `facts`: what a DataPlan says of the target. Raises: StartupError."""
    given = {name: getattr(arguments, name) for name in ("max_tokens", "window", "seed")}
    plan = DataPlan(corpus=digest_of(prompts), num_answers=len(prompts), **given, **facts)
    store = AnswerStore(Path(arguments.answers_dir or Path(arguments.out) / ANSWERS_FOLDER), plan)
    for line in store.damaged:
        print(line, file=sys.stderr)
    return store


def _trainer(
    arguments: argparse.Namespace, shape: HeadShape, target: SharedWeights, store: AnswerStore, device: str
) -> Trainer:
    """Stage two, where its checkpoint stands. Raises: StartupError."""
    size = BatchSize(rows=arguments.batch, labels=arguments.slots)
    dataset = Dataset(store, size, arguments.seed)
    options = TrainOptions(
        steps=arguments.steps,
        lr=arguments.lr or 2e-3 * math.sqrt(256 / shape.width),  # wider layers take smaller steps
        seed=arguments.seed,
        size=size,
        data=store.plan.key,
    )
    torch.manual_seed(arguments.seed)
    head = Head(shape, torch.from_numpy(dataset.draft_tokens(shape.vocab_size, shape.num_drafted))).to(device)
    return Trainer(head, target, dataset, options, Path(arguments.out))


def _head_shape(arguments: argparse.Namespace, target: SharedWeights) -> HeadShape:
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


def _lines(corpus: CorpusStats, store: AnswerStore, stats: WritingStats, state: TrainState, out: Path) -> list[str]:
    lines = [
        f"corpus        {corpus.num_documents:,} documents, {store.plan.num_answers:,} prompts",
        f"answers       {stats.num_answers:,} written now in {stats.seconds:.0f} s ({stats.num_tokens:,} tokens), "
        f"kept in {store.folder}",
        f"training      {state.step:,} steps in {state.elapsed_s:.0f} s, best at {state.best_step:,}",
        f"held out      {state.best_loss:.3f} nats a token, acceptance length {state.best_acceptance:.2f}",
        f"head          {out}",
    ]
    if stats.num_left_out:
        lines.append(f"not answered  {stats.num_left_out:,}: the prompt is too long, or the answer failed")
    if corpus.num_malformed:
        lines.append(f"malformed     {corpus.num_malformed} lines left out")
    return lines
