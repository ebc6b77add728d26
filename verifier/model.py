"""The target model: the only file that loads transformers models.

The forward code stays in transformers. One attention function is registered under our name and no mask function, so the
model builds no mask and hands every layer's query, key and value to `attend`, together with the `step` keyword; what a
position may see is the attention back end's business. Knows nothing about requests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError

from verifier.seam import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    find_adapter_config_file,
    no_init_weights,
    transformers,
)

ATTENTION_NAME = "foretoken"
KV_ATTRIBUTE = "foretoken_kv"
CAPTURED_ATTRIBUTE = "foretoken_captured"


class ModelError(Exception):
    """The model cannot be loaded or cannot be served right; the message is one clear line."""


class OutOfMemory(ModelError):
    """The memory that is free now does not suffice; there may be more of it later."""


Pass = tuple[torch.Tensor, torch.Tensor | None]
"""Logits and hidden states of one pass; None if the network does not say which module its output embedding is."""


class Attender(Protocol):
    """What the `step` keyword must be: it attends one layer's packed queries."""

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """One layer's attention call, as transformers made it."""

    module: torch.nn.Module
    query: torch.Tensor  # [1, heads, N, k_dim]
    key: torch.Tensor  # [1, kv_heads, N, k_dim], rotated
    value: torch.Tensor  # [1, kv_heads, N, v_dim]
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None  # [heads]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer.

    A step of None stands for a captured pass, in which the module knows its own call (see verifier.cuda.layers).
    """
    step: Attender | None = kwargs["step"]
    if step is None:
        return getattr(module, CAPTURED_ATTRIBUTE)(query, key, value, kwargs.get("s_aux")), None
    inputs = AttentionInputs(
        module=module,
        query=query,
        key=key,
        value=value,
        scaling=kwargs.get("scaling"),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return step.attend(inputs), None


def check_seam() -> None:
    """Fail at import, by name, if transformers no longer has the seam this server hangs on."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    dispatched = ALL_ATTENTION_FUNCTIONS.get_interface(ATTENTION_NAME, None)
    if dispatched is not attend or ATTENTION_NAME in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ImportError(f"transformers {transformers.__version__} does not dispatch a registered attention function")


check_seam()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def load_config(model: str, revision: str = "") -> Any:
    """The configuration of a folder or Hub id. Raises: ModelError with one clear line."""
    looks_local = os.path.isabs(model) or model.startswith((".", "~")) or model.count("/") > 1
    path = Path(model).expanduser()
    if looks_local and not path.exists():
        raise ModelError(f"model folder {model!r} does not exist")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model folder {model!r} has no config.json")
    name = str(path) if path.exists() else model
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or None, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        if _wants_code(error):
            raise ModelError(_refusal_of_code(model)) from error
        raise ModelError(f"cannot read the configuration of {model!r}: {_first_line(error)}") from error
    if find_adapter_config_file(name, revision=revision or None) is not None:
        # With the package peft, transformers would load it, and for a Hub id the model that it names in place of this.
        raise ModelError(
            f"{model!r} has an adapter (adapter_config.json), which is not loaded: merge it into the weights"
        )
    return config


def _wants_code(error: Exception) -> bool:
    """Whether transformers refused to run code that came with the model."""
    return "trust_remote_code" in str(error)


def _refusal_of_code(model: str) -> str:
    return (
        f"{model!r} needs code of its own (auto_map in config.json), which is never run: it can be served once "
        f"transformers (here {transformers.__version__}) knows its model_type"
    )


def build_on_meta(config: Any) -> torch.nn.Module:
    """The model without weights, dispatching to `attend`. Raises: ModelError."""
    try:
        with torch.device("meta"), no_init_weights():  # what has no numbers needs none
            # bfloat16: the grouped matrix products of mixture-of-experts layers exist on meta in no other type.
            network: torch.nn.Module = AutoModelForCausalLM.from_config(
                config, attn_implementation=ATTENTION_NAME, dtype=torch.bfloat16, trust_remote_code=False
            )
            network.tie_weights()  # type: ignore[operator]
    except KeyError as error:
        if error.args == (ATTENTION_NAME,):
            reason = "does not dispatch its attention to a registered function"
            raise ModelError(f"{config.model_type} {reason}") from error
        raise ModelError(f"{config.model_type} is not supported: missing {error}") from error
    except (ValueError, TypeError, AttributeError, AssertionError, ImportError, NotImplementedError) as error:
        if _wants_code(error):
            raise ModelError(_refusal_of_code(config.name_or_path or config.model_type)) from error
        raise ModelError(f"{config.model_type} is not supported: {_first_line(error)}") from error
    return _without_padding(network.eval())


def _without_padding(network: torch.nn.Module) -> torch.nn.Module:
    """Packed positions hold no padding; some families look for it in the input, which costs a host sync per step."""
    network.config.pad_token_id = None  # type: ignore[union-attr]
    return network


def load_network(model: str, revision: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model with its weights, dispatching to `attend`. Raises: ModelError with one clear line.

    With the package accelerate each weight goes straight to a GPU; without it, all of them lie on the host before.
    """
    is_placed = device != "cpu" and find_spec("accelerate") is not None
    path = Path(model).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors")) and any(path.glob("*.bin")):
        raise ModelError(
            f"{model!r} has its weights as pickle (.bin) only, which is not loaded: save it as safetensors"
        )
    transformers.logging.set_verbosity_error()  # what is wrong is told below, in one line
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        network: torch.nn.Module
        network, report = AutoModelForCausalLM.from_pretrained(
            str(path) if path.exists() else model,
            revision=revision or None,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            device_map={"": device} if is_placed else None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:
        # from_pretrained raises whatever its readers raise (safetensors, hub, torch): all mean the same to the user.
        kind = OutOfMemory if isinstance(error, MemoryError | torch.OutOfMemoryError) else ModelError
        raise kind(f"cannot load the weights of {model!r}: {_first_line(error)}") from error
    if problem := misfit(report):
        raise ModelError(f"the weights of {model!r} do not fit its config.json: {problem}")
    network = _without_padding(network.eval()).requires_grad_(False)
    return network if is_placed else network.to(device)


def misfit(report: dict[str, Any]) -> str:
    """What the loading report says that weights lack, as the end of a sentence; empty if nothing.

    A tensor that the files lack would be random.
    """
    for problem, key in (("lack", "missing_keys"), ("have in another shape", "mismatched_keys")):
        names = sorted(str(entry[0]) if isinstance(entry, tuple | list) else str(entry) for entry in report[key])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"they {problem} {names[0]}{more}"
    return ""


def attention_modules(network: torch.nn.Module, names: Sequence[str]) -> list[torch.nn.Module]:
    """The attention modules by name, in layer order."""
    modules = dict(network.named_modules())
    return [modules[name] for name in names]


class Target:
    """A network with a tap before its output embedding.

    Owns what the tap must know of the pass that runs, and the states it read there.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self._kept: int | torch.Tensor | None = None
        self._states: torch.Tensor | None = None
        head = network.get_output_embeddings()  # type: ignore[operator]
        if head is not None:
            head.register_forward_pre_hook(self._tap)

    def __call__(
        self,
        input_ids: torch.Tensor,  # [1, N] int64
        position_ids: torch.Tensor,  # [1, N] int64
        step: Attender | None,
        logits_index: torch.Tensor | None = None,  # [K + tails] int64, or None for all N
        kept: int | torch.Tensor | None = None,  # K, or places [K] int64 in the index; None for all that it names
    ) -> Pass:
        """One pass over packed positions. Returns: logits [K, V] and states [K + tails, H], in the model's dtype."""
        self._kept = kept
        output = self.network(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=0 if logits_index is None else logits_index,
            step=step,
        )
        states, self._states = self._states, None
        return output.logits[0], None if states is None else states[0]

    def _tap(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Keep the states; logits are made of no more of them than without the tap."""
        self._states = args[0]
        if self._kept is None:
            return None
        kept = args[0][:, : self._kept] if isinstance(self._kept, int) else args[0].index_select(1, self._kept)
        return (kept, *args[1:])
