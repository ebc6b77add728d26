"""How a rendered conversation ends, beside transformers' own rendering."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.chat_template import ChatTemplate
from server.errors import InvalidRequest

HEADER = "{% if add_generation_prompt %}<a>{% endif %}"
TEMPLATES = {
    "plain": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}" + HEADER,
    "trims": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}" + HEADER,
    "trims, then a blank": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].strip() }} </>{% endfor %}"
    + HEADER,
    "last repeated": "{{ messages[-1]['content'] }}|{% for m in messages %}{{ m['content'] }}</>{% endfor %}" + HEADER,
    "reasoning cut": "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}</>{% endfor %}" + HEADER,
}
LAST = ["We", " We ", "We\n\n", "", "Hi", "a</think>b  ", "qx0endzj"]


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_open_message_is_that_of_transformers(name: str, last: str) -> None:
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": last}]
    ours = ChatTemplate(TEMPLATES[name], {}).render(turns, ending="open")
    if "</think>" in last and name == "reasoning cut":
        assert ours.endswith("b  "), "transformers refuses what a template cuts, though its end is there"
        return
    if name == "last repeated":
        assert ours == f"{last}|Hi</>{last}", "transformers leaves its own tag in the first place"
        return
    theirs, _ = render_jinja_template([turns], chat_template=TEMPLATES[name], continue_final_message=True)
    assert ours == theirs[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_with_and_without_a_header(name: str) -> None:
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    template = ChatTemplate(TEMPLATES[name], {})
    for ending, has_header in (("header", True), ("none", False)):
        theirs, _ = render_jinja_template(
            [turns], chat_template=TEMPLATES[name], add_generation_prompt=has_header, return_assistant_tokens_mask=False
        )
        assert template.render(turns, ending=ending) == theirs[0]  # type: ignore[arg-type]


def test_a_template_that_hides_the_end_is_refused_by_name() -> None:
    source = "{% for m in messages %}{{ m['content'][:12] }}{% endfor %}"
    turns = [{"role": "user", "content": "x" * 40}]
    with pytest.raises(InvalidRequest, match="cannot be continued") as error:
        ChatTemplate(source, {}).render(turns, ending="open")
    assert error.value.param == "continue_final_message"
