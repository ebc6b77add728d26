"""The fields that change an answer, each with a value that does, and those that need no case.

The first field of a case is the one that it is about.
"""

from __future__ import annotations

from typing import Any

from tests.tool_templates import call, tool

Fields = dict[str, Any]

TEXT = "Find me a table for two tonight."
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>\nTools:{% for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}"
    "{{ '\\n' }}Call with <tool_call>\n"
    '{"name": <name>, "arguments": <object>}\n</tool_call><|end|>{{ \'\\n\' }}{% endif %}'
    "{% for m in messages %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>\\n' }}{{ m.name or '' }}"
    "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{{ '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)
"""The demo model's own one, with tools and thinking, so that it takes every field."""

CITY = {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}
BOOKING = {
    "type": "object",
    "properties": {"city": CITY, "guests": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "guests"],
    "additionalProperties": False,
}
TOOL = tool("book", description="Book a table.", parameters=BOOKING, strict=True)
NAMED = {"type": "json_schema", "json_schema": {"name": "b", "description": "d", "strict": True, "schema": BOOKING}}
LONG = {"ignore_eos": True}
"""The answer has all the tokens that it may have."""
EVERY = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
SILENT = {"chat_template_kwargs": {"enable_thinking": False}}

BOTH: dict[str, Fields] = {
    "stop": {"stop": [" time", "or", " to"]},
    "include_stop_str_in_output": {"include_stop_str_in_output": True, "stop": [" time", "or", " to"]},
    "stop_token_ids": {"stop_token_ids": [288, 294, 375]},
    "ignore_eos": LONG,
    "min_tokens": {"min_tokens": 23},
    "max_tokens": {"max_tokens": 5},
    "max_completion_tokens": {"max_completion_tokens": 4, "max_tokens": None},
    "temperature": {"temperature": 1.7, **LONG},
    "top_p": {"top_p": 0.5, "temperature": 1.5, **LONG},
    "top_k": {"top_k": 3, "temperature": 1.5, **LONG},
    "min_p": {"min_p": 0.2, "temperature": 1.5, **LONG},
    "presence_penalty": {"presence_penalty": 2.0, **LONG},
    "frequency_penalty": {"frequency_penalty": 1.5, **LONG},
    "repetition_penalty": {"repetition_penalty": 1.4, **LONG},
    "logit_bias": {"logit_bias": {"288": -100, "371": -100, "294": 4.5}},
    "allowed_token_ids": {"allowed_token_ids": [*range(260, 420)], **LONG},
    "bad_words": {"bad_words": ["What", "you", "time do", "?"]},
    "skip_special_tokens": {"skip_special_tokens": False, **LONG},
    "return_token_ids": {"return_token_ids": True},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 9},
    "cache_salt": {"cache_salt": "pepper"},
    "prediction": {"prediction": {"type": "content", "content": "What time do you want to leave?"}, **LONG},
    "seed": {"seed": 99, "temperature": 1.0},
    "n": {"n": 3, "temperature": 1.0},
    "max_nodes": {"speculative": {"max_nodes": 3}, **LONG},
    "stream_options": {"stream_options": EVERY},
    "no logprobs": {"logprobs": None, "top_logprobs": None, **LONG},
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {"response_format": NAMED},
    "structured json": {"structured_outputs": {"json": BOOKING}},
    "structured regex": {"structured_outputs": {"regex": "[A-Z][a-z]+ (at|on) [0-9]{1,2}(am|pm)!"}},
    "structured choice": {"structured_outputs": {"choice": ["Friday at noon", "Friday evening", "never"]}},
    "structured grammar": {"structured_outputs": {"grammar": 'start: ("yes" | "no" | " and ")+ /[!?]/'}},
    "guided json": {"guided_json": BOOKING},
    "guided regex": {"guided_regex": "(yes|no|,? ?maybe){1,9}[.]"},
    "guided choice": {"guided_choice": ["London", "Londonderry", "Lyon"]},
    "guided grammar": {"guided_grammar": 'root ::= "I " ("will" | "shall") " " [a-z ]{3,30} "."'},
    "form and penalties": {"response_format": {"type": "json_object"}, "frequency_penalty": 1.0, "top_k": 40},
    "bias and words": {"bad_words": ["What"], "allowed_token_ids": [*range(500)], "logit_bias": {"300": 3}, **LONG},
}
"""Of both generation routes."""

CHAT: dict[str, Fields] = {
    "logprobs": {"top_logprobs": 5, "logprobs": True, **LONG},
    "history": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "name": "ann", "content": TEXT},
            {"role": "assistant", "content": "Sure.", "reasoning_content": "A table?", "tool_calls": [call(name="b")]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Three tables."},
            {"role": "user", "content": [{"type": "text", "text": "At seven."}]},
        ]
    },
    "add_generation_prompt": {"add_generation_prompt": False},
    "continue_final_message": {
        "continue_final_message": True,
        "messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "I found a flight"}],
    },
    "tools": {"tools": [TOOL]},
    "required": {"tool_choice": "required", "tools": [TOOL], "max_tokens": 60, **SILENT},
    "named": {
        "tool_choice": {"type": "function", "function": {"name": "book"}},
        "tools": [TOOL, tool("other")],
        "parallel_tool_calls": False,
        "max_tokens": 60,
        **SILENT,
    },
    "thinking": {"chat_template_kwargs": {"enable_thinking": True}, **LONG},
    "reasoning_effort": {"reasoning_effort": "high", **LONG},
    "include_reasoning": {"include_reasoning": False, "reasoning_effort": "high", **LONG},
    "separate_reasoning": {"separate_reasoning": False, "reasoning_effort": "high", **LONG},
}
"""Of chats alone."""

COMPLETIONS: dict[str, Fields] = {
    "logprobs": {"logprobs": 5, **LONG},
    "echo": {"echo": True},
    "echo alone": {"echo": True, "logprobs": None},
    "scores": {"max_tokens": 0, "echo": True},
    "prompts": {"prompt": ["Hello", "I found a flight", "What"], "n": 2, "best_of": 2, "temperature": 1.0},
    "token ids": {"prompt": [2, 203, 1142, 348], **LONG},
    "add_special_tokens": {"add_special_tokens": False, "prompt": "The train leaves", **LONG},
}
"""Of completions alone."""

SAME = frozenset({"cache_salt", "stream_options", "prediction", "max_nodes", "add_special_tokens"})
"""Cases whose answer is that of a request without the field: the demo model's tokenizer adds nothing to a text, and the
other fields are about something else."""

NO_CASE = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("stream", "speculative.enabled", "speculative.drafter", "speculative.metrics"),
    }
)
"""Fields without effect, and those that every case sets by itself."""
