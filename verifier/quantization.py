"""Quantised checkpoints: what their configuration says before weights are read, what the loaded network shows after.

The loading is that of transformers and of the packages behind it. Ours is to refuse, in one line, what would break a
promise: a scale that is taken over all rows of a step would let a text depend on what else is in the batch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from verifier.model import AttentionInputs, ModelError, OutOfMemory

_PACKAGES = {
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed-tensors",),
    "fp8": ("accelerate",),
    "gptq": ("optimum", "gptqmodel"),
    "mxfp4": ("accelerate",),
    "torchao": ("torchao",),
}
"""What pip must have installed. transformers says it too, but in some cases names a GPU where a package would do."""
_SERVED_DTYPES = frozenset({"float32", "bfloat16", "float16"})
_LARGEST_DIFFERENCE = 0.02
"""Of one row beside others to the same row alone, in largest outputs: rounding stays under 0.01 in bfloat16."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a configuration says of its weights."""

    method: str
    """As config.json names it."""
    dtype: str = ""
    """The type the other weights are stored in, in which the network runs; empty if it is not told."""
    is_unpacked: bool = False
    """Whether the weights are turned into plain ones while they are loaded."""
    refusals: tuple[str, ...] = ()


def quantization_of(config: Any) -> Quantization | None:
    """Read a configuration of transformers; None if its weights are not quantised."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        told = getattr(config.get_text_config(), "quantization_config", None)
    if told is None:
        return None
    told = told if isinstance(told, Mapping) else told.to_dict()
    method = _method(told)
    missing = [name for name in _PACKAGES.get(method, ()) if find_spec(name.replace("-", "_")) is None]
    if missing:
        names = " ".join(missing)
        return Quantization(
            method, refusals=(f"its weights are quantised by {method}, which needs packages: pip install {names}",)
        )
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(dict(told)), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
        refusals = _refusals(method, quantizer.quantization_config)
    except Exception as error:  # whatever the packages raise about a configuration that they cannot read
        return Quantization(method, refusals=(f"its weights are quantised by {method}: {_one_line(error)}",))
    dtype = str(config.get_text_config().dtype).removeprefix("torch.")
    return Quantization(
        method,
        dtype if dtype in _SERVED_DTYPES else "",
        bool(getattr(quantizer.quantization_config, "dequantize", False)),
        refusals,
    )


def _method(told: Mapping[str, Any]) -> str:
    if told.get("load_in_8bit") or told.get("load_in_4bit"):  # old bitsandbytes files name no method
        return "bitsandbytes"
    return str(told.get("quant_method"))


def _refusals(method: str, config: Any) -> tuple[str, ...]:
    reason = _mixes_rows(method, config)
    found = [] if reason is None else [_refusal_of_mixing(method, reason)]
    if getattr(getattr(config, "quantization_config", None), "kv_cache_scheme", None) is not None:
        found.append(f"it is quantised by {method} with a kv_cache_scheme: K/V are held as the model computes them")
    return tuple(found)


def _refusal_of_mixing(method: str, reason: str) -> str:
    return f"its weights are quantised by {method} {reason}: an answer would depend on what else runs"


def _mixes_rows(method: str, config: Any) -> str | None:
    """How the activations of one row change the products of another, if they do."""
    if method == "bitsandbytes" and config.load_in_8bit and config.llm_int8_threshold > 0:
        return (
            f"in 8 bits with llm_int8_threshold {config.llm_int8_threshold:g}, which picks columns by all rows of a "
            "step (0 in config.json turns that off)"
        )
    if method == "torchao":
        names = sorted({name for name, scheme in _torchao_schemes(config.quant_type) if _has_one_scale(name, scheme)})
        return f"({', '.join(names)}) with one scale for all rows of a step" if names else None
    if method == "compressed-tensors" and config.quantization_config is not None:
        for group in config.quantization_config.config_groups.values():
            inputs = group.input_activations
            if inputs is not None and inputs.dynamic is True and inputs.strategy == "tensor":
                return "with one dynamic scale for all rows of a step (strategy tensor)"
    return None


def _torchao_schemes(quant_type: Any) -> Iterator[tuple[str, Any]]:
    """The schemes of a configuration by class name; one may hold others by module."""
    nested = getattr(quant_type, "fqn_to_config", None)
    if nested is None:
        yield type(quant_type).__name__, quant_type
        return
    for scheme in nested.values():
        if scheme is not None:
            yield from _torchao_schemes(scheme)


def _has_one_scale(name: str, scheme: Any) -> bool:
    if "DynamicActivation" not in name:
        return False
    granularity = getattr(scheme, "granularity", None)
    of_activations = granularity[0] if isinstance(granularity, list | tuple) else granularity
    return type(of_activations).__name__ == "PerTensor" or bool(getattr(scheme, "use_dynamic_per_tensor_scale", False))


class _Witness:
    """In the place of attention: notes the type of the keys, which the K/V pool must have. Owns that note."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        query, key, value = inputs.query, inputs.key, inputs.value
        self.dtype = key.dtype
        weights = query.mean(dim=3, keepdim=True) + key.mean(dim=(1, 3))[:, None, :, None]
        spread = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (spread * weights).transpose(1, 2)


@torch.inference_mode()
def check_loaded(network: torch.nn.Module, method: str, dtype: torch.dtype) -> None:
    """Run a quantised network once: it must run at all, in `dtype`, each row by itself. Raises: ModelError."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would warn of a cast in every product
    witness = _Witness()
    device = next(network.parameters()).device
    tokens = torch.arange(4, device=device)[None]
    asked = str(dtype).removeprefix("torch.")
    try:
        network(input_ids=tokens, position_ids=tokens, use_cache=False, step=witness)
        found = str(witness.dtype).removeprefix("torch.")
        mixing = _mixing_layer(network, dtype) if found == asked else None
    except Exception as error:  # whatever the kernels of the packages raise
        kind = OutOfMemory if isinstance(error, MemoryError | torch.OutOfMemoryError) else ModelError
        raise kind(f"weights quantised by {method} do not run in {asked} here: {_one_line(error)}") from error
    if found != asked:
        raise ModelError(f"weights quantised by {method} run in {found}, not in {asked}: pass --dtype {found}")
    if mixing is not None:
        raise ModelError(_refusal_of_mixing(method, f"so that rows of a step change each other in {mixing}"))


def _mixing_layer(network: torch.nn.Module, dtype: torch.dtype) -> str | None:
    """The first linear layer in which a row depends on its neighbours.

    The row is one that shared scales and shared outlier columns must change: one number stands out, the others are
    small, and its neighbours are a hundred times larger.
    """
    for name, module in network.named_modules():
        if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
            continue
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
        noise = torch.sin(torch.arange(3 * module.in_features, device=device).float() ** 2)
        rows = (noise.view(1, 3, -1) * 0.03).to(dtype)
        rows[..., 0] = 5.0
        alone = module(rows)
        beside = module(torch.cat([rows, rows.roll(1, dims=-1) * 100, (noise.view(1, 3, -1) * 500).to(dtype)], dim=1))
        difference = (beside[:, :3] - alone).abs().max() / alone.abs().max()
        if not difference <= _LARGEST_DIFFERENCE:
            return f"{name} ({difference:.0%})"
    return None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
