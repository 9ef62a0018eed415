"""The HTML report: one file that opens from disk, holds all it needs and asks nobody for more.

Needs the extra `report` (Altair, vl-convert, Jinja2). The page's own Content-Security-Policy allows
its two scripts by their hashes and no connection at all, so that foreign text can neither run nor
phone even if something here failed to escape it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report.compare import METRICS, Comparison, common_runs, compare, facts, stem
from pytest_llmserve.report.digest import (
    LATENCIES,
    ORDER,
    TITLES,
    WORDS,
    Case,
    Json,
    Objective,
    amount,
    cases_of,
    certified,
    describe_run,
    headline,
    objectives,
    show_load,
    split_objective,
    value_of,
    why,
)
from pytest_llmserve.report.text import clean, clean_value
from pytest_llmserve.report.units import show, show_time

if TYPE_CHECKING:
    from pytest_llmserve.load.record import Record
    from pytest_llmserve.report.charts import Figure
    from pytest_llmserve.verdict.baseline_file import LoadBaseline

#: Metrics whose history is drawn.
_HISTORY = ("output_throughput", "ttft.p95", "tpot.p50")
_SCALARS = (
    "output_throughput", "total_throughput", "request_throughput", "concurrency.mean",
    "concurrency.max", "requests", "prompt_tokens", "output_tokens", "tokens_per_event",
    "goodput.rate", "goodput.fraction", "energy_per_token", "roofline",
)  # fmt: skip
_STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
_DISTRIBUTIONS = ("ttft", "tpot", "itl", "e2e", "user_throughput", "send_delay", "client_lag")


def require() -> None:
    """Raises ConfigError, naming the mend, if the packages of the extra are not installed."""
    if any(find_spec(name) is None for name in ("altair", "vl_convert", "jinja2")):
        raise ConfigError(
            "the HTML report (--llmserve-report) needs packages that are not installed: "
            "pip install pytest-llmserve[report]"
        )


def write_report(
    path: Path,
    documents: Sequence[Json],
    *,
    base: Path | Sequence[Path],
    baselines: Path | None = None,
) -> None:
    """Write the report of one or more result documents, whole or not at all.

    `base` is the folder (or one a document) that the `events` paths of their runs are relative
    to; `baselines` the folder of baselines to draw runs against. Raises ConfigError without the
    extra `report`, and if the file cannot be written.
    """
    require()
    bases = [base] * len(documents) if isinstance(base, Path) else list(base)
    _write(path, render(documents, bases, baselines))


def render(documents: Sequence[Json], bases: Sequence[Path], baselines: Path | None = None) -> str:
    """The report's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from pytest_llmserve.report.charts import specifications

    page = _Page(baselines)
    context = page.context(cases_of(documents, bases))
    data = {
        "specs": _paint(specifications()),
        "figures": [_figure(figure) for figure in page.figures],
        "config": _config(),
    }
    scripts = (_library(), _template("page.js"))
    environment = Environment(
        loader=PackageLoader("pytest_llmserve.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        **context,
        data=_json(data),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        style=_themes() + _template("page.css"),
        figures=page.figures,
        words=WORDS,
    )


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
    server: list[tuple[str, str]]
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
    curve_rows: list[tuple[str, list[Cell]]]
    fingerprint: list[tuple[str, str, str, str]]
    fingerprint_against: str
    client: str
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


class _Page:
    """Builds the template's context while it collects the figures."""

    def __init__(self, baselines: Path | None) -> None:
        self.figures: list[Figure] = []
        self._baselines = baselines
        self._times: dict[int, float] = {}
        self._ends: dict[int, str] = {}

    def context(self, cases: Sequence[Case]) -> dict[str, Any]:
        from pytest_llmserve.report.series import Budget

        self._budget = Budget.of(sum(len(case.runs) for case in cases))
        views: dict[int, CaseView] = {}
        for number, case in enumerate(cases):
            views[id(case)] = self._case(case, f"test-{number + 1}")
        stems: dict[str, list[Case]] = {}
        for case in cases:
            stems.setdefault(stem(case.test), []).append(case)
        groups = [self._group(name, found, views) for name, found in stems.items()]
        listed = sorted(
            (view for group in groups for view in group.cases),
            key=lambda view: ORDER.index(view.verdict),
        )
        emulated = [case.emulated for case in cases]
        return {
            "groups": groups,
            "listed": listed,
            "headline": headline(cases),
            "counts": [
                (verdict, sum(1 for case in cases if case.verdict == verdict))
                for verdict in ORDER
                if any(case.verdict == verdict for case in cases)
            ],
            "emulated_word": ("all" if all(emulated) else "some") if any(emulated) else "",
            "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "files": len({case.number for case in cases}),
            "statistics": _STATISTICS,
        }

    # Groups and comparisons

    def _group(self, title: str, cases: Sequence[Case], views: Mapping[int, CaseView]) -> GroupView:
        group = GroupView(clean(title), [views[id(case)] for case in cases])
        if len(cases) == 1:
            return group
        found = compare(cases, self._times)
        for case in cases:
            self._name(case, views[id(case)], found, several=True)
        if found.variants:
            group.names = list(found.variants.names)
            group.differences = [(d.field, d.values, d.must) for d in found.variants.differences]
            runs = common_runs(found.variants.cases)
            loads = {show_load(run) for run in runs}
            group.at = loads.pop() if len(loads) == 1 else ""
            group.rows = _side_by_side(runs)
            if all(case.is_curve for case in found.variants.cases):
                group.compared = self._overlay(found.variants.cases, found.variants.names)
        for history in found.histories:
            charts = self._nights(history)
            first, last = (self._ends.get(id(c), "") for c in (history[0], history[-1]))
            span = f", {first} to {last}" if first and last else ""
            group.histories.append((f"{len(history)} runs of the same measurement{span}", charts))
        # The latest of each class is open, or all of a few; the others can be opened.
        keep = {id(c) for c in (found.variants.cases if found.variants else cases[-1:])}
        for case in cases:
            views[id(case)].open = id(case) in keep and len(keep) <= 2
        if found.histories:
            group.cases.sort(key=lambda view: view.ended, reverse=True)
        return group

    def _name(self, case: Case, view: CaseView, found: Comparison, *, several: bool) -> None:
        names = dict(zip(map(id, found.variants.cases), found.variants.names, strict=True)) if (
            found.variants
        ) else {}  # fmt: skip
        when = self._ends.get(id(case), "")
        name = names.get(id(case)) or when or f"file {case.number + 1}"
        view.name = name if several else ""

    def _overlay(self, cases: Sequence[Case], names: Sequence[str]) -> list[int]:
        added = []
        metrics = [f"{name}.{s}" for name in ("ttft", "tpot") for s in ("p50", "p95")]
        for metric in (*metrics, "e2e.p95", "output_throughput"):
            rows: list[tuple[Any, ...]] = []
            for case, name in zip(cases, names, strict=True):
                for run in sorted(case.runs, key=amount):
                    value = value_of(run, metric)
                    if value is not None:
                        rows.append((amount(run), value, show(metric, value), name, show_load(run)))
            if not rows:
                continue
            points = _columns(("x", "v", "text", "variant", "load"), rows)
            kind = "throughput_compare" if metric.endswith("throughput") else "latency_compare"
            added.append(
                self._add(
                    kind,
                    _title(metric),
                    f"{_title(metric)} against load, one line for each of {', '.join(names)}.",
                    {"points": points, "slo": _slo(cases[0].runs, metric, points["v"])},
                    emulated=any(case.emulated for case in cases),
                    x=_load_axis(cases[0].runs[0]),
                )
            )
        return added

    def _nights(self, history: Sequence[Case]) -> list[int]:
        added = []
        runs = common_runs(history)
        for metric in _HISTORY:
            rows = [
                (i, value, WORDS[case.verdict], self._ends.get(id(case), ""), show(metric, value))
                for i, (case, run) in enumerate(zip(history, runs, strict=True), 1)
                if (value := value_of(run, metric)) is not None
            ]
            if not rows:
                continue
            points = _columns(("i", "v", "kind", "when", "text"), rows)
            added.append(
                self._add(
                    "throughput_trend" if metric.endswith("throughput") else "latency_trend",
                    f"{_title(metric)}, {show_load(runs[-1])}",
                    f"{_title(metric)} of {len(rows)} runs, oldest first: from "
                    f"{rows[0][4]} to {rows[-1][4]}.",
                    {"points": points, "band": {}, "accepted": {}},
                    emulated=any(case.emulated for case in history),
                    x="run, oldest first",
                )
            )
        return added

    # Cases

    def _case(self, case: Case, anchor: str) -> CaseView:
        curve, rows = (self._curve(case), _curve_rows(case)) if case.is_curve else ([], [])
        runs = [self._run(case, run) for run in case.runs]
        stored = self._stored(case, case.runs[-1])
        against = stored.runs[-1].fingerprint if stored and stored.runs else None
        return CaseView(
            anchor=anchor,
            test=clean(case.test),
            name="",
            verdict=case.verdict,
            why=why(case),
            emulated=case.emulated,
            command=case.command,
            runs=runs,
            curve=curve,
            curve_rows=rows,
            fingerprint=_fingerprint_rows(facts(case), against),
            client=case.client,
            ended=self._ends.get(id(case), ""),
            fingerprint_against="the latest stored run of its baseline" if against else "",
        )

    def _curve(self, case: Case) -> list[int]:
        """The figures of latency under load, throughput last."""
        runs = sorted(case.runs, key=amount)
        axis = _load_axis(runs[0])
        added = []
        for name in LATENCIES:
            rows: list[tuple[Any, ...]] = []
            for statistic in ("p50", "p95", "p99"):
                for run in runs:
                    metric = f"{name}.{statistic}"
                    value = value_of(run, metric)
                    if value is not None:
                        what = f"{name} {statistic}"
                        ok = certified(run, metric)
                        text = show(metric, value) + ("" if ok else ", not certified")
                        rows.append((amount(run), value, statistic, ok, text, what, show_load(run)))
            points = _columns(("x", "v", "s", "ok", "text", "what", "load"), rows)
            added.append(
                self._add(
                    "latency_curve",
                    f"{TITLES[name]} ({name})",
                    f"{TITLES[name]} against {axis}: p95 from "
                    f"{show(name, value_of(runs[0], name + '.p95'))} at {show_load(runs[0])} to "
                    f"{show(name, value_of(runs[-1], name + '.p95'))} at {show_load(runs[-1])}.",
                    {
                        "points": points,
                        "ends": _ends(rows),
                        "slo": _slo(runs, name, points["v"]),
                    },
                    emulated=case.emulated,
                    x=axis,
                )
            )
        metric = "output_throughput"
        rows = [
            (amount(run), value, "one", True, show(metric, value), metric, show_load(run))
            for run in runs
            if (value := value_of(run, metric)) is not None
        ]
        points = _columns(("x", "v", "s", "ok", "text", "what", "load"), rows)
        added.append(
            self._add(
                "throughput_curve",
                "Output throughput, tokens/s",
                f"Output throughput against {axis}: from {show(metric, value_of(runs[0], metric))} "
                f"at {show_load(runs[0])} to {show(metric, value_of(runs[-1], metric))} at "
                f"{show_load(runs[-1])}.",
                {"points": points, "slo": _slo(runs, metric, points["v"])},
                emulated=case.emulated,
                x=axis,
            )
        )
        return added

    # Runs

    def _run(self, case: Case, run: Json) -> RunView:
        from pytest_llmserve.report.series import read_record

        metrics = run["metrics"]
        view = RunView(
            name=show_load(run),
            verdict=run["verdict"],
            emulated=run["emulated"],
            facts=describe_run(run),
            when="",
            objectives=objectives(run),
            scalars=[
                (metric, Cell(show(metric, value), value))
                for metric in _SCALARS
                if (value := value_of(run, metric)) is not None
            ],
            distributions=[
                (name, [_cell(run, f"{name}.{s}") for s in _STATISTICS], metrics[name]["n"])
                for name in _DISTRIBUTIONS
                if metrics[name]["n"]
            ],
            errors=[(clean(kind, 80), count) for kind, count in metrics["errors"].items() if count],
            checks=[(clean(c["check"], 80), c["ok"], clean(c["detail"])) for c in run["validity"]],
            server=_server_rows(run.get("server_metrics") or {}),
        )
        record = read_record(case.base, run["events"])
        stored = self._stored(case, run)
        if record is None:
            view.notes.append(
                "The arrays of this run are not there, so its charts over time, of single requests "
                "and of distributions are left out."
            )
        else:
            ended = record.info.plan_end + record.info.wall_offset
            self._times[id(case)] = ended
            view.when = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M UTC")
            self._ends[id(case)] = view.when[:16]
            self._timeline(view, run, record)
            self._distributions(view, run, record, stored)
        if stored:
            self._history(view, run, stored)
        return view

    def _timeline(self, view: RunView, run: Json, record: Record) -> None:
        from pytest_llmserve.report.series import over_time, server_series, waterfall

        bins, width = over_time(record, self._budget.bins)
        window = run["metrics"]["window"]
        shared: dict[str, Any] = {
            "window": {} if window["start"] is None else {
                "t": [round(window["start"], 3)], "until": [round(window["end"], 3)]
            }
        }  # fmt: skip
        params = {"t0": 0.0, "t1": round(bins["until"][-1], 3)}
        mean = value_of(run, "output_throughput")
        about = {"emulated": run["emulated"], "params": params}
        said = f"mean in the window {show('output_throughput', mean)}"
        view.timeline.append(
            self._add(
                "rate",
                f"Output tokens per second in bins of {show_time(width)}; line: {said}",
                f"Output tokens per second over the run in bins of {show_time(width)}; {said}.",
                {
                    **shared,
                    "bins": {k: bins[k] for k in ("t", "until", "rate")},
                    "mean": {} if mean is None else {"v": [mean]},
                },
                **about,
            )
        )
        series = (run.get("server_metrics") or {}).get("series") or {}
        server = server_series(series, self._budget.bins)
        named = [("in flight (client)", bins["t"], bins["flight"])]
        for name in ("running", "waiting"):
            if name in server:
                named.append((f"{name} (server)", server["t"], server[name]))
        flight = _columns(
            ("what", "t", "v"),
            [(what, t, v) for what, ts, vs in named for t, v in zip(ts, vs, strict=True)],
        )
        by = "the client and the server" if server else "the client"
        view.timeline.append(
            self._add(
                "flight", f"Requests, as counted by {by}",
                f"Requests in flight over the run, as counted by {by}; at most "
                f"{show('concurrency', value_of(run, 'concurrency.max'))} in the window.",
                {**shared, "flight": flight}, **about,
            )
        )  # fmt: skip
        if "kv_usage" in server:
            used = [v for v in server["kv_usage"] if v is not None]
            view.timeline.append(
                self._add(
                    "kv", "KV cache in use, as the server says",
                    f"Share of the KV cache in use; at most {max(used, default=0):.0%}.",
                    {**shared, "kv": {"t": server["t"], "v": server["kv_usage"]}}, **about,
                )
            )  # fmt: skip
        requests, note = waterfall(record, self._budget.requests)
        view.timeline.append(
            self._add(
                "waterfall", "Single requests",
                "A bar for each request from when it was wanted to its first token and to its end. "
                + note,
                {"requests": requests}, **about,
            )
        )  # fmt: skip
        view.notes.append(f"Single requests: {note} Warm-up requests are not drawn.")
        if not server:
            view.notes.append(
                "The result has no readings of the server's own gauges over time; running, waiting "
                "and KV-cache use are left out."
            )

    def _distributions(
        self, view: RunView, run: Json, record: Record, stored: LoadBaseline | None
    ) -> None:
        from pytest_llmserve.report.series import baseline_band, distribution, latencies
        from pytest_llmserve.verdict.baseline import RECENT
        from pytest_llmserve.verdict.fingerprint import comparable

        peers = [
            r
            for r in (stored.current() if stored else ())
            if comparable(r.fingerprint, run["fingerprint"])
        ][-RECENT:]
        for name, samples in latencies(record, run["metrics"]["window"]).items():
            line = distribution(samples)
            if not line:
                continue
            band = baseline_band(peers, name)
            against = f"; grey: where {len(peers)} baseline runs lie" if band else ""
            marks = [
                (value, share, f"{s} {show(name, value)}")
                for s, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
                if (value := value_of(run, f"{name}.{s}"))
            ]
            said = ", ".join(text for _, _, text in marks)
            view.shapes.append(
                self._add(
                    "distribution",
                    f"{TITLES[name]}, cumulative{against}",
                    f"Cumulative distribution of {name}: {said}.",
                    {"line": line, "band": band, "marks": _columns(("v", "share", "text"), marks)},
                    emulated=run["emulated"],
                )
            )
        if view.shapes and not peers:
            view.notes.append("No baseline runs to draw the distributions against.")

    def _history(self, view: RunView, run: Json, stored: LoadBaseline) -> None:
        from pytest_llmserve.report.series import accepted_changes, baseline_trend

        for metric in _HISTORY:
            now = value_of(run, metric)
            trend = baseline_trend(stored, run["fingerprint"], metric, now)
            if trend is None:
                continue
            view.baseline_note = trend.caption
            for run_number, change in accepted_changes(stored):
                view.baseline_note += (
                    f" Accepted at run {run_number} ({clean(change.time[:10], 20)}): "
                    f"{clean(change.reason)}."
                )
            points = {**trend.points, "text": [show(metric, v) for v in trend.points["v"]]}
            accepted = {**trend.accepted, "reason": [clean(r) for r in trend.accepted["reason"]]}
            view.history.append(
                self._add(
                    "throughput_trend" if metric.endswith("throughput") else "latency_trend",
                    _title(metric),
                    f"{_title(metric)} of the stored baseline runs and of this one "
                    f"({show(metric, now)}). {trend.caption}",
                    {"points": points, "band": trend.band, "accepted": accepted},
                    emulated=run["emulated"],
                    x="stored run, oldest first",
                )
            )

    def _stored(self, case: Case, run: Json) -> LoadBaseline | None:
        """The baseline of a run's load as it was before the run, if a folder of baselines was given
        and has it."""
        if self._baselines is None:
            return None
        from pytest_llmserve.report.series import history_before
        from pytest_llmserve.verdict.baseline_file import baseline_path, read

        known = run["fingerprint"]
        names = [known.get(name) for name in ("hardware", "model", "server", "load")]
        if not all(isinstance(name, str) for name in names):
            return None
        hardware, model, server, load = map(str, names)
        found = read(baseline_path(self._baselines, hardware, model, server, run["test"]))
        if found is None or found.emulated != run["emulated"]:
            return None
        stored = found.loads.get(load)
        return history_before(stored, partial(value_of, run)) if stored else None

    def _add(
        self,
        kind: str,
        title: str,
        says: str,
        data: Mapping[str, Any],
        *,
        emulated: bool,
        params: Mapping[str, Any] | None = None,
        x: str = "",
    ) -> int:
        from pytest_llmserve.report.charts import Figure

        said = f"Emulated. {says}" if emulated else says
        self.figures.append(Figure(kind, title, said, data, emulated, params or {}, x))
        return len(self.figures) - 1


def _cell(run: Json, metric: str) -> Cell:
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


def _curve_rows(case: Case) -> list[tuple[str, list[Cell]]]:
    columns = ["output_throughput", "user_throughput.p50"]
    columns += [f"{name}.{s}" for name in LATENCIES for s in ("p50", "p95", "p99")]
    return [
        (show_load(run), [_cell(run, metric) for metric in columns])
        for run in sorted(case.runs, key=amount)
    ]


def _side_by_side(runs: Sequence[Json]) -> list[tuple[str, list[Cell]]]:
    """Metrics by variant, each with its ratio to the first."""
    rows = []
    for metric in METRICS:
        cells = []
        for run in runs:
            cell = _cell(run, metric)
            first = value_of(runs[0], metric)
            if cell.value is not None and first and run is not runs[0]:
                cell = Cell(cell.text, cell.value, cell.sure, f"× {cell.value / first:.2f}")
            elif run is runs[0]:
                cell = Cell(cell.text, cell.value, cell.sure)
            cells.append(cell)
        if any(cell.value is not None for cell in cells):
            rows.append((metric, cells))
    return rows


def _fingerprint_rows(
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


def _server_rows(counters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The server's own counters over the load, but for the series."""
    return [
        (clean(name, 120), f"{value:,.6g}")
        for name, value in counters.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _slo(runs: Sequence[Json], name: str, values: Sequence[float]) -> dict[str, list[Any]]:
    """The regions that the objectives on a metric, or on any statistic of it, allow."""
    bounds: dict[tuple[str, str, float], None] = {}
    for run in runs:
        for verdict in run["verdicts"]:
            metric, relation = split_objective(verdict["objective"])
            if relation and verdict["bound"] is not None and (
                metric == name or ("." not in name and metric.split(".")[0] == name)
            ):  # fmt: skip
                bounds[metric, relation, verdict["bound"]] = None
    top = max([*values, *(bound for _, _, bound in bounds)], default=0.0) * 1.05
    rows = []
    for metric, relation, bound in bounds:
        statistic = metric.partition(".")[2]
        sign = "≤" if relation == "<=" else "≥"
        label = f"{statistic} {sign} {show(metric, bound)}".strip()
        low, high = (0.0, bound) if relation == "<=" else (bound, top)
        rows.append((low, high, bound, label))
    return _columns(("low", "high", "bound", "label"), rows)


def _ends(rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """The last point of each line, for its label; labels that would overlap go to one."""
    last: dict[str, tuple[float, float]] = {}
    for x, value, statistic, *_ in rows:
        last[statistic] = (x, value)
    top = max((row[1] for row in rows), default=0.0)
    merged: list[tuple[float, float, str]] = []
    for statistic, (x, value) in last.items():
        if merged and top and abs(value - merged[-1][1]) / top < 0.07:
            merged[-1] = (x, merged[-1][1], f"{merged[-1][2]}, {statistic}")
        else:
            merged.append((x, value, statistic))
    return _columns(("x", "v", "s"), merged)


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _title(metric: str) -> str:
    name, _, statistic = metric.partition(".")
    return f"{TITLES.get(name, name)} {statistic}".strip()


def _load_axis(run: Json) -> str:
    return "users" if run["load"]["kind"] == "closed" else "requests per second offered"


def _figure(figure: Figure) -> dict[str, Any]:
    plain = asdict(figure)
    return {k: v for k, v in plain.items() if v not in ("", {})}


def _config() -> Any:
    from pytest_llmserve.report.charts import config

    return config("page")


def _paint(tree: Any) -> Any:
    from pytest_llmserve.report.charts import painted

    return painted(tree, "page")


def _themes() -> str:
    """The colours as CSS variables: light, dark where the system or the reader wants it, light on
    paper."""
    from pytest_llmserve.report.charts import THEMES

    light, dark = (
        "".join(f"--{name[1:]}:{colour};" for name, colour in THEMES[theme].items())
        for theme in ("light", "dark")
    )
    return (
        f":root{{{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark)"
        f"{{:root:not([data-theme=light]){{{dark}color-scheme:dark}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}color-scheme:dark}}}}\n"
    )


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return str(script).replace("</script", "<\\/script")


def _template(name: str) -> str:
    return resources.files("pytest_llmserve.report").joinpath("templates", name).read_text("utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(data: Any) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


def _write(path: Path, text: str) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise ConfigError(
            f"report {path} cannot be written ({error.strerror}): name a file in a folder that is "
            "there and writable"
        ) from None
