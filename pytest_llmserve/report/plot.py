"""A small line chart made of text: braille dots, or ASCII where the terminal has no braille."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]

#: Bits of a braille character by row and column of its dots.
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
#: A line's length of dashes and of gaps between them, in dots; the first line is whole.
_DASHES = ((1, 0), (2, 2), (1, 2))


def plot(
    lines: Mapping[str, Points],
    *,
    width: int,
    height: int,
    show: Callable[[float], str],
    drawing: bool = True,
) -> list[str]:
    """Lines over x, each named at its right end, from y = 0 up to the largest value.

    `lines` maps names to points (x, y), y ≥ 0; `height` is that of the plot without its x axis,
    `width` that of all, in characters; `show` writes a value of the y axis.
    """
    points = [point for line in lines.values() for point in line]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points)
    left = max(len(show(top)), len(show(0)))
    names = {name: sorted(line) for name, line in lines.items()}
    ends = _ends(names, top, height)
    columns = max(8, width - left - 3 - max(map(len, ends.values())))
    dots = (2, 4) if drawing else (1, 1)
    wide, tall = columns * dots[0], height * dots[1]

    def at(x: float, y: float) -> tuple[int, int]:
        """The dot of a point, counted from the left and from the top."""
        right = (x - low) / (high - low) if high > low else 0.5
        up = y / top if top else 0.0
        return round(right * (wide - 1)), round((1 - up) * (tall - 1))

    lit: set[tuple[int, int]] = set()
    for number, line in enumerate(names.values()):
        dash, gap = _DASHES[number % len(_DASHES)]
        spots = [at(x, y) for x, y in line]
        lit.update(spots)
        for start, end in pairwise(spots):
            lit.update(d for d in _between(start, end) if d[0] % (dash + gap) < dash)
    wall, corner, rule = "│└─" if drawing else "|+-"
    rows = []
    for row in range(height):
        value = show(top) if row == 0 else ""
        cells = "".join(_cell(lit, column, row, dots) for column in range(columns))
        rows.append(f"{value:>{left}} {wall}{cells} {ends.get(row, '')}".rstrip())
    rows.append(f"{show(0):>{left}} {corner}{rule * columns}")
    places = {x: at(x, 0)[0] // dots[0] for x, _ in points}
    return [*rows, " " * (left + 2) + _ticks(places, columns)]


def _ticks(places: Mapping[float, int], columns: int) -> str:
    """The numbers under an x axis, each at its column; from the right, where they fit: small loads
    crowd at the left, and the largest says most."""
    line = [" "] * (columns + 8)
    until = len(line)
    for x, column in sorted(places.items(), reverse=True):
        text = f"{x:g}"
        left = max(0, column - len(text) // 2)
        if left + len(text) < until:
            line[left : left + len(text)] = text
            until = left
    return "".join(line).rstrip()


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line, without gaps."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            round(start[0] + (end[0] - start[0]) * step / steps),
            round(start[1] + (end[1] - start[1]) * step / steps),
        )
        for step in range(steps + 1)
    ]


def _cell(lit: set[tuple[int, int]], column: int, row: int, dots: tuple[int, int]) -> str:
    """The character of a cell, of the dots that are lit in it."""
    if dots == (1, 1):
        return "*" if (column, row) in lit else " "
    bits = sum(
        _BITS[y][x] for y in range(4) for x in range(2) if (2 * column + x, 4 * row + y) in lit
    )
    return chr(0x2800 + bits) if bits else " "


def _ends(lines: Mapping[str, Points], top: float, height: int) -> dict[int, str]:
    """Where the names of the lines go: row to names, several where lines end close together."""
    found: dict[int, str] = {}
    for name, line in lines.items():
        share = line[-1][1] / top if top else 0.0
        row = round((1 - share) * (height - 1))
        found[row] = f"{found[row]}, {name}" if row in found else name
    return found
