"""The small files of a model folder: tokenizer, configuration, chat template. No weights, no torch."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import Settings
from server.errors import StartupError
from server.tokenizer_reading import SMALL_FILES, read_tokenizer

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
"""Fields of generation_config.json that change a text in transformers and are not read here; values that change nothing
(beside null and what is empty)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json wants when a request says nothing; None leaves OpenAI's default.

    As in vLLM, `do_sample` is not looked at: a model that ships a temperature gets it.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    """How long an answer to a chat may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What the API process has to know of a model, read once at start-up."""

    tokenizer_json: str
    """The tokenizer as transformers loads it, in the format of tokenizer.json."""
    special_tokens: dict[str, str]
    """bos_token, eos_token ... as the chat template sees them."""
    chat_template: str | None
    eos_ids: tuple[int, ...]
    """Every end-of-sequence id that generation_config.json or config.json names."""
    defaults: GenerationDefaults


def served_names(settings: Settings) -> tuple[str, ...]:
    """Names under which clients ask for the model: those of the settings, else the folder's name or the Hub id."""
    if settings.served_model_name:
        return settings.served_model_name
    path = Path(settings.model)
    return (path.resolve().name if path.is_dir() else settings.model,)


def check_revision(model: str, revision: str) -> None:
    """Raises: StartupError where a version is asked for of what has none."""
    if revision and Path(model).exists():
        raise StartupError(f"--revision {revision}: names a version of a Hub model, and {model} is on this machine")


def locate(model: str, revision: str = "") -> Path:
    """The folder with the model's small files: the folder itself, or a snapshot of them from the Hub.

    Raises StartupError in one clear line.
    """
    if not model:
        raise StartupError("no model was given: name a folder or a Hub id")
    path = Path(model)
    check_revision(model, revision)
    if path.is_dir():
        return path
    if path.exists():
        raise StartupError(f"{model} is not a folder")
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise StartupError(f"there is no folder {model}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(SMALL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise StartupError(
            f"cannot get {model} from the Hub: {reason[0] if reason else type(error).__name__}"
        ) from None


def read(folder: Path) -> ModelFiles:
    """Read the small files of `folder`, the tokenizer as transformers reads it.

    What is there and not honoured is logged. Raises StartupError naming what is missing or broken.
    """
    _read_json(folder / "tokenizer_config.json")  # to name it where it is broken
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    text_config = config.get("text_config")
    eos: list[int] = []
    for source in (generation, config, text_config if isinstance(text_config, dict) else {}):
        eos.extend(_ids(source.get("eos_token_id")))
    reading = read_tokenizer(folder)
    for note in (*reading.notes, *_unread(generation)):
        log.warning("%s: %s", folder, note)
    return ModelFiles(
        tokenizer_json=reading.tokenizer_json,
        special_tokens=reading.special_tokens,
        chat_template=reading.chat_template,
        eos_ids=tuple(dict.fromkeys(eos)),
        defaults=GenerationDefaults(
            temperature=_number(generation, "temperature", 0.0, 2.0),
            top_p=_number(generation, "top_p", 1e-9, 1.0),
            top_k=_count(generation, "top_k"),
            min_p=_number(generation, "min_p", 0.0, 1.0),
            repetition_penalty=_number(generation, "repetition_penalty", 0.01, 100.0),
            max_new_tokens=_count(generation, "max_new_tokens") or None,
        ),
    )


def _unread(generation: dict[str, Any]) -> list[str]:
    """One line that names the fields which change a text in transformers and none here; no line without any."""
    found = [
        name
        for name, neutral in _NEUTRAL.items()
        if (value := generation.get(name)) is not None and value not in (*neutral, [], {}, "")
    ]
    return [f"generation_config.json: {', '.join(found)} not read, as if absent"] if found else []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read {path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; an absent file is an empty object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise StartupError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{path} does not hold a JSON object")
    return value


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if type(entry) is int and entry >= 0]


def _number(source: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = source.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high else None


def _count(source: dict[str, Any], name: str) -> int | None:
    value = source.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
