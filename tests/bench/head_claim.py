"""The claim of the CTC-drafter paper (NeurIPS 2024): frames trained with CTC and collapsed win more than heads that
guess their tokens independently. On heads of one trunk, trained on the same answers with the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from drafters.base import Drafter
from drafters.head.store import HeadError, HeadInfo
from tests.bench.arms import HeadUse, Makers

PAPER_RATIO = 3.50 / 2.58
"""CTC-drafter over Medusa on Vicuna-7B, as published."""
_SAME = ("steps", "answers", "batch", "seed", "minutes")


class Cells(Protocol):
    """Measures cells at one temperature."""

    different: list[str]

    def measure(self, drafter: Drafter, name: str, max_nodes: int) -> dict[str, Any]:
        """One cell."""


def parse(text: str) -> tuple[str, Path]:
    """NAME=DIR. Raises: HeadError."""
    name, mark, folder = text.partition("=")
    if not (name and mark and folder):
        raise HeadError(f"--heads: {text!r} is not NAME=DIR")
    return name, Path(folder)


def differences(infos: dict[str, HeadInfo]) -> list[str]:
    """In what the heads differ beside their objective: then they cannot prove anything."""
    found = []
    first_name, first = next(iter(infos.items()))
    for name, info in infos.items():
        for key in _SAME:
            mine, other = info.training.get(key), first.training.get(key)
            if mine != other:
                found.append(f"{name} has {key} {mine}, {first_name} {other}")
        if info.shape != first.shape:
            found.append(f"{name} has another shape than {first_name}: {info.shape}")
    return found


def uses(info: HeadInfo) -> Iterator[tuple[str, HeadUse]]:
    """The trees that a head can be asked for."""
    ways = {"independent": False} if info.is_independent else {"collapsed": True, "not collapsed": False}
    for way, is_collapsed in ways.items():
        yield way, HeadUse(is_collapsed=is_collapsed)
        if info.shape.bias_rank:
            yield f"{way}, bias left out", HeadUse(is_collapsed=is_collapsed, has_bias=False)


def ratios(lengths: dict[str, dict[str, float]], infos: dict[str, HeadInfo]) -> dict[str, float]:
    """Every CTC head's own tree over its frames without collapse, and over every independent head's own tree."""
    found = {}
    baselines = [name for name, info in infos.items() if info.is_independent]
    for name, info in infos.items():
        if info.is_independent:
            continue
        for way, length in lengths[name].items():
            if not way.startswith("collapsed"):
                continue
            raw = way.replace("collapsed", "not collapsed")
            found[f"{name}, {way} / {raw}"] = round(length / lengths[name][raw], 3)
            for other in baselines:
                same = way.replace("collapsed", "independent")
                if same in lengths[other]:
                    found[f"{name}, {way} / {other}, {same}"] = round(length / lengths[other][same], 3)
        found |= {
            f"{name}, own tree / {other}, own tree": round(
                lengths[name]["collapsed"] / lengths[other]["independent"], 3
            )
            for other in baselines
        }
    return found


def run(
    heads: dict[str, Path],
    makers: Makers,
    sizes: list[int],
    temperatures: list[float],
    compared_at: Callable[[float], Cells],
) -> dict[str, Any]:
    """All heads in all ways; prints tables. Raises: HeadError."""
    infos = {name: makers.info(folder) for name, folder in heads.items()}
    for name, info in infos.items():
        trained = ", ".join(f"{key} {info.training[key]}" for key in _SAME if info.training.get(key) is not None)
        print(f"{name}: {info.objective}, {info.shape.num_slots} slots, bias rank {info.shape.bias_rank}, {trained}")
    unlike = differences(infos)
    for line in unlike:
        print(f"NOT comparable: {line}")
    found: dict[str, Any] = {"cells": {}, "ratios": {}, "not_comparable": unlike, "different": []}
    for temperature in temperatures:
        cells = compared_at(temperature)
        key = f"{temperature:g}"
        found["cells"][key], found["ratios"][key] = _at(temperature, cells, heads, infos, makers, sizes)
        found["different"] += [f"temperature {key}, {line}" for line in cells.different]
    return found


def _at(
    temperature: float,
    cells: Cells,
    heads: dict[str, Path],
    infos: dict[str, HeadInfo],
    makers: Makers,
    sizes: list[int],
) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
    """The table of one temperature: its cells and its ratios, by size."""
    names = " | ".join(f"{size} nodes" for size in sizes)
    print(f"\n| temperature {temperature:g} | tree | {names} |\n|---|---|{'---|' * len(sizes)}")
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for name, folder in heads.items():
        found[name] = {}
        for way, use in uses(infos[name]):
            row = found[name][way] = {}
            for size in sizes:
                head = makers.head(folder, use)
                row[size] = cells.measure(head, f"{name}, {way}", size)
                if not infos[name].is_independent:  # another head's blank was never trained
                    row[size]["blank_by_slot"] = head.blank_by_slot
            shown = " | ".join(f"{row[size]['acceptance_length']:.2f}" for size in sizes)
            print(f"| {name} | {way} | {shown} |", flush=True)
        if not infos[name].is_independent:
            shares = " ".join(f"{share:.2f}" for share in found[name]["collapsed"][sizes[0]]["blank_by_slot"])
            print(f"| {name} | (blank, by frame: {shares}) |{' |' * len(sizes)}")
    by_size = {}
    for size in sizes:
        lengths = {
            name: {way: row[size]["acceptance_length"] for way, row in ways.items()} for name, ways in found.items()
        }
        by_size[size] = ratios(lengths, infos)
    for label in by_size[sizes[0]]:
        print(f"| {label} | | {' | '.join(f'{by_size[size][label]:.2f}x' for size in sizes)} |")
    print(f"| (published: CTC over independent heads) | | {' | '.join(f'{PAPER_RATIO:.2f}x' for _ in sizes)} |")
    return found, by_size
