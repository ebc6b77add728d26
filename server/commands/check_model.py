"""`foretoken check-model`: whether a model can be served right, and in how much memory. Needs no weights.

Looks at the model as the worker process would, so it imports torch: nothing on the API side may import it.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from server.config import SettingsError
from server.errors import StartupError
from server.gguf import resolve
from server.model_files import check_revision, read
from verifier.memory import CPU_KV_GIB, GIB, PageDemand
from verifier.model import ModelError
from verifier.probe import LayerGeometry, ProbeReport, probe

_BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken check-model`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, GGUF file or Hub id; no weights are read, but of a GGUF file")
    add("--revision", default="", help="branch, tag or commit of a Hub model")
    add("--dtype", default="auto", choices=("auto", *_BYTES_OF), help="weights and K/V type [auto: as `serve`]")
    add("--kv-cache-gib", type=float, default=CPU_KV_GIB, metavar="GIB", help="memory for K/V pages [%(default)s]")
    add("--page-size", type=int, default=16, metavar="TOKENS", help="tokens of one K/V page [%(default)s]")
    add("--max-model-len", type=int, default=0, metavar="TOKENS", help="longest request [the model's limit]")
    add("--max-num-seqs", type=int, default=64, metavar="N", help="most requests that run at once [%(default)s]")


def run(arguments: argparse.Namespace) -> int:
    """Print the probe's table, the memory plan and what is missing; 2 if the model is refused."""
    if not 0 < arguments.kv_cache_gib < 1e6 or arguments.page_size < 1 or arguments.max_model_len < 0:
        raise SettingsError("--kv-cache-gib and --page-size must be positive, --max-model-len not negative")
    if not 1 <= arguments.max_num_seqs <= 1024:
        raise SettingsError(f"--max-num-seqs: must be 1 to 1024, got {arguments.max_num_seqs}")
    check_revision(arguments.model, arguments.revision)
    named, arguments.model = arguments.model, resolve(arguments.model)
    if named != arguments.model:
        print(f"{named}: a GGUF file; what follows is of its conversion")
    try:
        report = probe(arguments.model, arguments.revision)
    except ModelError as error:
        raise SettingsError(str(error)) from error
    print("\n".join(describe(report)))
    if report.refusals:
        for reason in report.refusals:
            print(f"refused: {reason}")
        return 2
    dtype = _served_dtype(arguments.dtype, report)
    plan = memory_plan(
        report,
        dtype,
        int(arguments.kv_cache_gib * GIB),
        PageDemand(arguments.max_model_len or report.max_model_len, arguments.page_size, arguments.max_num_seqs),
    )
    folder = Path(arguments.model)
    print("\n".join(plan.lines(stored_weight_bytes(folder))))
    problem = tokenizer_problem(folder) if folder.is_dir() else ""
    if problem and (folder / "tokenizer.json").is_file():
        print(f"refused: {problem}")
        return 2
    print(verdict(folder, has_tokenizer=not problem))
    return 0


def tokenizer_problem(folder: Path) -> str:
    """Why the small files of `folder` cannot be read; empty if they can."""
    try:
        read(folder)
    except StartupError as error:
        return str(error)
    return ""


def verdict(folder: Path, *, has_tokenizer: bool) -> str:
    """The last line for a model that the probe accepts; of one on the Hub only the configuration was looked at."""
    if not folder.is_dir():
        return "can be served, if a tokenizer and weights as safetensors are there: neither was looked at"
    missing = [] if has_tokenizer else ["tokenizer.json"]
    if not any(folder.glob("*.safetensors")):
        missing.append("its weights as *.safetensors")
    return f"can be served once {folder} has {' and '.join(missing)}" if missing else "can be served"


def describe(report: ProbeReport) -> list[str]:
    """What the model is: a few facts, then its layers, equal neighbours in one line."""
    lines = [
        f"model         {report.model} ({report.architecture}, {report.model_type})",
        f"parameters    {report.num_parameters:,}",
        f"vocabulary    {report.vocab_size:,}",
        f"hidden size   {report.hidden_size:,}",
        f"context       {report.max_model_len:,} tokens",
    ]
    if report.quantization is not None:
        lines.append(f"quantised by  {report.quantization.method}")
    lines += [f"note          {note}" for note in report.notes]
    if report.layers:
        rows: list[tuple[str, ...]] = [
            ("layers", "heads", "kv heads", "k width", "v width", "scaling", "window", "soft-cap", "sinks")
        ]
        first = 0
        for shape, group in groupby(report.layers, key=_shape):
            last = first + len(list(group)) - 1
            rows.append((str(first) if first == last else f"{first}-{last}", *shape))
            first = last + 1
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines.append("")
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.append("")
    return lines


def _shape(layer: LayerGeometry) -> tuple[str, ...]:
    return (
        str(layer.num_heads),
        str(layer.num_kv_heads),
        str(layer.k_dim),
        str(layer.v_dim),
        f"{layer.scaling:.4g}",
        "-" if layer.window is None else str(layer.window),
        "-" if layer.softcap is None else f"{layer.softcap:g}",
        "yes" if layer.has_sinks else "-",
    )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes. All sizes in bytes."""

    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_budget_bytes: int
    num_pages: int
    demand: PageDemand
    is_packed: bool = False
    """Whether the weights stay quantised, so that what they take is what they take on disk."""

    def lines(self, stored_bytes: int | None) -> list[str]:
        """The plan for a person; `stored_bytes` is what the weight files take on disk, if they are there."""
        page_size, max_model_len = self.demand.page_size, self.demand.max_model_len
        pool_bytes = self.num_pages * page_size * self.kv_bytes_per_token
        num_tokens = (self.num_pages - 1) * page_size  # nothing is kept in the trash page
        num_requests = (self.num_pages - 1) / self.demand.pages_per_row
        stored = "no weight files in the folder" if stored_bytes is None else f"{_size(stored_bytes)} on disk"
        weights = "quantised" if self.is_packed else f"{_size(self.weight_bytes)} as {self.dtype}"
        return [
            f"weights       {weights} ({stored})",
            f"K/V           {self.kv_bytes_per_token:,} bytes per token as {self.dtype}",
            f"K/V pool      {_size(pool_bytes)} of {_size(self.kv_budget_bytes)}: {self.num_pages:,} pages of "
            f"{page_size}, {num_tokens:,} tokens, {num_requests:.1f} requests of {max_model_len:,} tokens",
        ]


def memory_plan(report: ProbeReport, dtype: str, kv_budget_bytes: int, demand: PageDemand) -> MemoryPlan:
    """Weights and pages of a model that the probe accepts, as the server would plan them.

    Raises SettingsError when the server would not start: not even one request of the longest length fits into the K/V
    budget, or that length is over the model's.
    """
    if demand.max_model_len > report.max_model_len:
        raise SettingsError(f"--max-model-len: the model's limit is {report.max_model_len}, got {demand.max_model_len}")
    num_bytes = _BYTES_OF[dtype]
    per_token = report.kv_bytes_per_token(num_bytes)
    num_pages = demand.fitting(kv_budget_bytes, per_token * demand.page_size)
    if num_pages < demand.least:
        raise SettingsError(
            f"--kv-cache-gib {kv_budget_bytes / 2**30:g}: gives {num_pages} pages of {demand.page_size} tokens, one "
            f"request of {demand.max_model_len} tokens needs {demand.least} with the trash page: give more memory or "
            "pass --max-model-len"
        )
    is_packed = report.quantization is not None and not report.quantization.is_unpacked
    return MemoryPlan(
        dtype, report.num_parameters * num_bytes, per_token, kv_budget_bytes, num_pages, demand, is_packed
    )


def stored_weight_bytes(folder: Path) -> int | None:
    """Size of the weights in a model folder, from an index or the files' own sizes; None without any."""
    for name in _INDEX_NAMES:
        try:
            return int(json.loads((folder / name).read_text(encoding="utf-8"))["metadata"]["total_size"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    sizes = [os.path.getsize(file) for file in folder.glob("*.safetensors")] if folder.is_dir() else []
    return sum(sizes) or None


def _served_dtype(dtype: str, report: ProbeReport) -> str:
    if dtype != "auto":
        return dtype
    if report.quantization is not None and report.quantization.dtype:
        return report.quantization.dtype
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"
