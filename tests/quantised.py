"""Tiny checkpoints in the formats that transformers loads, made by its packages or written as files of theirs are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import save_model

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip
GROUP = 64
_BLOCK = 128


def plain(folder: Path, **changes: Any) -> str:
    """What all of them are made from."""
    return save_model("llama", folder, **{**SIZES, **changes})


def torchao(scheme: str, **arguments: Any) -> Callable[[Path], str]:
    """A scheme of torchao by its name; an argument PerTensor or PerGroup is given by name and size."""

    def make(folder: Path) -> str:
        schemes = pytest.importorskip("torchao.quantization", reason="torchao is absent")
        from transformers import TorchAoConfig

        granular = {
            key: getattr(schemes, value[0])(*value[1:]) if isinstance(value, tuple) else value
            for key, value in arguments.items()
        }
        return _quantised(folder, TorchAoConfig(getattr(schemes, scheme)(**granular)))

    return make


def bitsandbytes(**arguments: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent")
        pytest.importorskip("accelerate", reason="accelerate is absent")
        from transformers import BitsAndBytesConfig

        return _quantised(folder, BitsAndBytesConfig(**arguments))

    return make


def _quantised(folder: Path, config: Any) -> str:
    source = plain(folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder / "quantised")
    return str(folder / "quantised")


def fp8(folder: Path) -> str:
    """Blocks of 128 x 128 in float8, as the DeepSeek and Qwen files have them."""
    pytest.importorskip("accelerate", reason="accelerate is absent")

    def rewrite(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        rows, columns = weight.shape
        blocks = weight.view(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
        scales = blocks.abs().amax((1, 3)) / 448
        yield name, (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        yield f"{name}_scale_inv", scales

    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
    # Rows in whole blocks: 128 keys and values.
    return _rewritten(folder, rewrite, told, num_key_value_heads=4)


def compressed_tensors(strategy: str, **more: Any) -> Callable[[Path], str]:
    """8-bit integers by channel; activations are quantised by `strategy` on the way."""

    def make(folder: Path) -> str:
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is absent")

        def rewrite(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
            scale = weight.abs().amax(1, keepdim=True) / 127
            yield name, (weight / scale).round().to(torch.int8)
            yield f"{name}_scale", scale

        form = {"num_bits": 8, "type": "int", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**form, "strategy": "channel", "dynamic": False},
            "input_activations": {**form, "strategy": strategy, "dynamic": True},
        }
        told = {
            "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more,
        }  # fmt: skip
        return _rewritten(folder, rewrite, told)

    return make


def gptq(folder: Path) -> str:
    """4 bits, eight rows to one word; a zero point is stored less one."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is absent")
    pytest.importorskip("optimum", reason="optimum is absent")

    def rewrite(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        numbers, scales = _in_groups(weight)
        stem = name.removesuffix("weight")
        yield f"{stem}qweight", _packed(numbers, 0, range(8))
        yield f"{stem}qzeros", _packed(torch.full(scales.shape, 7), 1, range(8))
        yield f"{stem}scales", scales
        yield f"{stem}g_idx", (torch.arange(numbers.shape[0]) // GROUP).int()

    told = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    return _rewritten(folder, rewrite, {**told, "checkpoint_format": "gptq"})


def awq(folder: Path) -> str:
    """4 bits, eight columns to one word, even ones first."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is absent")
    pytest.importorskip("accelerate", reason="accelerate is absent")
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def rewrite(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        numbers, scales = _in_groups(weight)
        stem = name.removesuffix("weight")
        yield f"{stem}qweight", _packed(numbers, 1, order)
        yield f"{stem}qzeros", _packed(torch.full(scales.shape, 8), 1, order)
        yield f"{stem}scales", scales

    told = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _rewritten(folder, rewrite, told)


def _rewritten(
    folder: Path,
    rewrite: Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]],
    told: dict[str, Any],
    **changes: Any,
) -> str:
    """The plain model with every projection rewritten and its configuration told so."""
    path = Path(plain(folder, **changes))
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        found.update(rewrite(name, tensor) if "_proj" in name else [(name, tensor)])
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()}, path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return str(path)


def _in_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> numbers 0..15 [in, out] with 8 for zero, scales [in / GROUP, out] float16."""
    groups = weight.t().reshape(-1, GROUP, weight.shape[0])
    scales = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scales).round() + 8).clamp(0, 15).long().view(weight.t().shape), scales[:, 0].half()


def _packed(numbers: torch.Tensor, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Eight neighbours along `dim` in one int32, number order[k] at bit 4 k."""
    eights = numbers.movedim(dim, -1).unflatten(-1, (-1, 8))
    words = sum(eights[..., place].long() << (4 * bit) for bit, place in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int().movedim(-1, dim)
