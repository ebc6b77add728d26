"""Texts and chats as token ids, exactly as the server makes them of a request."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from server.chat_template import ChatTemplate
from server.errors import InvalidRequest
from server.model_files import ModelFiles
from server.tokenizer import end_ids, load_tokenizer
from training.corpus_reader import Messages, join_messages

_BATCH_DOCUMENTS = 256


class TextEncoder:
    """Encodes for one model. Owns its tokenizer and its chat template.

    Raises on making: StartupError in one line for a broken tokenizer or template.
    """

    def __init__(self, files: ModelFiles) -> None:
        self._tokenizer = load_tokenizer(files)
        bos = files.special_tokens.get("bos_token", "")
        self.bos_id: int | None = self._tokenizer.token_to_id(bos) if bos else None
        # Whether a plain text begins with this token is the post-processor's decision, here as in a request.
        self._adds_bos = self.bos_id is not None and self._tokenizer.encode("").ids[:1] == [self.bos_id]
        self._template = ChatTemplate(files.chat_template, files.special_tokens) if files.chat_template else None
        self.vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_ids = end_ids(files, self._tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of whole documents; the token that starts a text is there once."""
        start = [self.bos_id] if self._adds_bos and self.bos_id is not None else []
        found = [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        return [ids if ids[: len(start)] == start else [*start, *ids] for ids in found]

    def encode_each(self, texts: Iterator[str]) -> Iterator[list[int]]:
        """Ids of documents, one after the other; they are encoded many at a time."""
        while batch := list(islice(texts, _BATCH_DOCUMENTS)):
            yield from self.encode(batch)

    def chat_ids(self, messages: Messages) -> list[int]:
        """Ids of a chat up to the header of the assistant's turn; without a chat template, of its plain text.

        Raises: InvalidRequest when the template refuses the messages.
        """
        text = join_messages(messages) if self._template is None else self._template.render(messages)
        return self.encode([text])[0]

    def render(self, messages: list[dict[str, Any]]) -> str:
        """A whole chat as text. Raises: ValueError when the template refuses the messages."""
        if self._template is None:
            return join_messages(messages)
        try:
            return self._template.render(messages, add_generation_prompt=False)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
