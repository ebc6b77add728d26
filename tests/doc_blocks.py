"""The fenced code blocks of the documents, and the marks that say why one of them is not run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "deploy/README.md",
        ROOT / "server/README.md",
    )
    if path.exists()
]
_FENCE = re.compile(r"^(?P<before>[^\n]*)\n```(?P<language>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not run:(.*?)-->")
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. `reason` says why it is not run; None if it is."""

    document: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def id(self) -> str:
        return f"{self.document}:{self.line}"


def blocks() -> list[Block]:
    """Every fenced block of every document."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            mark = _MARK.fullmatch(match["before"].strip())
            line = text.count("\n", 0, match.start("text"))
            reason = None if mark is None else mark[1].strip()
            name = path.relative_to(ROOT).as_posix()
            found.append(Block(name, line, match["language"].strip(), match["text"], reason))
    return found


def commands() -> list[tuple[str, str]]:
    """(document, command) for each line of a shell block and each piece of inline code that is a command of ours."""
    found = []
    for path in DOCUMENTS:
        name = path.relative_to(ROOT).as_posix()
        prose = _FENCE.sub(r"\g<before>\n", path.read_text(encoding="utf-8"))
        found += [(name, code) for code in _CODE.findall(prose)]
    for block in blocks():
        if block.language == "sh":
            found += [(block.document, part) for line in block.text.splitlines() for part in re.split(r"[|&;]+", line)]
    ours = re.compile(r"^(\w+=\S+ )*(foretoken|make|python -m) ")
    return [(name, part.strip()) for name, part in found if ours.match(part.strip())]
