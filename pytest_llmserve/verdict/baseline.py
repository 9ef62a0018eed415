"""Compare runs with the stored runs of their test, and store them if that is asked for.

What is compared with what: a run of a test with the runs of the same test, hardware, model,
server and load whose fingerprints agree in every must-match field, the latest `RECENT` since the
last accepted change; and, so that a slow decline cannot pass step by step, with the pinned first
runs (`origin`) once the latest are others than those. Runs that are compared together (the points
of a latency-under-load curve) are one family of tests, each by the stored runs of its own load.
"""

from __future__ import annotations

import math
import secrets
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.run import Outcome, Run, Verdict
from pytest_llmserve.verdict.baseline_file import (
    Accepted,
    Baseline,
    LoadBaseline,
    StoredRun,
    baseline_path,
    read,
    update,
)
from pytest_llmserve.verdict.fingerprint import comparable, differences, load_facts, model_name
from pytest_llmserve.verdict.regression import (
    BASELINE_RUNS,
    Better,
    Comparison,
    Samples,
    judge_family,
)
from pytest_llmserve.verdict.sequential import MOST, decide
from pytest_llmserve.verdict.slo import (
    check_metric,
    invalid_reason,
    number,
    uncertified,
    worst,
)

#: The latest runs of a baseline that a new run is compared with.
RECENT = 20

Mode = Literal["none", "new", "all"]
#: New runs: one (and a second if the first breaches), a number, or as many as the verdict needs.
Repeats = int | Literal["auto"]
Status = Literal["compared", "new", "missing", "mismatched", "invalid"]
#: Number of the run, "baseline" or "drift", metric.
_Key = tuple[int, str, str]


@dataclass(frozen=True)
class Tracked:
    """A metric to compare: which direction is good, and the relative change that matters."""

    metric: str
    better: Better
    floor: float


#: Compared unless a test names others.
TRACKED = (
    Tracked("output_throughput", "higher", 0.03),
    Tracked("ttft.p95", "lower", 0.10),
    Tracked("tpot.p50", "lower", 0.05),
)


@dataclass(frozen=True)
class Stored:
    """What became of a run: `kept` (not stored), `new` (first of its load), `added`, `accepted`.

    `message` says it in a sentence, and what to do next if something is.
    """

    action: Literal["kept", "new", "added", "accepted"]
    path: Path
    message: str


@dataclass(frozen=True)
class Compared:
    """One run compared with its baseline file, at `path`.

    `found` are the verdicts as they came out, which `store` goes by; in `verdicts` those that a
    reason accepts pass. `runs` is how many runs were measured for it, and `saved` how many of the
    most that `repeats="auto"` may make were not needed. `status` sums it up for counting:
    `compared`, `missing` (no or too few stored runs), `mismatched` (the stored runs measured
    something else), `invalid` (the run is no measurement); `new` is for `after` alone.
    """

    path: Path
    found: tuple[Verdict, ...]
    verdicts: tuple[Verdict, ...]
    status: Status
    runs: int = 1
    saved: int = 0

    def after(self, stored: Stored) -> Status:
        """The status once it is known what became of the run: `new` if there was nothing or not
        enough to compare with and there is more now."""
        fresh = self.status in ("missing", "mismatched") and stored.action in ("new", "added")
        return "new" if fresh else self.status

    def merged(self, later: Compared) -> Compared:
        """This and a later comparison of the same run, in other metrics."""
        return replace(
            later,
            found=(*self.found, *later.found),
            verdicts=(*self.verdicts, *later.verdicts),
            runs=self.runs + later.runs - 1,
            saved=self.saved + later.saved,
        )


@dataclass
class _Point:
    """A run, its repeats, and what it is compared with. `why_not` says why with nothing."""

    runs: list[Run]
    path: Path
    status: Status
    add: str
    why_not: str = ""
    peers: Sequence[StoredRun] = ()
    origin: Sequence[StoredRun] = ()
    spoilt: str = ""
    planned: int = 0


#: What a server says of its state rather than of its speed.
_STATES = ("running", "waiting", "kv_usage", "preemptions", "prefix_hit_rate")
_MORE_IS_BETTER = (
    "goodput", "roofline", "tokens_per_event", "acceptance_rate", "accepted_length",
)  # fmt: skip


def tracked(metric: str | Tracked) -> Tracked:
    """A metric with the direction and floor that suit it: rates 3 % down, tails (p90 and beyond)
    10 % and other times 5 % up. Raises ConfigError for what is no performance metric."""
    if isinstance(metric, Tracked):
        return metric
    for known in TRACKED:
        if known.metric == metric:
            return known
    check_metric(metric, f"compared metric {metric!r}")
    group, _, statistic = metric.removeprefix("server.").partition(".")
    if group in ("send_delay", "client_lag", "requests", "errors", "concurrency", "gpu", *_STATES):
        raise ConfigError(
            f"compared metric {metric!r} says how the load went, not how fast the server is: "
            "name a throughput or a latency"
        )
    tail = statistic in ("p90", "p95", "p99", "max")
    if group.endswith("throughput") or group in _MORE_IS_BETTER:
        return Tracked(metric, "higher", 0.10 if statistic in ("min", "max") else 0.03)
    return Tracked(metric, "lower", 0.10 if tail else 0.05)


def path_of(run: Run, root: Path) -> Path:
    """The file in which the run's baseline lies or would lie."""
    model, server = model_name(run.server), run.server.config.name
    return baseline_path(root, _hardware(run), model, server, run.test)


def compare(
    runs: Sequence[Run],
    root: Path,
    *,
    metrics: Sequence[str | Tracked] | None = None,
    rerun: Callable[[Run], Run] | None = None,
    repeats: Repeats = 1,
    mode: Mode = "none",
    reason: str | None = None,
    options: Sequence[str] = (),
) -> tuple[Compared, ...]:
    """Judge runs by their baselines below `root`: of each, one verdict a metric, and one for each
    drift. All metrics of all runs are one family, whose error is that of one test.

    `rerun` measures the load of a run once more. With `repeats=1` it is called at most once a run,
    if that seems to have become worse (without it such a run stays inconclusive); with a number,
    until there are so many runs of each; with "auto", until the verdict is decided
    (`sequential`). A regression passes where `mode` and `reason` accept it. `options` belong to
    the commands that reasons propose.

    Raises ConfigError for a baseline file that is not valid and for a metric that cannot be
    compared.
    """
    wanted = [tracked(metric) for metric in (TRACKED if metrics is None else metrics)]
    points = [_point(run, root, options) for run in runs]
    judged = _measure(points, wanted, rerun, repeats)
    compared = []
    for number_, point in enumerate(points):
        own = {(kind, metric): c for (n, kind, metric), c in judged.items() if n == number_}
        found = tuple(v for t in wanted for v in _verdicts(point, t, own))
        compared.append(
            Compared(
                path=point.path,
                found=found,
                verdicts=_accepted(point.runs[0], found, mode, reason, options),
                status=point.status,
                runs=len(point.runs),
                saved=max(0, point.planned - len(point.runs)),
            )
        )
    return tuple(compared)


def _accepts(mode: Mode, reason: str | None) -> bool:
    return mode == "all" and bool((reason or "").strip())


def _accepted(
    run: Run, found: tuple[Verdict, ...], mode: Mode, reason: str | None, options: Sequence[str]
) -> tuple[Verdict, ...]:
    """Regressions that are accepted pass and say why; of others the first says how it could be."""
    if _accepts(mode, reason):
        return tuple(
            replace(v, verdict="pass", reason=f"accepted ({reason}): {v.reason}")
            if v.verdict == "fail"
            else v
            for v in found
        )
    if mode == "none" or worst(found) != "fail":
        return found
    first = next(v for v in found if v.verdict == "fail")
    how = f"{first.reason}; to accept it: {_accept(run, options)}"
    return tuple(replace(v, reason=how) if v is first else v for v in found)


def _accept(run: Run, options: Sequence[str]) -> str:
    return command([run.test], "all", (*options, "--llmserve-reason", "why it is worse"))


def store(
    run: Run,
    root: Path,
    verdicts: Iterable[Verdict],
    *,
    mode: Mode = "none",
    reason: str | None = None,
    options: Sequence[str] = (),
) -> Stored:
    """Append a run to its baseline, as `mode` asks.

    `none` stores nothing; `new` stores until the load has five comparable runs; `all` stores
    every run. `verdicts` are all verdicts on the run: an invalid or failed run is not stored,
    but a regression from the baseline is accepted by `all` with a `reason`, which is stored, and
    later runs are compared with what came from then on. Raises ConfigError if the file is not
    valid or cannot be written; it is then left as it is.
    """
    path = path_of(run, root)

    def kept(why: str) -> Stored:
        return Stored("kept", path, f"not stored: {why}")

    verdicts = tuple(verdicts)
    worse = [v for v in verdicts if v.verdict == "fail" and _is_baseline(v)]
    if mode == "none":
        return kept("--llmserve-update-baselines is none")
    if not run.valid:
        return kept(f"the run is invalid ({invalid_reason(run)})")
    if any(v.verdict in ("fail", "invalid") and v not in worse for v in verdicts):
        return kept("the run failed an objective or a check")
    if worse and not _accepts(mode, reason):
        return kept(f"the run is worse than its baseline; to accept it: {_accept(run, options)}")
    entry = entry_of(run)
    action: Literal["kept", "new", "added", "accepted"] = "kept"
    count = 0

    def change(found: Baseline | None) -> Baseline:
        nonlocal action, count
        baseline = found or Baseline(
            run.test,
            _hardware(run),
            model_name(run.server),
            run.server.config.name,
            run.server.emulated,
        )
        if baseline.emulated != run.server.emulated:
            raise ConfigError(
                f"baseline file {path} is of {_kind(baseline.emulated)} hardware and the run of "
                f"{_kind(run.server.emulated)}: give another --llmserve-baselines folder"
            )
        key = str(run.fingerprint["load"])
        before = baseline.loads.get(key, LoadBaseline(load_facts(run.plan)))
        peers = _peers(before.current(), run.fingerprint)
        count = len(peers)
        if mode == "new" and count >= BASELINE_RUNS:
            return baseline
        action = "accepted" if worse else "added" if before.runs else "new"
        count = 1 if worse else count + 1
        after = _append(before, entry, worse, reason)
        return replace(baseline, loads={**baseline.loads, key: after})

    update(path, root, change)
    if action == "kept":
        return kept(f"the baseline has {count} comparable runs, which is enough")
    said = f"stored as run {count} of {BASELINE_RUNS} that a verdict needs in {path}"
    if count >= BASELINE_RUNS:
        said = f"stored in {path}, which has {count} comparable runs"
    return Stored(action, path, f"accepted ({reason}) and {said}" if worse else said)


def unused(used: Iterable[Path], selected: Callable[[str], bool]) -> tuple[Path, ...]:
    """The baseline files in the folders of those `used` (that is, of the same hardware, model and
    server) that no test asked for, sorted. `selected` says of a test's name whether it would have
    asked if it still did. Files that cannot be read are left to those who need them."""
    used = set(used)
    beside = {path for folder in {p.parent for p in used} for path in folder.glob("*.json")}
    return tuple(path for path in sorted(beside - used) if selected(_test_of(path)))


def _test_of(path: Path) -> str:
    try:
        baseline = read(path)
    except ConfigError:
        return ""
    return baseline.test if baseline else ""


def command(tests: Iterable[str], mode: Mode, options: Sequence[str] = ()) -> str:
    """What to type to store runs of these tests."""
    words = ["pytest", *tests, f"--llmserve-update-baselines={mode}", *options]
    return shlex.join(words)


def entry_of(run: Run) -> StoredRun:
    """A run as it is stored."""
    metrics = {k: v for k, v in _flat(run.metrics).items() if not k.endswith(".n")}
    distributions = {k: v for k, v in run.metrics.items() if isinstance(v, Mapping) and "n" in v}
    return StoredRun(
        id=secrets.token_hex(6),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        duration=float(run.plan.duration),
        metrics=metrics,
        samples={name: int(group["n"] or 0) for name, group in distributions.items()},
        uncertified=sorted(k for k in metrics if uncertified(run.metrics, k)),
        sketch=sketches(run),
        fingerprint=dict(run.fingerprint),
        validity={c.check: c.detail for c in run.validity},
    )


def sketches(run: Run) -> dict[str, list[float]]:
    """Sketches of TTFT, TPOT, ITL and end-to-end time in the window; none without a record."""
    if run.record is None:
        return {}
    from pytest_llmserve.verdict.sketch import distributions, sketch

    drawn = {name: sketch(v) for name, v in distributions(run.record, run.plan).items()}
    return {name: points for name, points in drawn.items() if points}


def _point(run: Run, root: Path, options: Sequence[str]) -> _Point:
    path = path_of(run, root)
    more = command([run.test], "new", options)
    add = f"`{more}` adds one a run until there are {BASELINE_RUNS}"
    if not run.valid:
        return _Point([run], path, "invalid", add, invalid_reason(run))
    baseline = read(path)
    load = baseline.loads.get(str(run.fingerprint["load"])) if baseline else None
    current = load.current() if load else ()
    peers = _peers(current, run.fingerprint)
    if baseline is None or load is None or not peers:
        why_not, lacking = _why_none(baseline, load, current, run, path)
        return _Point([run], path, lacking, add, f"{why_not}; {add}")
    origin = _peers([r for r in load.runs if r.id in load.origin], run.fingerprint)
    if {r.id for r in origin} >= {r.id for r in peers} or len(origin) < BASELINE_RUNS:
        origin = []
    status: Status = "missing" if len(peers) < BASELINE_RUNS else "compared"
    return _Point([run], path, status, add, "", peers, origin)


def _why_none(
    baseline: Baseline | None,
    load: LoadBaseline | None,
    current: Sequence[StoredRun],
    run: Run,
    path: Path,
) -> tuple[str, Literal["missing", "mismatched"]]:
    if baseline is None:
        return f"no baseline ({path} does not exist)", "missing"
    if load is None:
        return f"no baseline of this load ({path} has {', '.join(baseline.loads)})", "missing"
    fields = "; ".join(
        str(d) for d in differences(current[-1].fingerprint, run.fingerprint) if d.kind == "must"
    )
    return f"the {len(current)} stored runs measured something else ({fields})", "mismatched"


def _measure(
    points: Sequence[_Point],
    wanted: Sequence[Tracked],
    rerun: Callable[[Run], Run] | None,
    repeats: Repeats,
) -> dict[_Key, Comparison]:
    """Compare, and repeat the points whose verdict needs it; their runs are appended to them."""
    most = MOST if repeats == "auto" else max(repeats, 2)
    while True:
        family = {
            (number_, *key): samples
            for number_, point in enumerate(points)
            for key, samples in _samples(point, wanted).items()
        }
        judged, again = _judge(family, repeats, most)
        if repeats == "auto":
            for (number_, _, _), samples in family.items():
                points[number_].planned = most if len(samples.baseline) >= BASELINE_RUNS else 0
        ended = {n for n in again if points[n].spoilt or len(points[n].runs) >= most}
        if ended:  # an adaptive plan has as many runs of each point, so it ends with any of them
            again = set() if repeats == "auto" else again - ended
        if not again or rerun is None:
            return judged
        for number_ in sorted(again):
            point = points[number_]
            run = rerun(point.runs[0])
            if run.valid:
                point.runs.append(run)
            else:
                point.spoilt = invalid_reason(run)


def _judge(
    family: Mapping[_Key, Samples], repeats: Repeats, most: int
) -> tuple[dict[_Key, Comparison], set[int]]:
    """The comparisons, and the numbers of the points that should be measured once more.

    What has too few stored runs can only come out inconclusive; it does not make the others'
    error smaller, and no repeat would help it.
    """
    few = {key: s for key, s in family.items() if len(s.baseline) < BASELINE_RUNS}
    enough = {key: s for key, s in family.items() if key not in few}
    judged = judge_family(few)
    if not enough:
        return judged, set()
    if repeats == "auto":
        decision = decide(enough, most)
        again = set() if decision.decided else {number_ for number_, _, _ in enough}
        return judged | dict(decision.comparisons), again
    found = judge_family(enough)
    return judged | found, {
        number_
        for (number_, _, _), c in found.items()
        if c.finding == "suspected" or c.new_runs < repeats
    }


def _samples(point: _Point, wanted: Sequence[Tracked]) -> dict[tuple[str, str], Samples]:
    """Samples by ("baseline" or "drift", metric). What has no value is left out."""
    family: dict[tuple[str, str], Samples] = {}
    for t in wanted:
        new = [_usable(r.metrics, t.metric) for r in point.runs]
        values = [value for value in new if value is not None]
        for kind, stored in (("baseline", point.peers), ("drift", point.origin)):
            old = _stored_values(stored, t.metric)
            if len(values) == len(new) and (
                old if kind == "baseline" else len(old) >= BASELINE_RUNS
            ):
                family[kind, t.metric] = Samples(values, old, t.better, t.floor)
    return family


def _verdicts(
    point: _Point, t: Tracked, judged: Mapping[tuple[str, str], Comparison]
) -> list[Verdict]:
    run = point.runs[0]
    if point.why_not:
        outcome: Outcome = "invalid" if point.status == "invalid" else "inconclusive"
        return [_verdict(run, t, outcome, point.why_not)]
    if ("baseline", t.metric) not in judged:
        lacking = next((w for r in point.runs if (w := uncertified(r.metrics, t.metric))), None)
        if lacking is None:
            if any(_usable(r.metrics, t.metric) is None for r in point.runs):
                lacking = "it could not be measured in this run"
            else:
                lacking = f"no stored run has it with enough samples; {point.add}"
        return [_verdict(run, t, "inconclusive", lacking)]
    found = []
    for kind, stored in (("baseline", point.peers), ("drift", point.origin)):
        comparison = judged.get((kind, t.metric))
        if comparison is not None:
            outcome, reason = _explain(comparison, t, stored, kind, point.add)
            reason += _notes(point)
            found.append(_verdict(run, t, outcome, reason, kind, comparison.limit))
    return found


def _notes(point: _Point) -> str:
    """What has to be said of the runs."""
    said = ""
    if point.spoilt:
        said += f"; a further run is no measurement ({point.spoilt})"
    if point.planned:
        said += f"; {len(point.runs)} of at most {point.planned} runs were needed"
    return said + _should(point.peers, point.runs[0])


def _explain(
    c: Comparison, t: Tracked, stored: Sequence[StoredRun], kind: str, add: str
) -> tuple[Outcome, str]:
    what = "the baseline" if kind == "baseline" else f"the origin of {stored[0].time[:10]}"
    change = f"{c.ratio - 1:+.1%}".replace("%", " %")
    runs = "1 run" if c.baseline_runs == 1 else f"{c.baseline_runs} runs"
    said = f"{change} from {what} ({runs}"
    said += f", run-to-run noise {c.noise:.1%})".replace("%", " %") if c.noise is not None else ")"
    if c.interval:
        low, high = c.interval
        said += f", ratio {c.ratio:.3f} (between {low:.3f} and {high:.3f})"
    floor = f"{t.floor:.0%}".replace("%", " %")
    if c.finding == "regression":
        both = "both runs are" if c.rule == "prediction" else f"the {c.new_runs} runs are"
        return "fail", f"{said}: {both} worse than noise and the floor of {floor} allow"
    if c.finding == "suspected":
        return "inconclusive", (
            f"{said}: worse than noise and the floor of {floor} allow; one run alone is no proof: "
            f"{c.runs_needed or 'many'} more would decide"
        )
    if c.finding == "inconclusive":
        return "inconclusive", (
            f"{said}: {c.baseline_runs} of {BASELINE_RUNS} baseline runs, {_smallest(c, t)}; "
            f"{c.runs_needed} more would decide: {add}"
        )
    if c.finding == "improvement":
        return "pass", f"{said}: better than noise explains"
    return "pass", f"{said}: no regression; {_smallest(c, t)}"


def _smallest(c: Comparison, t: Tracked) -> str:
    if c.minimum_detectable_effect is None:
        return "noise is not known from one run"
    sign = "-" if t.better == "higher" else "+"
    if c.minimum_detectable_effect > (0.99 if t.better == "higher" else 10):
        return "no change could have been detected yet"
    size = f"{c.minimum_detectable_effect:.1%}".replace("%", " %")
    return f"a change of {sign}{size} would have been detected with 80 % power"


def _should(peers: Sequence[StoredRun], run: Run) -> str:
    """The fields that should match and differ, with both values."""
    differing = [
        str(d) for d in differences(peers[-1].fingerprint, run.fingerprint) if d.kind == "should"
    ]
    return f"; compared although they differ in {', '.join(differing)}" if differing else ""


def _verdict(
    run: Run,
    t: Tracked,
    outcome: Outcome,
    reason: str,
    kind: str = "baseline",
    limit: float | None = None,
) -> Verdict:
    return Verdict(f"{kind} {t.metric}", number(run.metrics, t.metric), limit, outcome, reason)


def _is_baseline(verdict: Verdict) -> bool:
    return verdict.objective.startswith(("baseline ", "drift "))


def _usable(metrics: Mapping[str, Any], name: str) -> float | None:
    """A value that a comparison may rest on: there, positive, certified."""
    value = number(metrics, name)
    return value if value is not None and value > 0 and not uncertified(metrics, name) else None


def _stored_values(runs: Sequence[StoredRun], metric: str) -> list[float]:
    values = [r.metrics.get(metric, math.nan) for r in runs if metric not in r.uncertified]
    return [value for value in values if value > 0]


def _peers(runs: Sequence[StoredRun], fingerprint: Mapping[str, Any]) -> list[StoredRun]:
    return [r for r in runs if comparable(r.fingerprint, fingerprint)][-RECENT:]


def _append(
    before: LoadBaseline, entry: StoredRun, worse: Sequence[Verdict], reason: str | None
) -> LoadBaseline:
    runs = (*before.runs, entry)
    if worse:
        changes = _changes(before, entry, worse)
        accepted = Accepted(entry.id, entry.time, str(reason).strip(), changes)
        return replace(before, runs=runs, origin=(entry.id,), accepted=(*before.accepted, accepted))
    pinned = [r for r in before.runs if r.id in before.origin]
    if len(_peers(pinned, entry.fingerprint)) < BASELINE_RUNS:
        return replace(before, runs=runs, origin=(*before.origin, entry.id))
    return replace(before, runs=runs)


def _changes(before: LoadBaseline, entry: StoredRun, worse: Sequence[Verdict]) -> dict[str, float]:
    """Of each metric that became worse: its value over the mean of the runs it is worse than."""
    changes = {}
    for metric in dict.fromkeys(v.objective.split(" ")[-1] for v in worse):
        old = _stored_values(_peers(before.current(), entry.fingerprint), metric)
        if old and metric in entry.metrics:
            mean = math.exp(sum(math.log(value) for value in old) / len(old))
            changes[metric] = float(f"{entry.metrics[metric] / mean:.6g}")
    return changes


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every finite number of nested metrics by its dotted name; lists are no scalars."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        ):
            found[f"{prefix}{key}"] = value
    return found


def _hardware(run: Run) -> str:
    hardware = str(run.fingerprint["hardware"])
    if run.server.emulated and not hardware.startswith("emulated-"):
        return f"emulated-{hardware}"
    return hardware


def _kind(emulated: bool) -> str:
    return "emulated" if emulated else "real"
