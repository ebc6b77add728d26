"""What the GPU check's findings come to: the criteria, and a table for people."""

from __future__ import annotations

from typing import Any

Sections = dict[str, dict[str, Any]]
MAIN_SHAPE = "llama-8b"
STEP_OF_FLOOR, TREE_OF_PLAIN, KERNEL_OF_COPY, GAP_MS = 1.65, 1.2, 0.70, 0.5
"""Estimated before the first run on a GPU: what the code should reach there if nothing in it is wrong. Tuned engines
reach 1.4 to 1.5 of the floor."""
LONG_CONTEXT = 32768
_JUDGED_NODES = (1, 8)
"""Nodes at which a kernel is judged by the bytes it reads; of 64 the products weigh as much."""


def judge(sections: Sections) -> dict[str, dict[str, Any]]:
    """Each criterion of the sections that ran: what was found, the limit, whether it is met.

    What could not be measured is not met.
    """
    best = best_mode(sections)
    plain, tree = (cell_of(sections, best, nodes) for nodes in (1, 64))
    kernels, parity = (sections.get(name, {}).get("passed") for name in ("kernels", "parity"))
    long = [
        cell["of_copy"]
        for cell in sections.get("bandwidth", {}).get("cells", [])
        if cell["context"] == LONG_CONTEXT and cell["nodes"] in _JUDGED_NODES and "of_copy" in cell
    ]
    ratio = tree["ms"] / plain["ms"] if "ms" in plain and "ms" in tree else None
    criteria = {
        "kernels": {"kernels are right": {"found": kernels, "limit": True, "ok": kernels is True}},
        "bandwidth": {"kernel of copy bandwidth at 32k": _at_least(min(long, default=None), KERNEL_OF_COPY)},
        "steps": {
            "8B step of its bytes floor": _at_most(plain.get("of_floor"), STEP_OF_FLOOR),
            "64 nodes of 1 node": _at_most(ratio, TREE_OF_PLAIN),
            "host gap in ms": _at_most(plain.get("gap_ms"), GAP_MS),
        },
        "parity": {"answers are right": {"found": parity, "limit": True, "ok": parity is True}},
    }
    return {name: entry for section, found in criteria.items() if section in sections for name, entry in found.items()}


def _at_most(found: float | None, limit: float) -> dict[str, Any]:
    return {"found": _rounded(found), "limit": f"<= {limit}", "ok": found is not None and found <= limit}


def _at_least(found: float | None, limit: float) -> dict[str, Any]:
    return {"found": _rounded(found), "limit": f">= {limit}", "ok": found is not None and found >= limit}


def _rounded(found: float | None) -> float | None:
    return None if found is None else round(found, 3)


def best_mode(sections: Sections) -> str:
    """The mode with the fastest plain step of one row of the large model; nothing if there is none."""
    cells = _measured(sections)
    plain = [cell for cell in cells if (cell["shape"], cell["rows"], cell["nodes"]) == (MAIN_SHAPE, 1, 1)]
    return str(min(plain, key=lambda cell: cell["ms"])["mode"]) if plain else ""


def cell_of(sections: Sections, mode: str, nodes: int) -> dict[str, Any]:
    """The measured step of one row of the large model, or an empty one."""
    for cell in _measured(sections):
        if (cell["shape"], cell["mode"], cell["rows"], cell["nodes"]) == (MAIN_SHAPE, mode, 1, nodes):
            return cell
    return {}


def _measured(sections: Sections) -> list[dict[str, Any]]:
    """The steps that gave a time."""
    return [cell for cell in sections.get("steps", {}).get("cells", []) if "ms" in cell]


def table(report: dict[str, Any]) -> str:
    """The whole report in lines."""
    sections: Sections = report["sections"]
    lines = [
        f"{report['device']}, torch {report['torch']}, transformers {report['transformers']}, {report['wall_s']} s"
    ]
    for name, found in sections.items():
        lines.append(f"\n{name}: {found['wall_s']} s" + (f", {found['error']}" if "error" in found else ""))
        lines += [f"  {key}: {found[key]}" for key in ("passed", "checks", "copy_gb_per_s", "pytest") if key in found]
        lines += [
            f"  {key}: {line}" for key in ("failures", "errors", "warnings", "left_out") for line in found.get(key, [])
        ]
        lines += _cells(found.get("cells", []))
        for shape, speeds in found.get("tokens_per_s", {}).items():
            lines.append(f"  {shape}: " + ", ".join(f"{arm} {speed} tokens/s" for arm, speed in speeds.items()))
        lines += _ties(found.get("runs", []))
    lines.append("\ncriteria")
    for name, entry in report["criteria"].items():
        lines.append(f"  {'met    ' if entry['ok'] else 'NOT MET'} {name}: {entry['found']} ({entry['limit']})")
    return "\n".join(lines)


def _cells(cells: list[dict[str, Any]]) -> list[str]:
    """Cells of one section as columns: all of them have much the same keys."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    rows = [keys, *([str(cell.get(key, "")) for key in keys] for cell in cells)] if cells else []
    widths = [max(len(row[place]) for row in rows) for place in range(len(keys))]
    return ["  " + "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]


def _ties(runs: list[dict[str, Any]]) -> list[str]:
    """How many answers were equal to the end, and where the others parted."""
    parted = [run for run in runs if "gap" in run]
    lines = [f"  {len(runs) - len(parted)} of {len(runs)} answers equal to the end"] if runs else []
    for run in parted:
        kind = f"{run['family']} {run['dtype']} {run['mode']} {'drafts' if run['drafts'] else 'plain'}"
        lines.append(
            f"  {kind}: parted at {run['equal']} of {run['of']}, gap {run['gap']}, {'tie' if run['ok'] else 'ERROR'}"
        )
    return lines
