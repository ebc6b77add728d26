"""Trains the demo model: task dialogues in, a small Llama-architecture chat model in Hugging Face format out.

Run: python -m tests.bench.train_demo --data chat-sgd.jsonl.xz chat-taskmaster4.jsonl.xz --out foretoken-demo
The defaults are the settings of the shipped model (52 minutes on 2 CPU cores); `--steps 20 --rows 500` is a try-out.
Besides the model it writes train.jsonl and held.jsonl: the split, as `foretoken build-trigram` and benchmarks want it.
A data file holds one {"messages": [{"role", "content"}, ...]} per line, plain or .xz. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END = "<|endoftext|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = [START, *ROLES, END]
"""Their ids are 0 to 4, in this order."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
HELD = 50
"""One dialogue in this many is held out, chosen by its first message: equal openings fall on one side."""
TOKENIZER_SHARE = 0.2
"""Share of the dialogues that the tokenizer is trained on."""
NUM_HELD_BATCHES = 4
Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Shape and schedule; the defaults made the shipped model."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_size: int = 704
    context: int = 1024
    batch: int = 8
    steps: int = 1800
    warmup_steps: int = 100
    learning_rate: float = 3e-3
    last_share: float = 0.05
    """The cosine ends at this share of the learning rate."""
    weight_decay: float = 0.1
    """Of matrices; norms have none."""

    def rate(self, step: int) -> float:
        """Learning rate of one step: linear warm-up, then a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (
            self.learning_rate
            * min(1.0, (step + 1) / self.warmup_steps)
            * (self.last_share + (1 - self.last_share) * cosine)
        )


def read_rows(files: list[Path], limit: int) -> Iterator[Messages]:
    """Dialogues of all files, the first `limit` of each (0: all)."""
    for path in files:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
            for index, line in enumerate(lines):
                if limit and index >= limit:
                    break
                yield json.loads(line)["messages"]


def split(rows: list[Messages]) -> dict[str, list[Messages]]:
    """The dialogues to learn from and the held-out ones."""
    parts: dict[str, list[Messages]] = {"train": [], "held": []}
    for row in rows:
        is_held = zlib.crc32(row[0]["content"].encode()) % HELD == 0
        parts["held" if is_held else "train"].append(row)
    return parts


def render(row: Messages) -> str:
    """A dialogue in the chat format, without the token that starts a text."""
    return "".join(f"<|{message['role']}|>\n{message['content'].strip()}{END}\n" for message in row)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: any text can be written, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet)
    draw = random.Random(0)
    tokenizer.train_from_iterator((text for text in texts if draw.random() < TOKENIZER_SHARE), trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts in a row, each behind the token that starts it. Returns: [num_tokens] int64."""
    order = list(texts)
    random.Random(0).shuffle(order)
    ids: list[int] = []
    for start in range(0, len(order), 1000):
        for found in tokenizer.encode_batch(order[start : start + 1000], add_special_tokens=False):
            ids += [0, *found.ids]
    return torch.tensor(ids)


def make_model(recipe: Recipe, vocab_size: int) -> LlamaForCausalLM:
    """The network with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            intermediate_size=recipe.mlp_size,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=4,
            pad_token_id=0,
        )
    )


class Trainer:
    """Fits the model to packed tokens. Owns the model, the optimizer and the order of the batches."""

    def __init__(self, recipe: Recipe, model: LlamaForCausalLM, is_compiled: bool) -> None:
        self._recipe = recipe
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self._device)
        matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
        vectors = [weight for weight in model.parameters() if weight.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
        self._loss = torch.compile(self._plain_loss) if is_compiled else self._plain_loss

    def fit(self, tokens: Tensor, held: Tensor) -> float:
        """Run the whole schedule; returns the held-out loss at its end, in nats per token."""
        draw = torch.Generator().manual_seed(1)
        bar = tqdm(range(self._recipe.steps), unit="step")
        for step in bar:
            for group in self._optimizer.param_groups:
                group["lr"] = self._recipe.rate(step)
            loss = self._loss(self._batch(tokens, draw))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        return self.held_loss(held)

    @torch.no_grad()
    def held_loss(self, held: Tensor) -> float:
        """Mean loss over some batches of held-out text."""
        draws = [torch.Generator().manual_seed(index) for index in range(NUM_HELD_BATCHES)]
        return sum(float(self._loss(self._batch(held, draw))) for draw in draws) / NUM_HELD_BATCHES

    def _batch(self, tokens: Tensor, draw: torch.Generator) -> Tensor:
        """Random windows of the packed text. Returns: [batch, context + 1] int64."""
        width = self._recipe.context + 1
        starts = torch.randint(0, len(tokens) - width + 1, (self._recipe.batch,), generator=draw)
        return torch.stack([tokens[start : start + width] for start in starts.tolist()]).to(self._device)

    def _plain_loss(self, window: Tensor) -> Tensor:
        with torch.autocast(self._device, dtype=torch.bfloat16):
            states = self.model.model(input_ids=window[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(states)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, context: int) -> None:
    """The model folder, weights in bfloat16."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=START,
        additional_special_tokens=list(ROLES),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    wrapped.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rows", type=int, default=0, help="dialogues taken of each file; 0: all")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the loss")
    for name in ("steps", "batch", "context", "num_layers", "hidden_size", "vocab_size"):
        default = Recipe.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="[%(default)s]")
    arguments = parser.parse_args()
    names = ("steps", "batch", "context", "num_layers", "hidden_size", "vocab_size")
    recipe = Recipe(**{name: getattr(arguments, name) for name in names})
    parts = split(list(read_rows(arguments.data, arguments.rows)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        text = "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    texts = {name: [render(row) for row in rows] for name, rows in parts.items()}
    tokenizer = train_tokenizer(texts["train"] + texts["held"], recipe.vocab_size)
    packed = {name: pack(tokenizer, found) for name, found in texts.items()}
    if min(len(tokens) for tokens in packed.values()) <= recipe.context:
        parser.exit(2, f"too little text: each side of the split must be longer than --context {recipe.context}\n")
    began = time.perf_counter()
    trainer = Trainer(recipe, make_model(recipe, tokenizer.get_vocab_size()), not arguments.no_compile)
    held_loss = trainer.fit(packed["train"], packed["held"])
    save(trainer.model, tokenizer, arguments.out, recipe.context)
    report = {
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "train_tokens": len(packed["train"]),
        "tokens_seen": recipe.steps * recipe.batch * recipe.context,
        "held_loss": round(held_loss, 4),
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
