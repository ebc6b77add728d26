"""A model folder without weights: a byte-level tokenizer of one token per byte, and a small chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIALS = ("<|bos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
FIRST_SPECIAL = 256
END = FIRST_SPECIAL + 4
VOCAB_SIZE = 300
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_letters() -> list[str]:
    """The letter of each byte, 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + sum(1 for other in range(byte) if other not in printable)))
    return [letters[byte] for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Token id = byte, then SPECIALS."""
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def make_folder(
    path: Path,
    *,
    template: str | None = TEMPLATE,
    generation: dict[str, object] | None = None,
    adds_bos: bool = False,
    more: tuple[str, ...] = (),
) -> Path:
    """Write the folder and give it back. `adds_bos`: the tokenizer begins every text with <|bos|> by itself.

    `more`: special tokens behind SPECIALS.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in more])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", FIRST_SPECIAL)]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|end|>"}))
    (path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": END}))
    (path / "generation_config.json").write_text(json.dumps(generation or {}))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path
