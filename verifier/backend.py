"""Which back end runs, and what comes with it: the kernels of one back end are used together or not at all."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from verifier.attention import TreeAttention
from verifier.cpu.build import NoLibrary, load_library
from verifier.cuda.parts import DeviceParts, DeviceSteps
from verifier.kv import Mover, move_slots
from verifier.model import ModelError

REGISTRY: dict[str, str] = {
    "reference": "verifier.torch.reference:ReferenceAttention",
    "native": "verifier.cpu.attention:NativeAttention",
    "sdpa": "verifier.torch.attention:SdpaAttention",
    "triton": "verifier.cuda.attention:TritonAttention",
}
"""Attention back ends by name; a name resolves to "module:Class" only when it is chosen."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """What a step is run with beside the model."""

    attention: TreeAttention
    mover: Mover = move_slots
    make_steps: Callable[[DeviceParts], DeviceSteps] | None = None
    """Makes what runs whole steps on the device; None walks with torch or on the host."""


def load_backend(name: str, device: str) -> Backend:
    """The back end `name`, or for "auto" the best one for `device`. Raises: ModelError if it cannot run there."""
    name = choose_backend(name, device)
    module, class_name = REGISTRY[name].split(":")
    attention: TreeAttention = getattr(importlib.import_module(module), class_name)()
    if name != "triton":
        return Backend(attention)
    return Backend(
        attention,
        importlib.import_module("verifier.cuda.kernels.move").move,
        partial(importlib.import_module("verifier.cuda.path").DevicePath, attention),
    )


def choose_backend(name: str, device: str) -> str:
    """What "auto" stands for: triton on a GPU where it is installed, native on a CPU with a compiler, else sdpa.

    Raises: ModelError if what was asked for by name cannot run here.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto" and device == "cuda":
        return "triton" if has_triton else "sdpa"
    if name == "auto":
        return _native_or_sdpa()
    if name == "native":
        _require_native(device)
    if name == "triton":
        if not has_triton:
            raise ModelError("attention triton was asked for, but the package triton is not installed")
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ModelError(
                "attention triton needs a CUDA device; with TRITON_INTERPRET=1 it runs on a CPU, slowly, for tests"
            )
    return name


def _native_or_sdpa() -> str:
    try:
        load_library()
    except NoLibrary as error:
        logger.warning("attention runs through torch, slower: %s", error)
        return "sdpa"
    return "native"


def _require_native(device: str) -> None:
    """Raises: ModelError."""
    if device != "cpu":
        raise ModelError(f"attention native runs on a CPU, not on {device}")
    try:
        load_library()
    except NoLibrary as error:
        raise ModelError(f"attention native was asked for, but {error}") from error
