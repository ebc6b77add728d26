"""What a model is, found by asking it: a run on the meta device, without weights, before any memory is spent.

The K/V pool is shaped by what each layer hands to its attention, not by guessing names in the configuration. What
cannot be served right is refused by name and reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from verifier.model import AttentionInputs, ModelError, build_on_meta, load_config
from verifier.quantization import Quantization, quantization_of

_PROBE_TOKENS = 3
_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_FIXED_LENGTH_ROPES = frozenset({"dynamic", "longrope"})
_SCALED_ALREADY = "gemma3"
"""Of these `max_position_embeddings` is the length after linear scaling; all others state the one before."""
_LARGEST_FACTOR = 2**20
"""More is no factor but a mistake."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One attention layer as it called its attention function."""

    name: str
    """Name of the attention module."""
    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    scaling: float
    window: int | None
    """Sliding window in tokens, the own one included; None sees everything."""
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Everything known about a model before its weights are read."""

    model: str
    architecture: str
    model_type: str
    layers: tuple[LayerGeometry, ...]
    vocab_size: int
    hidden_size: int
    num_parameters: int
    max_model_len: int
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    """Reasons why this model cannot be served right; empty when it can."""
    quantization: Quantization | None = None
    """How its weights are quantised, if they are."""
    stored_dtype: str = ""
    """The type of its weights as the configuration names it, if it does."""
    is_all_linear: bool = False
    """Whether all its matrices are embeddings or those of linear layers: of which a CPU's products take care."""
    tp_plan: Mapping[str, str] = field(default_factory=dict)
    """How transformers would split its modules over ranks: style by name, `*` for the number of a layer."""

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """K/V memory of one token over all layers."""
        return sum(layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in self.layers) * bytes_per_number


class Recorder:
    """Stands in for a step and writes down every attention call. Owns the list of calls."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.layers: list[LayerGeometry] = []
        self.bidirectional: list[str] = []

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Note the call; [1, heads, N, k_dim] queries -> zeros [1, N, heads, v_dim]."""
        query, key, value = inputs.query, inputs.key, inputs.value
        name = self.names[id(inputs.module)]
        if not getattr(inputs.module, "is_causal", True):
            self.bidirectional.append(name)
        layer = LayerGeometry(
            name=name,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            k_dim=key.shape[3],
            v_dim=value.shape[3],
            scaling=query.shape[3] ** -0.5 if inputs.scaling is None else float(inputs.scaling),
            window=None if inputs.window is None else int(inputs.window),
            softcap=None if inputs.softcap is None else float(inputs.softcap),
            has_sinks=inputs.sinks is not None,
        )
        self.layers.append(layer)
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))


def probe(model: str, revision: str = "") -> ProbeReport:
    """Look at a model folder or Hub id; only its configuration is read.

    Raises: ModelError when there is nothing to look at; a model that can be looked at but not served comes back with
    its `refusals`.
    """
    return probe_config(load_config(model, revision), model)


def probe_config(config: Any, model: str = "") -> ProbeReport:
    """Look at a configuration (see `probe`)."""
    text = config.get_text_config()
    stored_dtype = str(getattr(config, "dtype", None) or "").removeprefix("torch.")  # building the network changes it
    quantization = quantization_of(config)
    refusals = _refused_by_config(text) + list(quantization.refusals if quantization else ())
    recorder = Recorder({})
    network = None
    try:
        network = build_on_meta(config)
    except ModelError as error:
        refusals.append(str(error))
    if network is not None and not refusals:
        recorder = Recorder({id(module): name for name, module in network.named_modules()})
        refusals += _run(network, recorder, text)
    max_model_len, notes = _context_limit(text)
    if quantization is not None and quantization.is_unpacked:
        notes.append(f"weights quantised by {quantization.method} are unpacked while they are loaded")
    if max_model_len <= 0:
        refusals.append(f"{config.model_type}: the configuration names no context length (max_position_embeddings)")
    return ProbeReport(
        model=model,
        architecture=type(network).__name__ if network is not None else str(getattr(config, "architectures", None)),
        model_type=config.model_type,
        layers=tuple(recorder.layers),
        vocab_size=int(text.vocab_size),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
        num_parameters=sum(p.numel() for p in network.parameters()) if network is not None else 0,
        max_model_len=max_model_len,
        notes=tuple(notes),
        refusals=tuple(refusals),
        quantization=quantization,
        stored_dtype=stored_dtype,
        is_all_linear=network is not None and all(map(_is_known, network.modules())),
        tp_plan=dict(getattr(network, "tp_plan", None) or {}),
    )


def _is_known(module: torch.nn.Module) -> bool:
    """Whether a module has no matrix of its own but that of an embedding or a linear layer."""
    is_known = isinstance(module, torch.nn.Embedding | torch.nn.Linear) or type(module).__name__ == "Conv1D"
    return is_known or all(weight.dim() < 2 for weight in module.parameters(recurse=False))


def _refused_by_config(text: Any) -> list[str]:
    refusals = []
    others = sorted(set(getattr(text, "layer_types", None) or []) - _SERVED_LAYER_TYPES)
    if others:
        refusals.append(
            f"{text.model_type} has layers of type {', '.join(others)}: trees need causal attention, full or sliding"
        )
    if getattr(text, "is_encoder_decoder", False):
        refusals.append(f"{text.model_type} is an encoder-decoder: only causal language models are served")
    if getattr(text, "use_bidirectional_attention", None):
        refusals.append(f"{text.model_type} asks for bidirectional attention: only causal attention can be served")
    if getattr(text, "num_kv_shared_layers", 0):
        refusals.append(f"{text.model_type} shares K/V between layers: not supported")
    if getattr(text, "attention_chunk_size", None):
        refusals.append(f"{text.model_type} uses chunked attention, which lives only in a mask: not supported")
    return refusals


def _run(network: torch.nn.Module, recorder: Recorder, text: Any) -> list[str]:
    """Run three tokens on the meta device and judge what was recorded."""
    name = type(network).__name__
    tokens = torch.zeros((1, _PROBE_TOKENS), dtype=torch.int64, device="meta")
    positions = torch.zeros_like(tokens)
    if getattr(network, "_supports_attention_backend", None) is False:
        return [f"{name} does not dispatch its attention to a registered function"]
    try:
        with torch.no_grad():
            output = network(input_ids=tokens, position_ids=positions, use_cache=False, step=recorder)
    except KeyError as error:
        if error.args == ("step",):
            return [f"{name} drops the step keyword on the way to its attention"]
        return [f"{name} cannot be run on the meta device: {error!r}"]
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        return [f"{name} cannot be run on the meta device: {type(error).__name__}: {str(error).splitlines()[0]}"]
    return _judge(name, recorder, text, tuple(output.logits.shape))


def _judge(name: str, recorder: Recorder, text: Any, logits_shape: tuple[int, ...]) -> list[str]:
    refusals = []
    num_layers = int(text.num_hidden_layers)
    if len(recorder.layers) != num_layers or len({layer.name for layer in recorder.layers}) != num_layers:
        refusals.append(
            f"{name} called the attention function {len(recorder.layers)} times for {num_layers} layers: "
            "some state lives elsewhere"
        )
    if recorder.bidirectional:
        refusals.append(f"{name} has non-causal attention in {recorder.bidirectional[0]}")
    layer_types = getattr(text, "layer_types", None) or []
    for layer, kind in zip(recorder.layers, layer_types, strict=False):
        if kind == "sliding_attention" and layer.window is None:
            refusals.append(f"{name}: sliding layer {layer.name} passes no window")
            break
    expected = (1, _PROBE_TOKENS, int(text.vocab_size))
    if logits_shape != expected:
        refusals.append(f"{name} returned logits of shape {logits_shape}, not {expected}")
    return refusals


def _context_limit(text: Any) -> tuple[int, list[str]]:
    """Longest context in tokens, and notes on why it is shorter than the configuration says."""
    stated = int(getattr(text, "max_position_embeddings", 0) or getattr(text, "n_positions", 0) or 0)
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]
    limits, notes = [], []
    for parameters in nested:
        kind = parameters.get("rope_type", "default")
        original = parameters.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if kind in _FIXED_LENGTH_ROPES:
            # A dynamic rope begins to change at max_position_embeddings, whatever its original length.
            limits.append(min(int(original), stated) if original and kind == "longrope" else stated)
            notes.append(
                f"context limited to {limits[-1]} tokens: beyond it {kind} rope depends on the longest row of the batch"
            )
        elif kind == "yarn" or (kind == "linear" and not text.model_type.startswith(_SCALED_ALREADY)):
            limits.append(_scaled(parameters.get("factor"), original, stated))
    return min(limits, default=stated), notes


def _scaled(factor: Any, original: Any, stated: int) -> int:
    """The context that a rope was stretched to: a factor counts from the original length, which is perhaps not told."""
    if not isinstance(factor, int | float) or not 1 <= factor < _LARGEST_FACTOR:
        return stated
    return int(factor * (original or stated))
