"""Fields that a request may carry although nothing is done for them: they ask for nothing, or have no effect.

The promise is that a field is honoured, or refused by name. A value that asks for nothing is honoured by doing nothing:

* `null`, an empty text, an empty array, and an object in which every field asks for nothing. So clients may spell out
  what they leave open, also in fields that nobody here knows. `false` and numbers are no such values: a switch that is
  not known here may be on by default, and 0 may be a limit.
* of the fields in NEUTRAL, also the values listed there: they say what happens anyway.

Everything else is refused by name, but for the short lists of fields without effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from server.errors import UnsupportedParameter

MAX_PATH = 256
"""Characters of a field's path that an error repeats: names are the client's and may be megabytes long."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),  # of a completion, which has no turns
    "add_special_tokens": (False,),  # of a chat, whose template brings its own
    "audio": (),
    "best_of": (1,),
    "cache_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),  # of a completion
    "detokenize": (True,),
    "documents": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": (),
    "grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "parallel_tool_calls": (True, False),  # of a completion, which has no tools to call
    "priority": (0,),  # requests are served in the order in which they come
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1,),
    "return_hidden_states": (False,),
    "return_progress": (False,),
    "separate_reasoning": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_reasoning": (True,),
    "structural_tag": (),
    "suffix": (),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "tool_choice": ("none",),
    "tools": (),
    "top_a": (0,),
    "top_logprobs": (0,),  # of a completion
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "xtc_probability": (0,),
}
"""Fields that other servers know and this one does not honour, with the values that say what happens anyway."""

NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "partial": (False,),
    "prefix": (False,),
    "refusal": (),
}
"""The same for a message."""

ASK_WHEN_EMPTY = frozenset({"audio", "json_schema", "web_search_options"})
"""Fields whose empty value says something: search with the defaults, any JSON at all."""

WITHOUT_EFFECT = frozenset({"cache_control", "prompt_cache_retention"})
"""Of a request. Prefixes are cached without being told to, and for as long as there is room."""

WITHOUT_EFFECT_IN_MESSAGE = frozenset({"cache_control", "id", "provider_specific_fields"})
"""Of a message and of a text part."""

WITHOUT_EFFECT_IN_ANSWER = WITHOUT_EFFECT_IN_MESSAGE | {
    "annotations",
    "citations",
    "extra_content",
    "index",
    "parsed",
    "reasoning",
    "reasoning_details",
    "reasoning_items",
    "reasoning_text",
    "signature",
    "thinking",
    "thinking_blocks",
}
"""Of an assistant's turn and of its text parts: what a server adds to an answer, and a client sends back with it."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of text parts; the other two are the Responses API's, which means the same by them."""

REASONING_PARTS = ("reasoning", "reasoning_content", "redacted_thinking", "thinking")
"""Types of parts without effect in an assistant's turn. Templates leave the reasoning of earlier turns out."""


NOTHING: dict[str, Any] = {"enum": [None, "", [], {}]}
"""For a JSON schema: what a field may hold that nobody knows."""


def clean(
    value: dict[str, Any],
    known: Set[str],
    path: str,
    neutral: Mapping[str, tuple[Any, ...]],
    without_effect: Set[str],
) -> dict[str, Any]:
    """`value` with its `known` fields alone. Raises UnsupportedParameter if another one asks for something.

    `path` is put before the name, `neutral` tells which values of which fields say what happens anyway.
    """
    if value.keys() <= known:
        return value
    for name, given in value.items():
        # There may be hundreds of thousands of fields: null, the most usual, is passed over at once.
        if given is None or name in known or name in without_effect:
            continue
        if _asks(name, given, neutral.get(name, ())):
            param = f"{path}{name}"[:MAX_PATH]
            raise unsupported(param) if name in neutral else unknown(param)
    return {name: value[name] for name in known if name in value}


def _asks(name: str, given: Any, neutral: tuple[Any, ...]) -> bool:
    if asks_nothing(given):
        return name in ASK_WHEN_EMPTY
    # In Python True == 1, in JSON it is not.
    return not any(given == choice and isinstance(given, bool) == isinstance(choice, bool) for choice in neutral)


def asks_nothing(value: Any) -> bool:
    """Whether nothing is in it: null, an empty text or array, an object in which every field asks for nothing."""
    if isinstance(value, dict):
        return all(map(asks_nothing, value.values()))
    return value is None or value == "" or value == []


def unsupported(param: str, message: str | None = None) -> UnsupportedParameter:
    """The refusal of a field that is known but not honoured."""
    return UnsupportedParameter(message or f"'{param}' is not supported yet.", param=param)


def unknown(param: str) -> UnsupportedParameter:
    """The refusal of a field that nobody knows."""
    return UnsupportedParameter(f"Unknown field '{param}'.", param=param)
