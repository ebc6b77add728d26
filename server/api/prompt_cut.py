"""`truncate_prompt_tokens`: the end of a prompt that is too long, by tokens."""

from __future__ import annotations

from dataclasses import dataclass

from server.api.order import Order
from server.api.schema import Common
from server.errors import InvalidRequest

MAX_CUT_TOKENS = 2**20
"""Tokens that a prompt may have before it is cut: all of them are encoded first."""


@dataclass(frozen=True, slots=True)
class PromptCut:
    """How much of a prompt is kept."""

    num_kept: int | None
    """The last so many tokens; None for all."""
    max_len: int
    """A prompt that is encoded has to have fewer tokens than this."""

    def cut(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that are kept."""
        return ids if self.num_kept is None else ids[-self.num_kept :]


def prompt_cut(wish: Common, order: Order, max_model_len: int) -> PromptCut:
    """What a request wants to be kept; -1 is what leaves room for its answer. Raises InvalidRequest."""
    num_kept = wish.truncate_prompt_tokens
    if num_kept is None:
        return PromptCut(None, max_model_len)
    if num_kept == 0 or num_kept >= max_model_len:
        raise InvalidRequest(
            f"'truncate_prompt_tokens' must be -1, or 1 to {max_model_len - 1}: the context has {max_model_len} tokens "
            f"and the answer needs one; got {num_kept}.",
            param="truncate_prompt_tokens",
        )
    if num_kept == -1:
        num_kept = max(1, max_model_len - max(1, order.max_tokens or 1))
    return PromptCut(num_kept, max(MAX_CUT_TOKENS, max_model_len))
