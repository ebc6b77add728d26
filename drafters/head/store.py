"""A trained head on disk: a folder with `head.safetensors` (its weights) and `head.json` (what it is, and for whom)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from drafters.coupling import Coupling
from drafters.head.files import FileError, read_json, read_tensors, write_json, write_tensors
from drafters.head.head import Head, HeadShape
from drafters.rows import MAX_FRAMES, RECENT

FORMAT, VERSION = "foretoken-ctc-head", 1
WEIGHTS_FILE, INFO_FILE = "head.safetensors", "head.json"
_MOST = {"window": RECENT - 1, "num_slots": MAX_FRAMES, "num_layers": 64, "width": 2**16, "ffn_size": 2**18}
OBJECTIVE = "ctc"
"""What a head is trained for. No other is known any more."""


class HeadError(FileError):
    """A head that cannot be used here; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInfo:
    """What is known of a head beside its weights."""

    shape: HeadShape
    model: str
    """Name of the target, for people."""
    fingerprint: str
    """verifier.fingerprint.model_fingerprint of the target."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained and what it reached, for people."""
    coupling: Coupling | None = None
    """How much the shared noise counts beside its estimates; None where it was not fitted."""


def save_head(folder: Path, head: Head, info: HeadInfo, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the head; weights first, and each file whole or not at all. Raises: FileError.

    `folder` may hold an older head. A crash between the two files leaves one that `load_head` refuses: both name the
    same run.
    """
    # Numbers in `dtype`; token ids as they are, in half the bytes.
    tensors = {
        name: tensor.to(dtype if tensor.is_floating_point() else torch.int32)
        for name, tensor in head.state_dict().items()
    }
    mark = f"{info.fingerprint}:{hashlib.sha256(repr(info).encode()).hexdigest()[:16]}"
    write_tensors(folder / WEIGHTS_FILE, tensors, {"mark": mark})  # safetensors has no order for several
    value = {"format": FORMAT, "version": VERSION, "mark": mark, "objective": OBJECTIVE, **asdict(info)}
    value["coupling"] = None if info.coupling is None else info.coupling.as_json()
    write_json(folder / INFO_FILE, value)


def load_head(folder: Path, fingerprint: str | None = None, model: str = "") -> tuple[Head, HeadInfo]:
    """The head in `folder`, in float32.

    Args: `fingerprint` of the target it is to serve, None to skip that check; `model` names the target in a refusal.
    Raises: FileError when files are missing or broken; HeadError, one of these, when they are of an unknown version, do
    not fit together, or when the head was trained for another target.
    """
    value = read_json(folder / INFO_FILE)
    info = _info(folder / INFO_FILE, value)
    if fingerprint is not None and info.fingerprint != fingerprint:
        raise HeadError(
            f"{folder}: this head was trained for {info.model} ({info.fingerprint[:12]}), not for "
            f"{model or 'this model'} ({fingerprint[:12]})"
        )
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    if metadata.get("mark") != value.get("mark"):
        raise HeadError(f"{folder}: {WEIGHTS_FILE} and {INFO_FILE} are not of one head")
    head = Head(info.shape)
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise HeadError(
            f"{folder}: {name} has shape {found.get(name, 'none')}, {INFO_FILE} says {wanted.get(name, 'none')}"
        )
    head.load_state_dict({name: tensor.to(head.state_dict()[name].dtype) for name, tensor in tensors.items()})
    ids = head.draft_tokens
    if bool((ids.diff() <= 0).any()) or not 0 <= int(ids[0]) <= int(ids[-1]) < info.shape.vocab_size:
        raise HeadError(f"{folder}: draft_tokens must rise from 0 to at most {info.shape.vocab_size - 1}")
    return head.eval(), info


def _info(path: Path, value: Mapping[str, Any]) -> HeadInfo:
    """The checked content of head.json. Raises: HeadError."""
    for name, known in (("format", FORMAT), ("version", VERSION), ("objective", OBJECTIVE)):
        if value.get(name) != known:
            raise HeadError(f"{path}: {name} is {value.get(name)!r}, this program reads {known!r}")
    shape = _shape(path, value.get("shape"))
    try:
        coupling = None if value.get("coupling") is None else Coupling.from_json(value["coupling"], shape.num_slots)
    except ValueError as error:
        raise HeadError(f"{path}: coupling {error}") from error
    texts = {name: str(value.get(name)) for name in ("model", "fingerprint")}
    return HeadInfo(shape=shape, training=value.get("training", {}), coupling=coupling, **texts)


def _shape(path: Path, value: Any) -> HeadShape:
    names = {entry.name: entry.type for entry in fields(HeadShape)}
    if not isinstance(value, dict) or set(value) != set(names):
        raise HeadError(f"{path}: shape must hold {', '.join(names)}")
    for name, kind in names.items():
        number = value[name]
        is_right = type(number) is int if kind == "int" else type(number) in (int, float)
        least = 0 if name in ("residual_rank", "bias_rank", "draft_vocab_size") else 1
        most = _MOST.get(name, 2**31 - 1)
        if not is_right or not least <= number <= most:
            raise HeadError(f"{path}: {name} must be a number from {least} to {most}, got {number!r}")
    shape = HeadShape(**value)
    if shape.draft_vocab_size > shape.vocab_size:
        raise HeadError(f"{path}: draft_vocab_size is {shape.draft_vocab_size}, of {shape.vocab_size} tokens")
    if shape.width % shape.num_heads or shape.width // shape.num_heads % 2:
        raise HeadError(f"{path}: width {shape.width} does not part into {shape.num_heads} heads of an even size")
    return shape
