"""Templates that differ in what they know: every message reaches the prompt, or is refused by name."""

from __future__ import annotations

import pytest

from server.chat_template import ChatTemplate
from server.errors import InvalidRequest

ECHO = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
"""Takes every role, and knows none."""
THREE = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role }}]{{ m.content }}\n"
    "{% endif %}{% endfor %}"
)
"""Drops what it does not know."""
FIRST_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('only first') }}"
)
STRICT = FIRST_SYSTEM + "{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
"""One system message, the first."""
ONE = (
    "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content | trim }}\n{% endif %}{% endfor %}"
)
"""The same, and drops others."""
KNOWS = (
    "{% for m in messages %}{% if m.role == 'developer' %}[system/dev]{% else %}[{{ m.role }}]{% endif %}"
    "{{ m.content }}\n{% endfor %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
)
TWO_SIDES = "{% for m in messages %}{% if m.role == 'user' %}U: {% else %}A: {% endif %}{{ m.content }}\n{% endfor %}"
"""Takes everything that is not the user's for the assistant's."""
PARTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{{ '\n' }}{% endfor %}"
FIRST_PART = "{% for m in messages %}[{{ m.role }}]{{ m['content'][0]['text'] }}\n{% endfor %}"


def render(source: str, *turns: tuple[str, str]) -> str:
    return ChatTemplate(source, {}).render([{"role": role, "content": content} for role, content in turns])


S, D, U, A = ("system", "s"), ("developer", "d"), ("user", "u"), ("assistant", "a")
FOLDED = "[user]s\n\nd\n\nu\n"


@pytest.mark.parametrize(
    ("source", "turns", "text"),
    [
        (ECHO, (D, U), "[system]d\n[user]u\n"),
        (ECHO + "{# for developers #}", (D, U), "[system]d\n[user]u\n"),
        (THREE + "{# for developers #}", (D, U), "[system]d\n[user]u\n"),
        (KNOWS, (S, D, U), "[system]s\n[system/dev]d\n[user]u\n"),
        (ECHO, (S, D, U), "[system]s\n[system]d\n[user]u\n"),
        (STRICT, (S, D, U), "[system]s\n\nd\n[user]u\n"),
        (STRICT, (D, S, S, U, A, U), "[system]d\n\ns\n\ns\n[user]u\n[assistant]a\n[user]u\n"),
        (ONE, (S, D, U), "[system]s\n\nd\n[user]u\n"),
        (NO_SYSTEM, (S, D, U), FOLDED),
        (NO_SYSTEM, (D, U, A), "[user]d\n\nu\n[assistant]a\n"),
        (REFUSES_SYSTEM, (S, D, U), FOLDED),
        (TWO_SIDES, (S, U, A), "U: s\n\nu\nA: a\n"),
        (PARTS, (S, U), "[system]s\n[user]u\n"),
        (FIRST_PART, (D, U, A), "[system]d\n[user]u\n[assistant]a\n"),
        (STRICT.replace("m.content", "m.content[0].text"), (S, D, U), "[system]s\n\nd\n[user]u\n"),
        (ECHO, (), ""),
    ],
)
def test_every_message_reaches_the_prompt(source: str, turns: tuple[tuple[str, str], ...], text: str) -> None:
    assert render(source, *turns) == text


@pytest.mark.parametrize(
    ("source", "turns", "words", "param"),
    [
        (REFUSES_SYSTEM, (U, U), "roles must alternate", "messages"),
        (REFUSES_SYSTEM, (S,), "System role not supported", "messages"),
        (STRICT, (U, S), "only first", "messages"),
        (NO_SYSTEM, (U, S), "'system' where messages[1] is: it would be lost", "messages[1].role"),
        (ONE, (U, A, D), "'developer' where messages[2] is: it would be lost", "messages[2].role"),
        ("{{ messages[-1].content }}", (U, A, U), "'user' where messages[0] is", "messages[0].role"),
    ],
)
def test_what_has_no_place_is_refused(source: str, turns: tuple[tuple[str, str], ...], words: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source, *turns)
    assert words in caught.value.message
    assert caught.value.param == param


def test_a_template_may_alter_texts() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content | upper }}{% endif %}{% endfor %}"
    )
    assert render(source, ("user", " hi "), ("assistant", "<think>no</think> "), U) == "[user] HI [assistant][user]U"


def test_other_fields_reach_the_template() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}", {})
    assert template.render([{"role": "user", "content": "x", "name": "bob"}]) == "bob:x"


def test_forms_are_found_once_for_each_sequence_of_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(STRICT, {})
    turns = [{"role": role, "content": content} for role, content in (S, D, U)]
    template.render(turns)
    monkeypatch.setattr(template._forms, "_try", lambda *_: pytest.fail("tried again"))
    assert template.render(turns) == "[system]s\n\nd\n[user]u\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (r"{{ '\ud83d' }}{{ messages[0].content }}", "half of a surrogate pair"),
        ("{{ messages[0].content.nothing.at.all }}{{ messages[0].content }}", "refuses these messages"),
        ("{{ messages[0].content }}{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content }}{{ namespace().x.y }}", "refuses these messages"),
        ("{{ messages[0].content }}{{ '%d' | format('x') }}", "TypeError"),
    ],
)
def test_what_a_template_trips_over_is_told(source: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template") as caught:
        render(source, U)
    assert words in caught.value.message
