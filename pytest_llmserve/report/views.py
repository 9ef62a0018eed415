"""What the HTML page says, as plain data: one view a test, a run and a group of tests, and the rows
of their tables. Every figure is taken from the result as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_llmserve.report.compare import METRICS
from pytest_llmserve.report.digest import (
    LATENCIES,
    Case,
    Json,
    Objective,
    amount,
    certified,
    server_figures,
    show_run,
    value_of,
)
from pytest_llmserve.report.text import clean, clean_value
from pytest_llmserve.report.units import show

SCALARS = (
    "output_throughput", "total_throughput", "request_throughput", "concurrency.mean",
    "concurrency.max", "requests", "prompt_tokens", "output_tokens", "tokens_per_event",
    "goodput.rate", "goodput.fraction", "energy_per_token", "roofline",
)  # fmt: skip
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
DISTRIBUTIONS = ("ttft", "tpot", "itl", "e2e", "user_throughput", "send_delay", "client_lag")


@dataclass(frozen=True)
class Cell:
    """A shown figure and the number it stands for. `sure`: the percentile is certified."""

    text: str
    value: float | None
    sure: bool = True
    note: str = ""


@dataclass
class RunView:
    """What the page says of one run. Charts are indices into the page's figures."""

    name: str
    verdict: str | None
    emulated: bool
    facts: list[str]
    when: str
    objectives: list[Objective]
    scalars: list[tuple[str, Cell]]
    distributions: list[tuple[str, list[Cell], int]]
    errors: list[tuple[str, int]]
    checks: list[tuple[str, bool, str]]
    server: list[tuple[str, list[tuple[str, Cell]]]]
    roofline: list[str]
    timeline: list[int] = field(default_factory=list)
    shapes: list[int] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline_note: str = ""


@dataclass
class CaseView:
    """What the page says of one test of one document."""

    anchor: str
    test: str
    name: str
    verdict: str | None
    why: str
    emulated: bool
    command: str
    runs: list[RunView]
    curve: list[int]
    sides: list[int]
    curve_rows: list[tuple[str, list[Cell]]]
    fingerprint: list[tuple[str, str, str, str]]
    fingerprint_against: str
    client: list[tuple[str, float, str]]
    ended: str
    open: bool = True


@dataclass
class GroupView:
    """A test with its cases, and how they compare."""

    title: str
    cases: list[CaseView]
    names: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    at: str = ""
    differences: list[tuple[str, tuple[str, ...], bool]] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    histories: list[tuple[str, list[int]]] = field(default_factory=list)


def cell_of(run: Json, metric: str) -> Cell:
    """A metric's figure; with its confidence interval, where it has one."""
    value = value_of(run, metric)
    name, _, statistic = metric.partition(".")
    group = run["metrics"].get(name)
    note = ""
    if isinstance(group, Mapping) and isinstance(group.get("ci"), Mapping):
        interval = group["ci"].get(statistic)
        if interval:
            low, high = (show(name, end) for end in interval)
            note = f"99 % interval {low} to {high}"
    return Cell(show(metric, value), value, certified(run, metric), note)


def curve_rows(case: Case) -> list[tuple[str, list[Cell]]]:
    """The runs of a case, by the amount of load where that differs, else as they were measured."""
    columns = ["output_throughput", "user_throughput.p50"]
    columns += [f"{name}.{s}" for name in LATENCIES for s in ("p50", "p95", "p99")]
    return [
        (show_run(run), [cell_of(run, metric) for metric in columns])
        for run in sorted(case.runs, key=amount)
    ]


def side_by_side_rows(runs: Sequence[Json]) -> list[tuple[str, list[Cell]]]:
    """Metrics by variant, each with its ratio to the first."""
    rows = []
    for metric in METRICS:
        cells = []
        for run in runs:
            cell = cell_of(run, metric)
            first = value_of(runs[0], metric)
            if cell.value is not None and first and run is not runs[0]:
                cell = Cell(cell.text, cell.value, cell.sure, f"× {cell.value / first:.2f}")
            elif run is runs[0]:
                cell = Cell(cell.text, cell.value, cell.sure)
            cells.append(cell)
        if any(cell.value is not None for cell in cells):
            rows.append((metric, cells))
    return rows


def fingerprint_rows(
    now: Mapping[str, Any], before: Mapping[str, Any] | None
) -> list[tuple[str, str, str, str]]:
    """Field, value, value in the baseline and the class of the change ("" if it is none)."""
    from pytest_llmserve.verdict.fingerprint import differences

    if before is None:
        return [(clean(k, 120), clean_value(k, v), "", "") for k, v in now.items()]
    kinds = {d.field: d.kind for d in differences(before, now)}
    names = sorted({*now, *before}, key=lambda name: (name not in kinds, name))
    return [
        (
            clean(name, 120),
            clean_value(name, now.get(name)),
            clean_value(name, before.get(name)) if name in kinds else "",
            kinds.get(name, ""),
        )
        for name in names
    ]


def server_tables(run: Json) -> list[tuple[str, list[tuple[str, Cell]]]]:
    """What the server and its GPUs said of themselves, as tables with a title."""
    tables: dict[str, list[tuple[str, Cell]]] = {
        "The server's own account": [],
        "The GPUs": [],
        "The server's counters over the load": [],
    }
    own, gpus, counters = tables
    for name, value, text in server_figures(run):
        if name in SCALARS:
            continue  # it is among the figures of the run
        title = own if name.startswith("server.") else gpus if name.startswith("gpu.") else counters
        tables[title].append((name, Cell(text, value)))
    return [(title, rows) for title, rows in tables.items() if rows]
