"""A network split over ranks by transformers' own plan for its family (`tp_plan`): who holds what of each layer.

Every rank reads the whole model and keeps its part, so that weights are read as for one rank, by no other loader. What
transformers puts around the layers sums and gathers where parts must meet; the hidden states between layers and the
logits are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from verifier.model import ModelError
from verifier.parallel.wire import RankLost
from verifier.probe import LayerGeometry, ProbeReport, Recorder

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
_PROBE_TOKENS = 3


def split_refusals(report: ProbeReport, size: int) -> list[str]:
    """Reasons why this model cannot be split over `size` ranks, as far as they show before its weights are read."""
    if report.quantization is not None:
        return [f"its weights are quantised by {report.quantization.method}"]
    plan = report.tp_plan
    if not any("*" in name and style != "replicate" for name, style in plan.items()):
        return [f"{report.model_type} has no tensor parallel plan for its layers in transformers"]
    if not any(name.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and style == "colwise" for name, style in plan.items()):
        return []  # every rank attends with all heads
    for layer in report.layers:
        for kind, count in (("attention", layer.num_heads), ("K/V", layer.num_kv_heads)):
            if count % size:
                return [f"{count} {kind} heads of {layer.name} do not divide by tensor_parallel_size {size}"]
    return []


def split_network(network: torch.nn.Module, size: int, device: str) -> torch.nn.Module:
    """Keep this rank's part of a loaded network, on `device`. Raises: ModelError if transformers has another way."""
    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        plan = network._resolve_parallel_plans(DistributedConfig(tp_size=size))[0]  # type: ignore[operator]
    except (ImportError, AttributeError) as error:
        reason = f"transformers {transformers.__version__} cannot split a loaded model: 5.24 can"
        raise ModelError(f"tensor_parallel_size {size}: {reason}") from error
    mesh = init_device_mesh(device, (size,), mesh_dim_names=("tp",))
    ties = _untie(network)
    try:
        with torch.no_grad():
            apply_tensor_parallelism(network, mesh, plan)
    except (KeyError, ValueError) as error:
        raise ModelError(f"{type(network).__name__} cannot be split over ranks: {error}") from error
    for parts in ties:
        _tie_again(parts)
    _unwrap_linears(network)
    return network.requires_grad_(False).to(device)


Place = tuple[torch.nn.Module, str]
"""A module, and the name of one of its own parameters."""


def _untie(network: torch.nn.Module) -> list[list[Place]]:
    """Give each place of a shared parameter one of its own (over the same memory): the plan names places."""
    places: dict[int, list[Place]] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    ties = [shared for shared in places.values() if len(shared) > 1]
    for shared in ties:
        for module, name in shared[1:]:
            parameter = module._parameters[name]
            assert parameter is not None, name
            module._parameters[name] = Parameter(parameter.detach(), requires_grad=False)
    return ties


def _tie_again(shared: list[Place]) -> None:
    """One memory for what was shared, where all places are split alike."""
    first = shared[0][0]._parameters[shared[0][1]]
    for module, name in shared[1:]:
        other = module._parameters[name]
        if isinstance(first, DTensor) and isinstance(other, DTensor) and first.placements == other.placements:
            module._parameters[name] = first


def _unwrap_linears(network: torch.nn.Module) -> None:
    """Leave plain tensors in the linear layers inside: unwrapping them at every call is a third of a small step.

    The output embedding stays wrapped: a drafter may ask for all of it.
    """
    head = network.get_output_embeddings()  # type: ignore[operator]
    for module in network.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    module._parameters[name] = Parameter(parameter.to_local(), requires_grad=False)


@torch.inference_mode()
def rank_layers(network: torch.nn.Module, layers: Sequence[LayerGeometry], device: str) -> tuple[LayerGeometry, ...]:
    """The attention layers as this rank calls them; all ranks must ask at the same time.

    Raises: ModelError if they are not a fair part of `layers`, those of the whole network; RankLost.
    """
    recorder = Recorder({id(module): name for name, module in network.named_modules()})
    tokens = torch.zeros((1, _PROBE_TOKENS), dtype=torch.int64, device=device)
    try:
        network(input_ids=tokens, position_ids=torch.zeros_like(tokens), use_cache=False, step=recorder)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        # Which of two it is, shapes that do not fit or a rank that died meanwhile, a RuntimeError does not tell.
        kind = RankLost if isinstance(error, RuntimeError) else ModelError
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise kind(f"{type(network).__name__} does not run split over ranks: {reason}") from error
    found, size = tuple(recorder.layers), distributed.get_world_size()
    if len(found) != len(layers):
        raise ModelError(f"{type(network).__name__} attends {len(found)} times split over ranks, not {len(layers)}")
    for part, whole in zip(found, layers, strict=True):
        heads = ((part.num_heads, whole.num_heads), (part.num_kv_heads, whole.num_kv_heads))
        is_fair = any(all(mine * share == all_of for mine, all_of in heads) for share in (1, size))
        if part.name != whole.name or not is_fair:
            raise ModelError(
                f"{type(network).__name__} cannot be split over ranks: one of {size} has {part.num_heads} heads and "
                f"{part.num_kv_heads} K/V heads of {whole.name}, which has {whole.num_heads} and {whole.num_kv_heads}"
            )
    return found
