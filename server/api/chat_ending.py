"""`add_generation_prompt` and `continue_final_message`: how the prompt of a conversation ends."""

from __future__ import annotations

from server.api.schema import ChatRequest
from server.api.token_schema import TokenizeRequest
from server.errors import InvalidRequest
from server.prompt_messages import Ending


def chat_ending(wish: ChatRequest | TokenizeRequest) -> Ending:
    """How the prompt ends. Raises InvalidRequest for one that should end in two ways."""
    if wish.continue_final_message:
        if wish.add_generation_prompt:
            raise InvalidRequest(
                "'continue_final_message' and 'add_generation_prompt' cannot both be true: the answer either goes on "
                "with the last message or begins a new one.",
                param="continue_final_message",
            )
        return "open"
    return "none" if wish.add_generation_prompt is False else "header"
