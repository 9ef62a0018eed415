"""The charts of a report, from runs to data: each joins what a specification of `charts` needs with
a title and a sentence that says what the chart shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_llmserve.load.record import Record
from pytest_llmserve.report.charts import Figure
from pytest_llmserve.report.compare import common_runs
from pytest_llmserve.report.digest import (
    LATENCIES,
    TITLES,
    WORDS,
    Case,
    Json,
    amount,
    certified,
    label_of,
    show_load,
    split_objective,
    value_of,
)
from pytest_llmserve.report.series import (
    Budget,
    accepted_changes,
    baseline_band,
    baseline_trend,
    distribution,
    lanes,
    latencies,
    over_time,
    readings,
    stretches,
    waterfall,
)
from pytest_llmserve.report.text import clean
from pytest_llmserve.report.units import show, show_time
from pytest_llmserve.verdict.baseline import RECENT
from pytest_llmserve.verdict.baseline_file import LoadBaseline
from pytest_llmserve.verdict.fingerprint import comparable

#: Metrics whose history is drawn.
_HISTORY = ("output_throughput", "ttft.p95", "tpot.p50")

#: So many users have a row each in the chart of single requests.
_LANES = 120
#: Readings of GPUs that are drawn, with the kind of their chart and its title.
_GPU = (
    ("gpu.utilization", "share", "GPU: share of time in which a kernel ran"),
    ("gpu.power", "power", "GPU power"),
    ("gpu.sm_clock", "clock", "GPU clock"),
    ("gpu.temperature", "temperature", "GPU temperature"),
    ("gpu.memory_used", "memory", "GPU memory in use"),
    ("system_memory_used", "memory", "System memory in use"),
)


@dataclass
class Gallery:
    """All figures of a report; each method adds some and gives their places in it.

    `budget` is how much of a run may be drawn.
    """

    budget: Budget
    figures: list[Figure] = field(default_factory=list)

    def overlay(
        self, variants: Mapping[str, Sequence[Json]], judged: Sequence[Json], emulated: bool
    ) -> list[int]:
        """Latency and throughput against load, a line for the runs of each variant by its name;
        the objectives are those of the `judged` runs."""
        added = []
        metrics = [f"{name}.{s}" for name in ("ttft", "tpot") for s in ("p50", "p95")]
        for metric in (*metrics, "e2e.p95", "output_throughput"):
            rows: list[tuple[Any, ...]] = []
            for name, runs in variants.items():
                for run in sorted(runs, key=amount):
                    value = value_of(run, metric)
                    if value is not None:
                        rows.append((amount(run), value, show(metric, value), name, show_load(run)))
            if not rows:
                continue
            points = _columns(("x", "v", "text", "variant", "load"), rows)
            kind = "throughput_compare" if metric.endswith("throughput") else "latency_compare"
            added.append(
                self.add(
                    kind,
                    _title(metric),
                    f"{_title(metric)} against load, one line for each of {', '.join(variants)}.",
                    {"points": points, "slo": _slo(judged, metric, points["v"])},
                    emulated=emulated,
                    x=_load_axis(judged[0]),
                )
            )
        return added

    def nights(self, history: Sequence[Case], ends: Mapping[int, str]) -> list[int]:
        """Metrics of the same measurement over many results; `ends` says when, by `id(case)`."""
        added = []
        runs = common_runs(history)
        for metric in _HISTORY:
            rows = [
                (i, value, WORDS[case.verdict], ends.get(id(case), ""), show(metric, value))
                for i, (case, run) in enumerate(zip(history, runs, strict=True), 1)
                if (value := value_of(run, metric)) is not None
            ]
            if not rows:
                continue
            points = _columns(("i", "v", "kind", "when", "text"), rows)
            added.append(
                self.add(
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

    def sides(self, case: Case) -> list[int]:
        """The runs of a comparison within a test, in the order in which they were measured."""
        added = []
        for metric in _HISTORY:
            rows = [
                (i, value, label_of(run), show_load(run), show(metric, value), label_of(run))
                for i, run in enumerate(case.runs, 1)
                if (value := value_of(run, metric)) is not None
            ]
            if not rows:
                continue
            points = _columns(("i", "v", "kind", "when", "text", "side"), rows)
            said = ", ".join(f"{label} {text}" for _, _, label, _, text, _ in rows)
            added.append(
                self.add(
                    "throughput_trend" if metric.endswith("throughput") else "latency_trend",
                    _title(metric),
                    f"{_title(metric)} of each run, in the order measured: {said}.",
                    {"points": points, "band": {}, "accepted": {}},
                    emulated=case.emulated,
                    x="run, in the order measured",
                )
            )
        return added

    def curve(self, case: Case) -> list[int]:
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
                self.add(
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
            self.add(
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

    def timeline(self, run: Json, record: Record) -> tuple[list[int], list[str]]:
        """What went on, on one time axis: tokens, requests, the server's cache, its GPUs, single
        requests; and notes on what is not drawn."""
        bins, width = over_time(record, self.budget.bins)
        window = run["metrics"]["window"]
        shared: dict[str, Any] = {
            "window": {} if window["start"] is None else {
                "t": [round(window["start"], 3)], "until": [round(window["end"], 3)]
            }
        }  # fmt: skip
        about = {
            "emulated": run["emulated"],
            "params": {"t0": 0.0, "t1": round(bins["until"][-1], 3)},
        }
        mean = value_of(run, "output_throughput")
        said = f"mean in the window {show('output_throughput', mean)}"
        added = [
            self.add(
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
        ]
        series = (run.get("server_metrics") or {}).get("series") or {}
        server = readings(series, ("running", "waiting", "kv_usage"), self.budget.bins)
        named = [("in flight (client)", bins["t"], bins["flight"])]
        for name in ("running", "waiting"):
            if name in server:
                named.append((f"{name} (server)", server["t"], server[name]))
        flight = _columns(
            ("what", "t", "v"),
            [(what, t, v) for what, ts, vs in named for t, v in zip(ts, vs, strict=True)],
        )
        by = "the client and the server" if server else "the client"
        added.append(
            self.add(
                "flight", f"Requests, as counted by {by}",
                f"Requests in flight over the run, as counted by {by}; at most "
                f"{show('concurrency', value_of(run, 'concurrency.max'))} in the window.",
                {**shared, "flight": flight}, **about,
            )
        )  # fmt: skip
        if "kv_usage" in server:
            used = [v for v in series["kv_usage"] if v is not None]
            most = show("kv_usage", max(used, default=None))
            added.append(
                self.add(
                    "share", f"KV cache in use, as the server says; at most {most}",
                    f"Share of the KV cache in use; at most {most}.",
                    {**shared, "readings": {"t": server["t"], "v": server["kv_usage"]}}, **about,
                )
            )  # fmt: skip
        added += self._gpus(run, shared, about)
        users = run["load"].get("users", 0)
        by_user = run["load"]["kind"] == "closed" and users <= _LANES
        requests, note = (lanes if by_user else waterfall)(record, self.budget.requests)
        each = "a row for each user" if by_user else "a row for each request"
        added.append(
            self.add(
                "lanes" if by_user else "waterfall", f"Single requests, {each}",
                "A bar for each request from when it was wanted to its first token and to its end, "
                f"{each}. {note}",
                {"requests": requests}, **about,
            )
        )  # fmt: skip
        notes = [f"Single requests: {note} Warm-up requests are not drawn."]
        if not server:
            notes.append(
                "The result has no readings of the server's own gauges over time; running, waiting "
                "and KV-cache use are left out."
            )
        return added, notes

    def _gpus(self, run: Json, shared: Mapping[str, Any], about: Mapping[str, Any]) -> list[int]:
        """What the GPUs said of themselves, a chart a reading; none where they were not read."""
        series = (run.get("telemetry") or {}).get("series") or {}
        drawn = readings(series, [name for name, _, _ in _GPU], self.budget.bins)
        slowed = stretches(series, "throttled")
        added = []
        for name, kind, title in _GPU:
            if name not in drawn:
                continue
            values = [v for v in series[name] if v is not None]
            low, high = (show(name, end) for end in (min(values), max(values)))
            slow = slowed if name == "gpu.sm_clock" else {}
            title = f"{title}; pink: slowed down by heat or a power brake" if slow else title
            added.append(
                self.add(
                    kind, title, f"{title}: {low} to {high}.",
                    {**shared, "slowed": slow, "readings": {"t": drawn["t"], "v": drawn[name]}},
                    **about,
                )
            )  # fmt: skip
        return added

    def distributions(
        self, run: Json, record: Record, stored: LoadBaseline | None
    ) -> tuple[list[int], list[str]]:
        """TTFT and ITL in the window against the runs of a baseline; and notes."""
        added = []

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
            added.append(
                self.add(
                    "distribution",
                    f"{TITLES[name]}, cumulative{against}",
                    f"Cumulative distribution of {name}: {said}.",
                    {"line": line, "band": band, "marks": _columns(("v", "share", "text"), marks)},
                    emulated=run["emulated"],
                )
            )
        missing = "No baseline runs to draw the distributions against."
        return added, [missing] if added and not peers else []

    def history(self, run: Json, stored: LoadBaseline) -> tuple[list[int], str]:
        """A run beside the stored runs of its baseline; and what there is to know of those."""
        added, note = [], ""

        for metric in _HISTORY:
            now = value_of(run, metric)
            trend = baseline_trend(stored, run["fingerprint"], metric, now)
            if trend is None:
                continue
            note = trend.caption
            for run_number, change in accepted_changes(stored):
                note += (
                    f" Accepted at run {run_number} ({clean(change.time[:10], 20)}): "
                    f"{clean(change.reason)}."
                )
            points = {**trend.points, "text": [show(metric, v) for v in trend.points["v"]]}
            accepted = {**trend.accepted, "reason": [clean(r) for r in trend.accepted["reason"]]}
            added.append(
                self.add(
                    "throughput_trend" if metric.endswith("throughput") else "latency_trend",
                    _title(metric),
                    f"{_title(metric)} of the stored baseline runs and of this one "
                    f"({show(metric, now)}). {trend.caption}",
                    {"points": points, "band": trend.band, "accepted": accepted},
                    emulated=run["emulated"],
                    x="stored run, oldest first",
                )
            )
        return added, note

    def add(
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

        said = f"Emulated. {says}" if emulated else says
        self.figures.append(Figure(kind, title, said, data, emulated, params or {}, x))
        return len(self.figures) - 1


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
    shown = [(x, v, s if s.count(",") < 2 else f"{s[:3]} to {s[-3:]}") for x, v, s in merged]
    return _columns(("x", "v", "s"), shown)


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _title(metric: str) -> str:
    name, _, statistic = metric.partition(".")
    return f"{TITLES.get(name, name)} {statistic}".strip()


def _load_axis(run: Json) -> str:
    return "users" if run["load"]["kind"] == "closed" else "requests per second offered"
