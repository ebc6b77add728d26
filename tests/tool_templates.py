"""Small chat templates with tools and thinking, each with the habits of one family."""

from __future__ import annotations

from typing import Any

HERMES = (
    "{% if tools %}<|system|>{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}Tools:"
    "{% for t in tools %}\n{{ t | tojson }}{% endfor %}\nCall with <tool_call>\n"
    '{"name": <name>, "arguments": <object>}\n</tool_call><|end|>'
    "{% elif messages[0].role == 'system' %}<|system|>{{ messages[0].content }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|><tool_response>\n{{ m.content }}\n</tool_response><|end|>"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Objects for arguments, text and calls in one turn."""

CALLS_ALONE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '<|assistant|>{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|start_header_id|> #}"
)
"""As Llama 3: drops the text beside a call, and takes one call a turn."""

TEXT_ARGUMENTS = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '[call]' + c.function.name + '\n```json\n' + "
    "c.function.arguments + '\n```' }}{% endfor %}<|end|>{% endfor %}"
)
"""As DeepSeek V3: puts the arguments into the prompt as they are."""

PYTHON_ARGUMENTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments }}){% endfor %}<|end|>{% endfor %}"
)
"""Would write Python's own picture of an object."""

NO_TOOLS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
"""Takes any role, drops calls and tools."""

NO_TOOL_TURNS = NO_TOOLS.replace("messages %}", "messages if m.role != 'tool' %}", 1)

THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>"
    "\n\n{% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3: thinks unless told not to, and begins by itself."""

OPENS_THINKING = NO_TOOLS + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
"""As DeepSeek R1: always thinks, and the prompt begins it."""


def tool(name: str = "get_weather", **function: Any) -> dict[str, Any]:
    """A tool as a client sends it."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


def call(arguments: str = '{"city": "Paris"}', name: str = "get_weather", id_: str = "call_1") -> dict[str, Any]:
    """A call as a client sends it back."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
