"""The small files of a model folder: tokenizer, configuration, chat template. No weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import Settings
from server.errors import StartupError

_PATTERNS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
]
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What the API process has to know of a model, read once at start-up."""

    tokenizer_json: str
    special_tokens: dict[str, str]
    """bos_token, eos_token ... as the chat template sees them."""
    chat_template: str | None
    extra_tokens: tuple[str, ...]
    """More tokens that tokenizer_config.json calls special."""
    eos_ids: tuple[int, ...]
    """Every end-of-sequence id that generation_config.json or config.json names."""
    defaults: GenerationDefaults


def served_names(settings: Settings) -> tuple[str, ...]:
    """Names under which clients ask for the model: those of the settings, else the folder's name or the Hub id."""
    if settings.served_model_name:
        return settings.served_model_name
    path = Path(settings.model)
    return (path.resolve().name if path.is_dir() else settings.model,)


def locate(model: str, revision: str = "") -> Path:
    """The folder with the model's small files: the folder itself, or a snapshot of them from the Hub.

    Raises StartupError in one clear line.
    """
    if not model:
        raise StartupError("no model was given: name a folder or a Hub id")
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise StartupError(f"{model} is not a folder")
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise StartupError(f"there is no folder {model}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise StartupError(
            f"cannot get {model} from the Hub: {reason[0] if reason else type(error).__name__}"
        ) from None


def read(folder: Path) -> ModelFiles:
    """Read the small files of `folder`. Raises StartupError naming what is missing or broken."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise StartupError(f"{folder} has no tokenizer.json; a tokenizer in that format is needed")
    options = _read_json(folder / "tokenizer_config.json")
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    text_config = config.get("text_config")
    eos: list[int] = []
    for source in (generation, config, text_config if isinstance(text_config, dict) else {}):
        eos.extend(_ids(source.get("eos_token_id")))
    return ModelFiles(
        tokenizer_json=_read_text(tokenizer),
        special_tokens=_special_tokens(_read_json(folder / "special_tokens_map.json"), options),
        chat_template=_chat_template(folder, options),
        extra_tokens=_extra_tokens(options),
        eos_ids=tuple(dict.fromkeys(eos)),
        defaults=GenerationDefaults(
            temperature=_number(generation, "temperature", 0.0, 2.0),
            top_p=_number(generation, "top_p", 1e-9, 1.0),
            top_k=_count(generation, "top_k"),
            min_p=_number(generation, "min_p", 0.0, 1.0),
            repetition_penalty=_number(generation, "repetition_penalty", 0.01, 100.0),
        ),
    )


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


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Later sources win; nameless extra tokens are of no use to a template."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL_NAMES:
            text = _token_text(source.get(name))
            if text is not None:
                found[name] = text
        named = source.get("extra_special_tokens")
        if isinstance(named, dict):
            found.update({name: text for name, value in named.items() if (text := _token_text(value)) is not None})
    return found


def _chat_template(folder: Path, options: dict[str, Any]) -> str | None:
    """The file wins over tokenizer_config.json; of several named templates the default one is taken."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = options.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _extra_tokens(options: dict[str, Any]) -> tuple[str, ...]:
    found: list[str] = []
    for name in ("extra_special_tokens", "additional_special_tokens"):
        values = options.get(name)
        if isinstance(values, list):
            found.extend(text for value in values if (text := _token_text(value)) is not None)
    return tuple(found)


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
