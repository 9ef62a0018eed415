"""The Markdown report: short tables and one picture, for a file or a CI job's summary.

The picture is a Mermaid chart, because job summaries drop images that are not on a server (no
`data:` URI shows) and draw Mermaid themselves. Foreign text is written with character references,
which Markdown never takes for markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report.compare import METRICS, common_runs, compare, stem
from pytest_llmserve.report.digest import (
    LATENCIES,
    ORDER,
    WORDS,
    Case,
    Json,
    amount,
    cases_of,
    certified,
    describe_run,
    headline,
    objectives,
    show_load,
    show_run,
    value_of,
    why,
)
from pytest_llmserve.report.units import in_one_unit, show

#: Most bytes that a job summary may have; GitHub refuses all of a larger one.
LIMIT = 1 << 20
#: Colours that stand out on light and on dark.
_PALETTE = (
    '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#2f86bd, #d97b1f, #c0609a"}}}}%%'
)
_RESERVE = 1024  # bytes kept for the line that says what was left out
_MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "invalid": "⚠️", None: "·"}
_EMULATED = "**EMULATED**: numbers so marked come from the emulated engine, not from real hardware."
_ALL_EMULATED = "**EMULATED**: every number comes from the emulated engine, not from real hardware."
_MARKUP = re.compile(r"[&<>|`*\[\]\\~@#!$\"]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//)")


def write_markdown(path: Path, documents: Sequence[Json], *, limit: int = LIMIT) -> None:
    """Write the report of result documents, at most `limit` bytes. Raises ConfigError if the file
    cannot be written."""
    _open(path, "w", render(documents, limit))


def append_step_summary(path: Path, documents: Sequence[Json]) -> None:
    """Append the report to the file that GITHUB_STEP_SUMMARY names, within what the platform allows
    for what is there already and this. Raises ConfigError if it cannot be written."""
    there = path.stat().st_size if path.exists() else 0
    if LIMIT - there > 2 * _RESERVE:
        _open(path, "a", render(documents, LIMIT - there))


def render(documents: Sequence[Json], limit: int = LIMIT) -> str:
    """The report as Markdown of at most `limit` bytes (UTF-8): verdicts first, then tests, worst
    first, while they fit; the end says how many were left out."""
    cases = cases_of(documents, [Path()] * len(documents))
    cases.sort(key=lambda case: ORDER.index(case.verdict))
    parts = [_head(cases)]
    room = limit - _RESERVE - _size(parts[0])
    names = _names(cases)
    rows = [_verdict_row(case, names.get(id(case), "")) for case in cases]
    shown = _fitting(rows, room)
    if shown:
        parts.append("\n".join(["| | test | why |", "|---|---|---|", *rows[:shown]]))
        room -= _size(parts[-1])
    sections = [*_comparisons(cases), *_sections(cases, names)]
    count = _fitting([text for _, text in sections], room)
    parts += [text for _, text in sections[:count]]
    left = []
    if shown < len(rows):
        left.append(f"{len(rows) - shown} of {len(rows)} verdicts")
    if count < len(sections):
        such = ", ".join(_text(name, 60) for name, _ in sections[count : count + 5])
        left.append(f"{len(sections) - count} of {len(sections)} sections ({such}, …)")
    left.append("single requests, distributions and charts over time (see the HTML report)")
    parts.append(f"<sub>Left out: {'; '.join(left)}.</sub>")
    return "\n\n".join(parts) + "\n"


def _head(cases: Sequence[Case]) -> str:
    lines = [f"## llmserve: {headline(cases)}"]
    if cases and all(case.emulated for case in cases):
        lines.append(f"> {_ALL_EMULATED}")
    elif any(case.emulated for case in cases):
        lines.append(f"> {_EMULATED}")
    return "\n\n".join(lines)


def _names(cases: Sequence[Case]) -> dict[int, str]:
    """What tells a case from others of the same test, by `id`."""
    found: dict[int, str] = {}
    for several in _stems(cases).values():
        variants = compare(several, {}).variants if len(several) > 1 else None
        if len(several) > 1:
            found |= {id(case): f"file {case.number + 1}" for case in several}
        if variants:
            found |= dict(zip(map(id, variants.cases), variants.names, strict=True))
    return found


def _stems(cases: Sequence[Case]) -> dict[str, list[Case]]:
    stems: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.number):
        stems.setdefault(stem(case.test), []).append(case)
    return stems


def _verdict_row(case: Case, name: str) -> str:
    test = _text(case.test, 200) + (f" · {_text(name, 60)}" if name else "") + _mark(case)
    return f"| {_MARKS[case.verdict]} {WORDS[case.verdict]} | {test} | {_text(why(case), 300)} |"


def _sections(cases: Sequence[Case], names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Name and text of each test's section; the first curve has the picture."""
    found = []
    drawn = False
    for case in cases:
        picture = case.is_curve and not case.sides and not drawn
        drawn = drawn or picture
        found.append((case.test, _section(case, names.get(id(case), ""), picture)))
    return found


def _section(case: Case, name: str, picture: bool) -> str:
    of = f" · {_text(name, 60)}" if name else ""
    parts = [f"### {_text(case.test, 200)}{of}{_mark(case)}"]
    if len(case.runs) == 1:
        run = case.runs[0]
        facts = " · ".join(_text(fact, 120) for fact in describe_run(run))
        parts.append(f"{show_load(run)}: {facts}")
        cells = [("output throughput", _cell(run, "output_throughput"))]
        cells += [
            (f"{name} {s}", _cell(run, f"{name}.{s}")) for name in LATENCIES for s in ("p50", "p95")
        ]
        names, values = zip(*cells, strict=True)
        parts.append(_table(names, [values], "-" * len(cells)))
    judged = [(run, o) for run in case.runs for o in objectives(run)]
    if judged:
        rows = [
            (_text(show_run(run), 60), _text(o.name, 120), o.measured, o.bound, o.margin,
             f"{_MARKS[o.verdict]} {WORDS[o.verdict]}")
            for run, o in judged
        ]  # fmt: skip
        head = ("load", "objective", "measured", "bound", "margin", "")
        parts.append(_table(head, rows, "--rrr-"))
    if len(case.runs) > 1:
        runs = sorted(case.runs, key=amount)
        metrics = ["output_throughput"]
        metrics += [f"{name}.{s}" for name in LATENCIES for s in ("p50", "p95", "p99")]
        curve = [
            (_text(show_run(run), 60), *(_cell(run, metric) for metric in metrics)) for run in runs
        ]
        columns = ("load", *(metric.replace(".", " ").replace("_", " ") for metric in metrics))
        parts.append(_table(columns, curve, "-" + "r" * len(metrics)))
        if any("~" in cell for row in curve for cell in row):
            parts.append("~ too few requests to certify this percentile")
        if picture:
            parts += _picture(case, runs)
    return "\n\n".join(part for part in parts if part)


def _picture(case: Case, runs: Sequence[Json]) -> list[str]:
    """Latency under load as a Mermaid chart; nothing if a value is missing."""
    lines = [[value_of(run, f"ttft.{s}") for run in runs] for s in ("p50", "p95", "p99")]
    values = [value for line in lines for value in line if value is not None]
    if len(values) != 3 * len(runs):
        return []
    unit, shown = in_one_unit(values)
    loads = ", ".join(f'"{amount(run):g}"' for run in runs)
    axis = "users" if runs[0]["load"]["kind"] == "closed" else "requests per second"
    emulated = "EMULATED " if case.emulated else ""
    chart = [
        "```mermaid",
        _PALETTE,
        "xychart-beta",
        f'    title "{emulated}Time to first token under load: p50, p95, p99"',
        f'    x-axis "{axis}" [{loads}]',
        f'    y-axis "{unit}" 0 --> {float(f"{max(shown) * 1.1:.3g}"):g}',
        *(
            f"    line [{', '.join(f'{v:g}' for v in shown[i : i + len(runs)])}]"
            for i in range(0, len(shown), len(runs))
        ),
        "```",
    ]
    said = f"From the lowest line to the highest: p50, p95, p99; steps of {axis} are not to scale."
    return ["\n".join(chart), f"<sub>{said}</sub>"]


def _comparisons(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """A table for each test that has variants to stand side by side."""
    found = []
    for name, several in _stems(cases).items():
        variants = compare(several, {}).variants if len(several) > 1 else None
        if variants is None:
            continue
        runs = common_runs(variants.cases)
        rows = [
            (metric, *(_cell(run, metric) for run in runs))
            for metric in METRICS
            if any(value_of(run, metric) is not None for run in runs)
        ]
        names = [
            _text(n, 60) + _mark(c) for n, c in zip(variants.names, variants.cases, strict=True)
        ]
        title = f"### {_text(name, 200)}, side by side"
        table = _table(("metric", *names), rows, "-" + "r" * len(names))
        differing = "; ".join(
            f"{_text(d.field, 60)}: {' / '.join(_text(v, 60) for v in d.values)}"
            for d in variants.differences[:20]
        )
        found.append((name, "\n\n".join([title, table, f"<sub>What differs: {differing}</sub>"])))
    return found


def _cell(run: Json, metric: str) -> str:
    return show(metric, value_of(run, metric)) + ("" if certified(run, metric) else " ~")


def _mark(case: Case) -> str:
    return " (*emulated*)" if case.emulated else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """A table; `sides` has `r` for each column that is flushed right."""
    rule = ["---:" if side == "r" else "---" for side in sides]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _text(text: str, longest: int) -> str:
    """Foreign text that cannot become markup, a link or a mention."""
    from pytest_llmserve.report.text import clean

    return _MARKUP.sub(lambda match: f"&#{ord(match.group())};", clean(text, longest))


def _fitting(texts: Sequence[str], room: int) -> int:
    """How many texts from the first on fit."""
    for count, text in enumerate(texts):
        room -= _size(text)
        if room < 0:
            return count
    return len(texts)


def _size(text: str) -> int:
    return len(text.encode()) + 2


def _open(path: Path, mode: str, text: str) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(
            f"Markdown report {path} cannot be written ({error.strerror}): name a file in a folder "
            "that is there and writable"
        ) from None
