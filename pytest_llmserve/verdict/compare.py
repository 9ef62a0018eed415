"""`llmserve compare A B`: has B become worse than A?

A and B are result files, baseline files, results of `vllm bench serve`, guidellm or AIPerf, or
folders of them, whose files are then runs of one side. Runs of the same test and load are
compared by the rules of `regression`, all of them one family.
"""

from __future__ import annotations

import fnmatch
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report.units import show
from pytest_llmserve.verdict.baseline import TRACKED, Tracked, tracked
from pytest_llmserve.verdict.baseline_file import decode, parse_json, read_text, validate
from pytest_llmserve.verdict.fingerprint import differences
from pytest_llmserve.verdict.foreign import read_foreign
from pytest_llmserve.verdict.regression import (
    BASELINE_RUNS,
    Comparison,
    Finding,
    Samples,
    judge_family,
)
from pytest_llmserve.verdict.slo import number, uncertified

SCHEMA = "llmserve-comparison/1"
MOST_BYTES = 256 << 20


@dataclass
class Group:
    """The runs of one test and load: values by metric, one a run, and their fingerprints."""

    values: dict[str, list[float]] = field(default_factory=dict)
    fingerprints: list[Mapping[str, Any]] = field(default_factory=list)
    runs: int = 0


@dataclass
class Side:
    """All that one of the two sides holds, and what has to be said about it."""

    name: str
    groups: dict[str, Group] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group())

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Row:
    """One metric of one test. `a` and `b` are geometric means over the runs."""

    test: str
    metric: str
    a: float
    b: float
    ratio: float
    interval: tuple[float, float] | None
    finding: Finding
    reason: str
    minimum_detectable_effect: float | None
    a_runs: int
    b_runs: int


@dataclass(frozen=True)
class Compared:
    """The whole comparison; `regressed` decides the exit status."""

    a: str
    b: str
    emulated: bool
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        return any(row.finding == "regression" for row in self.rows)


def compare_files(
    a: Path, b: Path, *, metrics: Sequence[str] = (), across: Sequence[str] = ()
) -> Compared:
    """Compare what two files or folders hold.

    `metrics` are dotted names (none: those that baselines track). `across` are patterns of
    fingerprint fields that are meant to differ ("engine", "args.*"); any other must-match field
    that differs makes its rows inconclusive. Emulated and real never mix. Raises ConfigError for
    a file that cannot be read for what it is, and if nothing is on both sides.
    """
    if any(fnmatch.fnmatch("emulated", pattern) for pattern in across):
        raise ConfigError("--across emulated: emulated and real runs are never compared")
    left, right = load_side(a), load_side(b)
    pairs = _pairs(left, right)
    notes = [*left.notes, *(n for n in right.notes if n not in left.notes)]
    family: dict[tuple[str, str], Samples] = {}
    unlike: dict[str, str] = {}
    for name, one, other in pairs:
        unlike[name] = _unlike(one, other, across)
        for t in _wanted(one, other, metrics):
            old, new = one.values.get(t.metric), other.values.get(t.metric)
            if old and new:
                family[name, t.metric] = Samples(new, old, t.better, t.floor)
    if not family:
        raise ConfigError(f"{a} and {b} have no metric of the same meaning in common: name others")
    rows = [
        _row(test, metric, family[test, metric], comparison, unlike[test])
        for (test, metric), comparison in judge_family(family).items()
    ]
    emulated = any(
        bool(p.get("emulated")) for _, one, two in pairs for g in (one, two) for p in g.fingerprints
    )
    return Compared(str(a), str(b), emulated, tuple(rows), tuple(notes))


def load_side(path: Path) -> Side:
    """All runs in a file, or in the JSON files of a folder (and of those below it)."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.json") if not p.name.startswith("."))
        if not files:
            raise ConfigError(f"folder {path} has no .json file: name a result or baseline file")
    else:
        files = [path]
    side = Side(path.name)
    for file in files:
        _load(file, side)
    return side


def _load(path: Path, side: Side) -> None:
    mend = (
        "give a result file, a baseline file, or a result of vllm bench serve, guidellm or aiperf"
    )
    try:
        text = read_text(path, f"file {path}", MOST_BYTES, mend)
    except FileNotFoundError:
        raise ConfigError(f"file {path} does not exist: {mend}") from None
    content = parse_json(text, f"file {path}", mend)
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, str) and schema.startswith("llmserve-baseline/"):
        _load_baseline(text, path, side)
    elif isinstance(schema, str) and schema.startswith("llmserve-result/"):
        validate(content, "result", f"file {path}", mend)
        _load_result(content, path, side)
    else:
        runs = read_foreign(content)
        if runs is None:
            raise ConfigError(f"file {path} is of no kind that is known: {mend}")
        for run in runs:
            group = side.group(f"{run.tool}: {run.name}")
            group.runs += 1
            group.fingerprints.append({"tool": run.tool})
            for metric, value in run.values.items():
                group.values.setdefault(metric, []).append(value)
            for metric, why in run.unlike.items():
                side.note(f"{metric} is not our {metric.split(':')[1]}: {why}")


def _load_baseline(text: str, path: Path, side: Side) -> None:
    baseline = decode(text, str(path))
    for key, load in baseline.loads.items():
        group = side.group(f"{baseline.test} {key}")
        for run in load.current():
            group.runs += 1
            group.fingerprints.append(run.fingerprint)
            for metric, value in run.metrics.items():
                if value > 0 and metric not in run.uncertified:
                    group.values.setdefault(metric, []).append(value)


def _load_result(content: Mapping[str, Any], path: Path, side: Side) -> None:
    for run in content["runs"]:
        if not all(check["ok"] for check in run["validity"]):
            side.note(f"{path.name}: an invalid run of {run['test']} is left out")
            continue
        fingerprint = run["fingerprint"]
        parts = run["test"], run.get("label"), fingerprint.get("load")
        group = side.group(" ".join(filter(None, parts)))
        group.runs += 1
        group.fingerprints.append(fingerprint)
        for metric in _names(run["metrics"]):
            value = number(run["metrics"], metric)
            if value is not None and value > 0 and not uncertified(run["metrics"], metric):
                group.values.setdefault(metric, []).append(value)


def _names(metrics: Mapping[str, Any]) -> Iterable[str]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from (
                f"{name}.{inner}" for inner in value if inner not in ("n", "ci", "certified")
            )
        else:
            yield name


def _pairs(left: Side, right: Side) -> list[tuple[str, Group, Group]]:
    """Groups of the same name; if each side has just one, those two whatever they are called."""
    common = [name for name in left.groups if name in right.groups]
    if not common and len(left.groups) == len(right.groups) == 1:
        (one, first), (two, second) = *left.groups.items(), *right.groups.items()
        return [(f"{one} → {two}", first, second)]
    for side, other in ((left, right), (right, left)):
        alone = [name for name in side.groups if name not in other.groups]
        if alone and common:
            left.note(f"only in {side.name}: {', '.join(alone)}")
    if not common:
        raise ConfigError(
            f"{left.name} and {right.name} have no test and load in common: "
            "compare files of the same tests, or files of one run each"
        )
    return [(name, left.groups[name], right.groups[name]) for name in common]


def _wanted(one: Group, other: Group, metrics: Sequence[str]) -> list[Tracked]:
    if metrics:
        return [_tracked(metric) for metric in metrics]
    theirs = [m for m in one.values if ":" in m and m in other.values]
    foreign = any("tool" in p for p in (*one.fingerprints, *other.fingerprints))
    shared = ["tpot.mean"] if foreign else []  # what most tools give beside the median
    return [*TRACKED, *map(_tracked, (*shared, *theirs))]


def _tracked(metric: str) -> Tracked:
    """Direction and floor of one of our names, or of another tool's by the name it resembles."""
    tool, _, name = metric.rpartition(":")
    if not tool:
        return tracked(metric)
    if name.endswith("throughput"):
        return Tracked(metric, "higher", 0.03)
    return Tracked(metric, "lower", 0.10 if name.endswith(("p90", "p95", "p99")) else 0.05)


def _unlike(one: Group, other: Group, across: Sequence[str]) -> str:
    """The must-match fields in which any two runs differ, each with both values; "" if none."""
    latest = one.fingerprints[-1]
    found: dict[str, str] = {}
    for fingerprint in (*one.fingerprints[:-1], *other.fingerprints):
        if ("tool" in latest) or ("tool" in fingerprint):
            continue
        for difference in differences(latest, fingerprint):
            meant = any(fnmatch.fnmatch(difference.field, pattern) for pattern in across)
            if difference.kind == "must" and not meant:
                found.setdefault(difference.field, str(difference))
    return "; ".join(found.values())


def _row(test: str, metric: str, samples: Samples, c: Comparison, unlike: str) -> Row:
    finding, reason = c.finding, ""
    if unlike:
        finding = "inconclusive"
        reason = f"they measured something else: {unlike}; --across FIELD compares all the same"
    elif finding == "inconclusive":
        reason = f"A has {c.baseline_runs} of {BASELINE_RUNS} runs"
    elif finding == "suspected":
        reason = f"{c.runs_needed or 'many'} more runs of B would decide"
    return Row(
        test=test,
        metric=metric,
        a=_mean(samples.baseline),
        b=_mean(samples.new),
        ratio=c.ratio,
        interval=c.interval,
        finding=finding,
        reason=reason,
        minimum_detectable_effect=c.minimum_detectable_effect,
        a_runs=c.baseline_runs,
        b_runs=c.new_runs,
    )


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


HEAD = ("test", "metric", "A", "B", "B / A", "interval", "runs", "finding")


def _cells(row: Row) -> tuple[str, ...]:
    name = row.metric.rpartition(":")[2]
    interval = "–" if row.interval is None else f"{row.interval[0]:.3f} … {row.interval[1]:.3f}"
    return (
        row.test,
        row.metric,
        show(name, row.a),
        show(name, row.b),
        f"{row.ratio:.3f}",
        interval,
        f"{row.a_runs}, {row.b_runs}",
        row.finding.replace("_", " "),
    )


def _remarks(compared: Compared) -> list[str]:
    """What belongs below the table: each reason once, then the notes."""
    return list(
        dict.fromkeys([*(row.reason for row in compared.rows if row.reason), *compared.notes])
    )


def as_text(compared: Compared) -> str:
    """Columns of equal width, for a terminal."""
    rows = [HEAD, *(_cells(row) for row in compared.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([f"{_title(compared)}", "", *lines, "", *_remarks(compared)]).rstrip() + "\n"


def as_markdown(compared: Compared) -> str:
    """A table for a pull request."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [line(HEAD), "|" + "---|" * len(HEAD), *(line(_cells(row)) for row in compared.rows)]
    remarks = [f"- {remark}" for remark in _remarks(compared)]
    return "\n".join([f"**{_title(compared)}**", "", *rows, "", *remarks]).rstrip() + "\n"


def as_html(compared: Compared) -> str:
    """One page without scripts, styles from elsewhere or links."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    rows = "\n".join([line(HEAD, "th"), *(line(_cells(row), "td") for row in compared.rows)])
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in _remarks(compared))
    title = html.escape(_title(compared))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{title}</title><style>body{{font-family:system-ui;margin:2em}}"
        "td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ccc}</style>"
        f"<h1>{title}</h1>\n<table>\n{rows}\n</table>\n<ul>{remarks}</ul></html>\n"
    )


def as_json(compared: Compared) -> str:
    """Everything, for programs."""
    content = {"schema": SCHEMA, **asdict(compared), "regressed": compared.regressed}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _title(compared: Compared) -> str:
    counts = {f: sum(r.finding == f for r in compared.rows) for f in ("regression", "inconclusive")}
    said = f"{counts['regression']} regressed, {counts['inconclusive']} inconclusive"
    emulated = "EMULATED: " if compared.emulated else ""
    return f"{emulated}{compared.a} → {compared.b}: {said}, of {len(compared.rows)}"


FORMATS: Mapping[str, Callable[[Compared], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "json": as_json,
    "html": as_html,
}
