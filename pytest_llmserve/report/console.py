"""Lines of text for people: as wide as the terminal, in characters it can show, harmless."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_llmserve.report.text import clean, visible

if TYPE_CHECKING:
    import pytest

Row = Sequence[str]

#: What stands for a character that the output's encoding lacks.
_INSTEAD = {
    "≥": ">=", "≤": "<=", "–": "-", "·": "-", "µ": "u", "…": "...", "×": "x", "≠": "!=", "≈": "~",
    "\ufffd": "?",
}  # fmt: skip
#: All that bars and plots are made of.
_DRAWN = "█▏▐▕│└⣿"
#: Of output that no terminal shows, such as the log of a CI job.
_WIDTH = 120
#: Half of a margin bar, in characters: 100 % of the bound.
_HALF = 5
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Console:
    """Writes through pytest's reporter. `width` is in columns; `drawing` tells whether bars and
    plots may use more than ASCII."""

    reporter: pytest.TerminalReporter
    width: int
    drawing: bool
    _table: dict[int, str] = field(repr=False)

    @classmethod
    def of(cls, reporter: pytest.TerminalReporter) -> Console:
        """The console of a pytest run."""
        encoding = getattr(reporter._tw._file, "encoding", None) or "utf-8"
        lacking = {ord(c): text for c, text in _INSTEAD.items() if not _has(encoding, c)}
        return cls(reporter, max(columns(reporter), 30), _has(encoding, _DRAWN), lacking)

    def line(self, text: str = "", **markup: bool) -> None:
        """One line as it is, but for characters that cannot be seen or shown."""
        self.reporter.write_line(self.fitting(visible(text)), **markup)

    def wrapped(self, text: str, indent: int = 0, hang: int = 2, **markup: bool) -> None:
        """Foreign text in as many lines as it takes; commands and paths in it stay whole."""
        for line in textwrap.wrap(
            clean(text, 4000),
            self.width - 1,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hang),
            break_long_words=False,
            break_on_hyphens=False,
        ):
            self.line(line, **markup)

    def facts(self, parts: Sequence[str], indent: int = 0, hang: int = 2, **markup: bool) -> None:
        """Short facts with dots between them; a line breaks between two facts."""
        lines = [" " * indent + parts[0]]
        for part in parts[1:]:
            if len(lines[-1]) + len(part) + 3 < self.width:
                lines[-1] += f" · {part}"
            else:
                lines.append(" " * (indent + hang) + part)
        for line in lines:
            self.line(line, **markup)

    def fitting(self, text: str) -> str:
        """The text in characters that the output has."""
        return text.translate(self._table)

    def rows(self, rows: Sequence[Row]) -> list[list[str]]:
        """Cells in characters that the output has, so that columns line up in any case."""
        return [[self.fitting(visible(cell)) for cell in row] for row in rows]

    def margin_bar(self, share: float | None) -> str:
        """A margin as a bar from the bound in the middle: to the right on the good side, at most
        100 % of the bound each way; blank if it is not known."""
        if share is None:
            return ""
        size = min(abs(share), 1.0) * _HALF
        if not self.drawing:
            marks = "#" * round(size)
            left, right = (marks, "") if share < 0 else ("", marks)
            return f"{left:>{_HALF}}|{right:<{_HALF}}"
        if share < 0:
            whole, rest = divmod(size, 1)
            thin = "▐" if rest >= 0.4 else "▕" if whole == 0 else ""
            return f"{thin + '█' * int(whole):>{_HALF}}│{'':{_HALF}}"
        whole, rest = divmod(round(size * 8), 8)
        thin = _EIGHTHS[rest].strip() or ("▏" if whole == 0 and share > 0 else "")
        return f"{'':{_HALF}}│{'█' * whole + thin:<{_HALF}}"


def align(rows: Sequence[Row], sides: str) -> list[str]:
    """Rows as lines with columns of equal width, each flushed to the side in `sides` (< or >)."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def fold(rows: Sequence[Row], sides: str, width: int, keys: int = 1) -> list[list[str]]:
    """Aligned lines no wider than `width`: one block, or as few as it takes, about equally wide,
    that each begin with the first `keys` columns and have at least one other."""
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(sides))]
    blocks = _blocks(widths, width, keys)
    while width > 0 and len(narrower := _blocks(widths, width - 1, keys)) == len(blocks):
        blocks, width = narrower, width - 1
    return [
        align(
            [[row[i] for i in (*range(keys), *block)] for row in rows],
            "".join(sides[i] for i in (*range(keys), *block)),
        )
        for block in blocks
    ]


def _blocks(widths: Sequence[int], width: int, keys: int) -> list[list[int]]:
    """Which columns fit side by side behind the first ones."""
    head = sum(widths[:keys]) - 2
    blocks: list[list[int]] = [[]]
    for column in range(keys, len(widths)):
        used = head + sum(widths[i] for i in blocks[-1])
        if blocks[-1] and used + widths[column] > width:
            blocks.append([])
        blocks[-1].append(column)
    return blocks


def columns(reporter: pytest.TerminalReporter) -> int:
    """The width of the reporter's output: the terminal's, or what COLUMNS says, or a wide page."""
    if reporter.isatty:
        return shutil.get_terminal_size().columns
    said = os.environ.get("COLUMNS", "")
    return int(said) if said.isdigit() and int(said) else _WIDTH


def _has(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
