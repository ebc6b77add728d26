"""Texts and chats as token ids, exactly as the server makes them of a request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice

from server.encoding import PromptEncoder
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
        self._chats = PromptEncoder(files) if files.chat_template else None
        self.vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_ids = end_ids(files, self._tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, with the tokens that the tokenizer adds by itself."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def encode_each(self, documents: Iterator[str | list[int]]) -> Iterator[list[int]]:
        """Ids of documents; texts are encoded many at a time, and ids pass as they are."""
        while batch := list(islice(documents, _BATCH_DOCUMENTS)):
            yield from self.encode([document for document in batch if isinstance(document, str)])
            yield from (document for document in batch if not isinstance(document, str))

    def chat_ids(self, messages: Messages, *, is_whole: bool = False) -> list[int]:
        """Ids of a chat up to the header of the assistant's turn, or without it; without a template, of its plain text.

        Raises: InvalidRequest when the template refuses the messages.
        """
        if self._chats is None:
            return self.encode([join_messages(messages)])[0]
        return self._chats.chat(messages, sys.maxsize, ending="none" if is_whole else "header")

    def whole_chat(self, messages: Messages) -> str | list[int]:
        """A chat as a document. Raises: ValueError when the template refuses the messages."""
        try:
            return self.chat_ids(messages, is_whole=True) if self._chats else join_messages(messages)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
