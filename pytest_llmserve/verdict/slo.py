"""Service level objectives as data, and the verdict of a run by them.

Nothing heavy is imported here: user tests import this at collection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pytest_llmserve import run as runs
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report.units import show, show_time
from pytest_llmserve.run import Outcome, Run, Verdict

#: What the server says of itself over a load (docs/metrics.md, "Of the server").
SERVER = (
    "server.running.mean",
    "server.running.max",
    "server.waiting.mean",
    "server.waiting.max",
    "server.kv_usage.mean",
    "server.kv_usage.max",
    "server.kv_usage.last",
    "server.preemptions",
    "server.prefix_hit_rate",
    "server.acceptance_rate",
    "server.accepted_length",
    "server.queue_time.mean",
    "server.ttft.mean",
    "server.e2e.mean",
    "server.output_throughput",
    "server.prompt_throughput",
)
#: What the GPUs say of themselves in the window (docs/metrics.md, "Of the GPU").
GPU = (
    "gpu.utilization.mean",
    "gpu.utilization.max",
    "gpu.memory_used.mean",
    "gpu.memory_used.max",
    "gpu.system_memory_used.mean",
    "gpu.system_memory_used.max",
    "gpu.power.mean",
    "gpu.power.max",
    "gpu.temperature.mean",
    "gpu.temperature.max",
    "gpu.sm_clock.mean",
    "gpu.sm_clock.min",
    "gpu.memory_clock.mean",
    "gpu.memory_clock.min",
    "gpu.throttled",
    "gpu.power_capped",
    "gpu.energy",
)
#: Metrics that are one number, and metrics that are a distribution (METRICS.md, "Per run").
SCALARS = (
    "output_throughput",
    "total_throughput",
    "request_throughput",
    "goodput.rate",
    "goodput.fraction",
    "requests",
    "energy_per_token",
    "roofline",
    "tokens_per_event",
    "concurrency.mean",
    "concurrency.max",
    *SERVER,
    *GPU,
)
DISTRIBUTIONS = ("ttft", "tpot", "itl", "e2e", "send_delay", "client_lag", "user_throughput")
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")

#: Samples that a percentile needs before a verdict may rest on it (METRICS.md, 99 % confidence):
#: the values of `metrics.percentiles.least_samples`, which would cost the import of SciPy.
MINIMUM_SAMPLES: Mapping[str, int] = {"p50": 11, "p90": 64, "p95": 130, "p99": 662}

Relation = Literal[">=", "<="]


@dataclass(frozen=True)
class Objective:
    """`metric` must be `relation` `bound`: `str()` of it is "ttft.p95 <= 0.5".

    `metric` is a dotted name of METRICS.md, `bound` is in the metric's unit (seconds, per second,
    counts). Raises ConfigError if there is no such metric or the bound is not a finite number.
    """

    metric: str
    relation: Relation
    bound: float

    def __post_init__(self) -> None:
        call = (
            f"{'at_least' if self.relation == '>=' else 'at_most'}({self.metric!r}, {self.bound!r})"
        )
        if self.relation not in (">=", "<="):
            raise ConfigError(f"objective relation {self.relation!r}: write '>=' or '<='")
        if isinstance(self.bound, bool) or not isinstance(self.bound, (int, float)):
            raise ConfigError(f"{call}: the bound must be a number")
        if not math.isfinite(self.bound):
            raise ConfigError(f"{call}: the bound must be finite")
        check_metric(self.metric, call)

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.bound:g}"

    def met(self, measured: float) -> bool:
        return measured >= self.bound if self.relation == ">=" else measured <= self.bound


def at_least(metric: str, bound: float) -> Objective:
    """`metric` must be `bound` or more: `at_least("output_throughput", 1000)`."""
    return Objective(metric, ">=", bound)


def at_most(metric: str, bound: float) -> Objective:
    """`metric` must be `bound` or less: `at_most("ttft.p95", 0.5)`."""
    return Objective(metric, "<=", bound)


def known_metrics() -> tuple[str, ...]:
    """Every name an objective may use, apart from `errors.KIND`."""
    return SCALARS + tuple(f"{d}.{s}" for d in DISTRIBUTIONS for s in STATISTICS)


def check_metric(name: object, where: str) -> None:
    """ConfigError, naming the nearest names, if there is no metric `name`."""
    if not isinstance(name, str):
        raise ConfigError(f"{where}: a metric is named by a string such as 'ttft.p95'")
    known = known_metrics()
    if name in known or re.fullmatch(r"errors\.[a-z_]+", name):
        return
    inner = [k for k in known if k.startswith(f"{name}.")]
    if inner:
        raise ConfigError(f"{where}: {name!r} is a group: name one of {', '.join(inner)}")
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if name == "users":
        near = ["concurrency.max"]
    if near:
        mend = f"did you mean {' or '.join(near)}?"
    else:
        groups = " ".join(f"{d}.p95" for d in DISTRIBUTIONS)
        mend = f"use one of {' '.join(SCALARS)}, {groups}, or another of docs/metrics.md"
    raise ConfigError(f"{where}: no metric {name!r}: {mend}")


def judge(run: Run, objectives: Iterable[Objective]) -> tuple[Verdict, ...]:
    """One verdict an objective, in their order.

    All are invalid if the run is (with the failed checks as the reason). An objective on a
    percentile of too few samples, or on what could not be measured, is inconclusive.
    """
    return tuple(_judge(run, objective) for objective in objectives)


def _judge(run: Run, objective: Objective) -> Verdict:
    try:
        value = run[objective.metric]
    except KeyError:
        value = math.nan
    measured = value if math.isfinite(value) else None

    def verdict(outcome: Outcome, reason: str) -> Verdict:
        return Verdict(str(objective), measured, objective.bound, outcome, reason)

    if not run.valid:
        return verdict("invalid", invalid_reason(run))
    if measured is None:
        return verdict("inconclusive", _unmeasured(run, objective.metric))
    lacking = uncertified(run.metrics, objective.metric)
    if lacking:
        return verdict(
            "inconclusive", f"{show(objective.metric, measured)} measured, but {lacking}"
        )
    if objective.met(measured):
        return verdict("pass", f"{show(objective.metric, measured)} measured")
    return verdict("fail", _explain(run, objective, measured))


def _unmeasured(run: Run, metric: str) -> str:
    """Why a metric has no value in this run, as far as that is known."""
    missing = f"{metric} could not be measured in this run"
    if metric.startswith("server."):
        return f"{missing}: {run.server.engine} does not show it in its metrics, or had none of it"
    if metric.startswith("gpu.") or metric == "energy_per_token":
        return f"{missing}: {run.telemetry.get('reason') or 'the GPU does not give it'}"
    if metric == "roofline" and run.roofline.get("reason"):
        return f"{missing}: {run.roofline['reason']}"
    return missing


def invalid_reason(run: Run) -> str:
    """The failed validity checks of a run, with their details."""
    return "; ".join(f"{c.check}: {c.detail}" for c in run.validity if not c.ok)


def uncertified(metrics: Mapping[str, Any], name: str) -> str | None:
    """Why no verdict may rest on this metric (too few samples), or None if one may.

    `metrics` is nested as in the result file. A group's own `certified` list decides where there
    is one, else its `n` does.
    """
    group_name, _, statistic = name.rpartition(".")
    group = metrics.get(group_name)
    if statistic not in MINIMUM_SAMPLES or not isinstance(group, Mapping):
        return None
    n, needed = int(group.get("n") or 0), MINIMUM_SAMPLES[statistic]
    listed = group.get("certified")
    certified = n >= needed if listed is None else statistic in listed
    if certified:
        return None
    return (
        f"{statistic} rests on {n:,} samples and needs {max(needed, n + 1):,}: "
        "lengthen the load's duration"
    )


def worst(verdicts: Iterable[Verdict]) -> Outcome | None:
    """The verdict that decides: invalid, fail, inconclusive, pass, in this order; None of none."""
    return runs.worst(v.verdict for v in verdicts)


def _explain(run: Run, objective: Objective, measured: float) -> str:
    """Why a missed objective was missed: measured, bound, margin, and what went with it."""
    metric, bound = objective.metric, objective.bound
    missed = abs(measured - bound)
    side = "short of" if objective.relation == ">=" else "over"
    parts = [f"{show(metric, measured)} measured is {show(metric, missed)}"]
    if bound:
        parts[0] += f" ({missed / abs(bound):.1%})".replace("%", " %")
    parts[0] += f" {side} the bound of {show(metric, bound)}"
    noise = _noise(run.metrics, metric)
    if noise:
        parts[0] += f", {missed / noise:.1f} times the half-width of its confidence interval"
    return "; ".join([*parts, *symptoms(run)])


def _noise(metrics: Mapping[str, Any], name: str) -> float | None:
    """Half the width of the metric's confidence interval, where the run has one."""
    group_name, _, statistic = name.rpartition(".")
    group = metrics.get(group_name)
    interval = group.get("ci", {}).get(statistic) if isinstance(group, Mapping) else None
    if not interval or any(end is None or not math.isfinite(end) for end in interval):
        return None
    low, high = interval
    return (high - low) / 2 if high > low else None


def symptoms(run: Run) -> Iterator[str]:
    """What the server's and the client's own figures say beside a missed objective."""
    server = run.server_metrics

    def value(name: str) -> float | None:
        return number(server, name)

    queue_time, queued = value("queue_time.sum"), value("queue_time.count")
    if queue_time and queued:
        yield f"requests queued {show_time(queue_time / queued)} on the server on average"
    waiting = _highest(server, "waiting")
    if waiting:
        yield f"up to {waiting:g} requests waited at once"
    preemptions = value("preemptions")
    if preemptions:
        yield f"{preemptions:g} preemptions (KV cache full)"
    kv_usage = _highest(server, "kv_usage")
    if kv_usage and kv_usage > 0.9:
        yield f"KV cache up to {kv_usage:.0%} full"
    queries, hits = value("prefix_queries"), value("prefix_hits")
    if queries:
        yield f"prefix cache answered {(hits or 0) / queries:.0%} of prompt tokens"
    capped = number(run.metrics, "gpu.power_capped")
    if capped:
        yield f"the GPU's power was capped in {capped:.0%} of the window"
    send_delay = number(run.metrics, "send_delay.p99")
    ttft = number(run.metrics, "ttft.p50")
    if send_delay and ttft and send_delay > 0.01 * ttft:
        yield f"the client sent up to {show_time(send_delay)} late (p99)"


def _highest(server: Mapping[str, Any], gauge: str) -> float | None:
    """The highest reading of a gauge over the load, from the series of its readings."""
    series = server.get("series")
    readings = series.get(gauge, ()) if isinstance(series, Mapping) else ()
    return max((float(r) for r in readings if r is not None and math.isfinite(r)), default=None)


def number(tree: Mapping[str, Any], name: str) -> float | None:
    """A finite number under a dotted name, whether the mapping is nested or flat; else None."""
    value: Any = tree.get(name)
    if value is None:
        value = tree
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
