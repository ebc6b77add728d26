"""The demo model that comes with Foretoken: its files, served when no model is named and the default one is missing.

A toy that shows speed, not knowledge; README.md beside this file is its card.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "model"
"""The model in Hugging Face format."""
TRIGRAM_TABLE = FOLDER / "trigram.tri"
"""Corpus table of the tri-gram drafter, made from the model's training text."""
CTC_HEAD = FOLDER / "ctc"
"""Its CTC head, trained on answers of its own."""
NAME = "foretoken-demo"
"""Name under which clients ask for it."""
NOTE = "demo model: a toy that shows speed, not knowledge; it chats about bookings and invents the facts"


def defaults() -> dict[str, str | tuple[str, ...]]:
    """Settings by field name for a server that was given no model; whatever the user set wins over them."""
    return {
        "model": str(MODEL),
        "served_model_name": (NAME,),
        "drafter": "hybrid",
        "trigram_table": str(TRIGRAM_TABLE),
        "ctc_head": str(CTC_HEAD),
    }


def is_demo(model: str) -> bool:
    """Whether the setting `model` names the demo model."""
    return model == str(MODEL)
