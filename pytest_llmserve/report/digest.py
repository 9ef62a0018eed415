"""Result files as reports see them: one case a test and document, with its verdict in a sentence.

Plain reading of the documents; no figure is computed here but by `show`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llmserve.report.text import clean
from pytest_llmserve.report.units import margin, show, show_margin, show_time

Json = Mapping[str, Any]

#: Worst first: the order in which cases are listed.
ORDER = ("invalid", "fail", "inconclusive", "pass", None)
#: Words for the outcomes.
WORDS: Mapping[str | None, str] = {
    "pass": "passed",
    "fail": "failed",
    "inconclusive": "inconclusive",
    "invalid": "invalid",
    None: "not judged",
}
LATENCIES = ("ttft", "tpot", "e2e")
TITLES: Mapping[str, str] = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End-to-end time",
    "output_throughput": "Output throughput",
    "user_throughput": "Throughput of one user",
    "total_throughput": "Total throughput",
    "request_throughput": "Request throughput",
    "send_delay": "Send delay",
    "client_lag": "Client lag",
    "concurrency": "Requests in flight",
}


@dataclass(frozen=True)
class Case:
    """One test of one document: its runs in order. `base` is the folder that `events` paths of its
    runs are relative to, `number` the document's place among those given, `calibration` what the
    document says of the client's own error."""

    test: str
    number: int
    runs: tuple[Json, ...]
    base: Path
    command: str
    calibration: Json | None

    @property
    def verdict(self) -> str | None:
        """The worst verdict of the runs; None if nothing was asked."""
        verdicts: list[str | None] = [run["verdict"] for run in self.runs]
        return min(verdicts, key=ORDER.index)

    @property
    def emulated(self) -> bool:
        return any(run["emulated"] for run in self.runs)

    @property
    def sides(self) -> list[str]:
        """The labels of the runs of a comparison within the test, such as A and B; else none."""
        return sorted({label_of(run) for run in self.runs} - {""})

    @property
    def is_curve(self) -> bool:
        """Whether the runs are one kind of load in at least two amounts."""
        loads = {amount(run) for run in self.runs}
        return len(loads) > 1 and len({run["load"]["kind"] for run in self.runs}) == 1


def cases_of(documents: Sequence[Json], bases: Sequence[Path]) -> list[Case]:
    """The cases of all documents, in their order."""
    found = []
    for number, (document, base) in enumerate(zip(documents, bases, strict=True)):
        tests: dict[str, list[Json]] = {}
        for run in document["runs"]:
            tests.setdefault(run["test"], []).append(run)
        for test, runs in tests.items():
            said = document.get("command")
            command = clean(said, 2000) if said else command_of(test, runs)
            calibration = document.get("calibration")
            found.append(Case(test, number, tuple(runs), base, command, calibration))
    return found


def client_rows(calibration: Json | None) -> list[tuple[str, float, str]]:
    """The client's own error on the machine that measured, as name, value and text; [] if it is
    not known."""
    found: list[tuple[str, float, str]] = []
    known = calibration or {}
    for name in ("ttft", "itl", "pacing"):
        for statistic, value in (known.get(f"{name}_error") or {}).items():
            if statistic in ("p50", "p99") and isinstance(value, (int, float)):
                found.append((f"{name}_error.{statistic}", value, show_time(value)))
    cpu, limit = known.get("cpu_per_event"), known.get("events_limit")
    if isinstance(cpu, (int, float)):
        found.append(("cpu_per_event", cpu, show_time(cpu)))
    if isinstance(limit, (int, float)):
        found.append(("events_limit", limit, f"{limit:,.0f} events/s"))
    return found


def amount(run: Json) -> float:
    """Users of a closed loop, requests per second of an open one."""
    load = run["load"]
    return float(load["users"] if load["kind"] == "closed" else load["rate"])


def label_of(run: Json) -> str:
    """The side of a comparison that a run is of, "A" or "B"; "" elsewhere."""
    return clean(run.get("label") or "", 40)


def show_run(run: Json) -> str:
    """A run in a few words: its side in a comparison, if it has one, and its load."""
    return f"{label_of(run)}: {show_load(run)}" if label_of(run) else show_load(run)


def show_load(run: Json) -> str:
    """A load in two words: "30 users", "5 requests/s"."""
    if run["load"]["kind"] == "closed":
        users = run["load"]["users"]
        return f"{users} user" if users == 1 else f"{users} users"
    return f"{run['load']['rate']:g} requests/s"


def describe_run(run: Json) -> list[str]:
    """Facts of a run in a few words each: work, window, requests, server, client's delay."""
    work, metrics = run["load"]["workload"], run["metrics"]
    facts = []
    if "prompt_tokens" in work and "output_tokens" in work:
        facts.append(
            f"{clean(work['prompt_tokens'])} tokens in, {clean(work['output_tokens'])} out"
        )
    facts += [
        f"window {_time(metrics['window']['duration'])}",
        f"{metrics['requests']:,} requests",
        f"server {clean(run['server'], 80)}",
        f"engine {clean(run['engine'], 80)} {clean(run.get('engine_version') or '', 40)}".rstrip(),
        f"model {clean(run['model'], 120)}",
        f"seed {clean(run['load']['seed'])}",
    ]
    for name in ("send_delay", "client_lag"):
        value = metrics[name]["p99"]
        if value is not None:
            facts.append(f"{TITLES[name].lower()} p99 {show(name, value)}")
    return facts


def headline(cases: Sequence[Case]) -> str:
    """The verdict of all tests in one sentence."""
    if not cases:
        return "Nothing was measured."
    tests = len({case.test for case in cases})
    what = f"{tests} tests" if tests > 1 else "the test"
    if len(cases) > tests:
        what = f"{len(cases)} results of {what}"
    counts = [(v, sum(1 for case in cases if case.verdict == v)) for v in ORDER]
    counts = [(verdict, count) for verdict, count in counts if count]
    if len(counts) == 1:
        be = "is" if len(cases) == 1 else "are"
        said = WORDS[counts[0][0]]
        said = said if said in ("passed", "failed") else f"{be} {said}"
        return f"The test {said}." if len(cases) == 1 else f"All {what} {said}."
    return f"Of {what}: " + ", ".join(f"{count} {WORDS[v]}" for v, count in counts) + "."


def why(case: Case) -> str:
    """The case's verdict explained in one sentence."""
    for run in case.runs:
        for check in run["validity"]:
            if not check["ok"]:
                return clean(f"{_of(case, run)}{check['check']}: {check['detail']}")
    for outcome in ("invalid", "fail", "inconclusive"):
        for run in case.runs:
            for verdict in run["verdicts"]:
                if verdict["verdict"] == outcome:
                    return clean(f"{_of(case, run)}{verdict['objective']}: {verdict['reason']}")
    judged = sum(len(run["verdicts"]) for run in case.runs)
    if not judged:
        return "measured; nothing was asked of it"
    return "its one objective was met" if judged == 1 else f"all {judged} objectives were met"


def _of(case: Case, run: Json) -> str:
    return f"{show_run(run)}: " if len(case.runs) > 1 else ""


@dataclass(frozen=True)
class Objective:
    """One verdict ready to show. The margin is positive on the good side of the bound, as text and
    as a share of it (None if not known); `share` is measured / bound, limited to 0 … 2, for a bar;
    the reason of a bound that was met is empty, for the figures say it all."""

    name: str
    measured: str
    bound: str
    margin: str
    margin_share: float | None
    verdict: str
    reason: str
    value: float | None
    limit: float | None
    share: float | None


def objectives(run: Json) -> list[Objective]:
    """The verdicts of a run, with margins."""
    found = []
    for verdict in run["verdicts"]:
        metric, relation = split_objective(verdict["objective"])
        value, bound = verdict["measured"], verdict["bound"]
        told = relation and verdict["verdict"] == "pass"
        # A comparison's bound is the worst value that its rule would have let pass.
        side = relation or (_good_side(metric) if bound is not None else "")
        sign = {">=": "≥ ", "<=": "≤ "}.get(side, "")
        found.append(
            Objective(
                name=clean(metric if relation else verdict["objective"], 120),
                measured=show(metric, value),
                bound=sign + show(metric, bound),
                margin=show_margin(side, value, bound) if side else "–",
                margin_share=margin(side, value, bound) if side else None,
                verdict=verdict["verdict"],
                reason="" if told else clean(verdict["reason"]),
                value=value,
                limit=bound,
                share=max(0.0, min(2.0, value / bound)) if side and value is not None and bound
                else None,
            )
        )  # fmt: skip
    return found


def split_objective(objective: str) -> tuple[str, str]:
    """The metric and the relation ("" if it has none) of an objective's text. The metric of a
    ratio is "B/A …", which has no unit."""
    words = objective.split(" ")
    relation = words[-2] if len(words) >= 3 and words[-2] in (">=", "<=") else ""
    words = words[:-2] if relation else words
    return " ".join(words) if words[0] == "B/A" else words[-1], relation


def _good_side(metric: str) -> str:
    from pytest_llmserve.errors import ConfigError
    from pytest_llmserve.verdict.baseline import tracked

    try:
        better = tracked(metric.removeprefix("B/A ")).better
    except ConfigError:  # the name is not one of ours
        return ""
    return ">=" if better == "higher" else "<="


def value_of(run: Json, metric: str) -> float | None:
    """A metric by its dotted name; None if it could not be measured or is not there."""
    found: Any = run["metrics"]
    for part in metric.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    return float(found)


def server_figures(run: Json) -> list[tuple[str, float, str]]:
    """What the server and its GPUs said of themselves, as name, value and text: the groups `server`
    and `gpu` of the metrics, energy and roofline where they were measured, then the server's
    counters over the load."""
    found: list[tuple[str, float, str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for inner, more in value.items():
                add(f"{name}.{inner}", more)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((clean(name, 120), value, show(name, value)))

    for group in ("server", "gpu", "energy_per_token", "roofline"):
        add(group, run["metrics"].get(group))
    for name, value in (run.get("server_metrics") or {}).items():
        if name != "series":
            add(name, value)
    return found


def certified(run: Json, metric: str) -> bool:
    """Whether a percentile has enough samples for a verdict (p50 always does)."""
    name, _, statistic = metric.partition(".")
    if statistic not in ("p90", "p95", "p99"):
        return True
    return statistic in run["metrics"][name].get("certified", ())


def command_of(test: str, runs: Sequence[Json]) -> str:
    """What to type to measure the test again, as far as its result says."""
    run = runs[0]
    parts = ["pytest", shlex.quote(clean(test, 1000))]
    if run["engine"] == "attach":
        parts.append("--llmserve-endpoint URL")
    else:
        parts.append(f"--llmserve-engine {shlex.quote(clean(run['engine'], 80))}")
    return " ".join(parts)


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else show_time(seconds)
