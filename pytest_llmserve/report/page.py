"""Builds what the HTML page says and draws from result documents: verdicts, tests, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pytest_llmserve.report.compare import Comparison, common_runs, compare, facts, stem
from pytest_llmserve.report.digest import (
    ORDER,
    Case,
    Json,
    client_rows,
    describe_run,
    headline,
    label_of,
    objectives,
    show_run,
    value_of,
    why,
)
from pytest_llmserve.report.figures import Gallery
from pytest_llmserve.report.series import Budget, history_before, read_record
from pytest_llmserve.report.text import clean
from pytest_llmserve.report.units import show
from pytest_llmserve.report.views import (
    DISTRIBUTIONS,
    SCALARS,
    STATISTICS,
    CaseView,
    Cell,
    GroupView,
    RunView,
    cell_of,
    curve_rows,
    fingerprint_rows,
    server_tables,
    side_by_side_rows,
)
from pytest_llmserve.verdict.baseline_file import LoadBaseline, baseline_path, read


class Page:
    """Builds the template's context while it collects the figures."""

    def __init__(self, baselines: Path | None) -> None:
        self.gallery = Gallery(Budget.of(1))
        self._baselines = baselines
        self._times: dict[int, float] = {}
        self._ends: dict[int, str] = {}

    def context(self, cases: Sequence[Case]) -> dict[str, Any]:
        self.gallery.budget = Budget.of(sum(len(case.runs) for case in cases))
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
            "statistics": STATISTICS,
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
            loads = {show_run(run) for run in runs}
            group.at = loads.pop() if len(loads) == 1 else ""
            group.rows = side_by_side_rows(runs)
            if all(case.is_curve for case in found.variants.cases):
                group.compared = self.gallery.overlay(
                    dict(zip(group.names, (c.runs for c in found.variants.cases), strict=True)),
                    found.variants.cases[0].runs,
                    any(case.emulated for case in found.variants.cases),
                )
        for history in found.histories:
            charts = self.gallery.nights(history, self._ends)
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

    # Cases

    def _case(self, case: Case, anchor: str) -> CaseView:
        curve = self._curve(case)
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
            sides=self.gallery.sides(case) if case.sides else [],
            curve_rows=curve_rows(case) if len(case.runs) > 1 else [],
            fingerprint=fingerprint_rows(facts(case), against),
            client=client_rows(case.calibration),
            ended=self._ends.get(id(case), ""),
            fingerprint_against="the latest stored run of its baseline" if against else "",
        )

    def _curve(self, case: Case) -> list[int]:
        """Latency under load, a line for each side of a comparison."""
        if not case.is_curve:
            return []
        if not case.sides:
            return self.gallery.curve(case)
        sides = {s: [run for run in case.runs if label_of(run) == s] for s in case.sides}
        return self.gallery.overlay(sides, case.runs, case.emulated)

    # Runs

    def _run(self, case: Case, run: Json) -> RunView:

        metrics = run["metrics"]
        view = RunView(
            name=show_run(run),
            verdict=run["verdict"],
            emulated=run["emulated"],
            facts=describe_run(run),
            when="",
            objectives=objectives(run),
            scalars=[
                (metric, Cell(show(metric, value), value))
                for metric in SCALARS
                if (value := value_of(run, metric)) is not None
            ],
            distributions=[
                (name, [cell_of(run, f"{name}.{s}") for s in STATISTICS], metrics[name]["n"])
                for name in DISTRIBUTIONS
                if metrics[name]["n"]
            ],
            errors=[(clean(kind, 80), count) for kind, count in metrics["errors"].items() if count],
            checks=[(clean(c["check"], 80), c["ok"], clean(c["detail"])) for c in run["validity"]],
            server=server_tables(run),
            roofline=[clean(line) for line in (run.get("roofline") or {}).get("lines", ())],
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
            view.timeline, said = self.gallery.timeline(run, record)
            view.shapes, missing = self.gallery.distributions(run, record, stored)
            view.notes += said + missing
        if stored:
            view.history, view.baseline_note = self.gallery.history(run, stored)
        return view

    def _stored(self, case: Case, run: Json) -> LoadBaseline | None:
        """The baseline of a run's load as it was before the run, if a folder of baselines was given
        and has it."""
        if self._baselines is None:
            return None

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
