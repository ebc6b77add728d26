"""The text of a corpus as token ids, exactly as the server makes them of a request."""

from __future__ import annotations

from typing import Any

from server.chat_template import ChatTemplate
from server.commands.bench_prompts import Prompt
from server.config import SettingsError
from server.errors import InvalidRequest
from server.model_files import ModelFiles
from server.tokenizer import end_ids, load_tokenizer
from training.corpus_reader import Render, join_messages


class TextEncoder:
    """Texts to token ids as the target reads them. Owns the tokenizer and the chat template."""

    def __init__(self, files: ModelFiles) -> None:
        self._tokenizer = load_tokenizer(files)
        self._bos = files.special_tokens.get("bos_token", "")
        bos_id = self._tokenizer.token_to_id(self._bos) if self._bos else None
        self.bos_id: int | None = bos_id
        # Whether a plain text begins with it is the post-processor's decision, here as in a request.
        self._adds_bos = bos_id is not None and self._tokenizer.encode("").ids[:1] == [bos_id]
        self._template = None
        self.vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_ids = end_ids(files, self._tokenizer)
        if files.chat_template is not None:
            self._template = ChatTemplate(files.chat_template, files.special_tokens)

    @property
    def render(self) -> Render | None:
        """Chat messages to text by the model's template; None when it has none."""
        return None if self._template is None else self._render

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of whole documents; the token that starts a text is there once."""
        return [self._start(encoding.ids) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of one prompt. Raises SettingsError when the model cannot chat."""
        if not prompt.messages:
            return self.encode([prompt.text])[0]
        if self._template is None:
            raise SettingsError("--prompts: holds chat messages, and the model has no chat template")
        return self.chat_ids([{"role": role, "content": content} for role, content in prompt.messages])

    def chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of a chat up to the header of the assistant's turn; without a chat template, of its plain text.

        Raises: InvalidRequest when the template refuses the messages.
        """
        text = join_messages(messages) if self._template is None else self._template.render(messages)
        return self.encode([text])[0]

    def _start(self, ids: list[int]) -> list[int]:
        if self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def _render(self, messages: list[dict[str, Any]]) -> str:
        assert self._template is not None
        try:
            return self._template.render(messages, add_generation_prompt=False)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
