"""A against B in one sitting: A B B A A B …, judged by the ratio within each pair.

What drifts on the host (clocks, heat, neighbours) moves both runs of a pair, and every second pair
is turned round, so that a steady drift favours neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pytest_llmserve.report.units import several
from pytest_llmserve.run import Run, Verdict
from pytest_llmserve.verdict.baseline import TRACKED, Tracked, tracked
from pytest_llmserve.verdict.regression import Better, Comparison, judge_pairs
from pytest_llmserve.verdict.slo import Objective, invalid_reason, number, uncertified

T = TypeVar("T")


def alternate(a: Callable[[], T], b: Callable[[], T], pairs: int) -> list[tuple[T, T]]:
    """Call A and B `pairs` times each, in the order A B B A A B …; the results as (A, B)."""
    found = []
    for number_ in range(pairs):
        if number_ % 2:
            second = b()
            first = a()
        else:
            first = a()
            second = b()
        found.append((first, second))
    return found


def judge_ab(
    pairs: Sequence[tuple[Run, Run]],
    objectives: Sequence[Objective] = (),
    *,
    metrics: Sequence[str | Tracked] | None = None,
) -> tuple[Verdict, ...]:
    """Judge B by A from pairs of runs (A, B).

    An objective is on the ratio B / A: `at_least("output_throughput", 1.2)` says that B gives at
    least 1.2 times the tokens. It passes if the whole 90 % interval of the ratio is on its good
    side, fails if none of it is, and is inconclusive else. Without objectives B must be no worse
    than A in each of `metrics` (None: those that baselines track).
    """
    invalid = [run for pair in pairs for run in pair if not run.valid]
    if objectives:
        return tuple(
            _invalid(f"B/A {o}", invalid, o.bound) if invalid else _ratio(pairs, o)
            for o in objectives
        )
    wanted = [tracked(metric) for metric in (TRACKED if metrics is None else metrics)]
    return tuple(
        _invalid(f"B/A {t.metric}", invalid, None) if invalid else _no_worse(pairs, t)
        for t in wanted
    )


def _ratio(pairs: Sequence[tuple[Run, Run]], objective: Objective) -> Verdict:
    name = f"B/A {objective}"
    values = _values(pairs, objective.metric)
    if isinstance(values, str):
        return Verdict(name, None, objective.bound, "inconclusive", values)
    # Which direction is good is the objective's to say; a ratio has no floor here.
    better: Better = "higher" if objective.relation == ">=" else "lower"
    found = judge_pairs(values, better, 0.0)
    if found.interval is None:
        reason = _too_few(len(values), found.runs_needed)
        return Verdict(name, found.ratio, objective.bound, "inconclusive", reason)
    met = [objective.met(end) for end in found.interval]
    if all(met):
        return Verdict(name, found.ratio, objective.bound, "pass", _said(found))
    if not any(met):
        return Verdict(name, found.ratio, objective.bound, "fail", _said(found))
    reason = f"{_said(found)} holds the bound {objective.bound:g}: measure more pairs"
    return Verdict(name, found.ratio, objective.bound, "inconclusive", reason)


def _too_few(pairs: int, missing: int | None) -> str:
    if missing is None:  # the noise is not known: no number of pairs can be named
        return f"{several(pairs, 'pair')}: measure more"
    return f"{several(pairs, 'pair')}: {missing} more {'is' if missing == 1 else 'are'} needed"


def _no_worse(pairs: Sequence[tuple[Run, Run]], t: Tracked) -> Verdict:
    name = f"B/A {t.metric}"
    values = _values(pairs, t.metric)
    if isinstance(values, str):
        return Verdict(name, None, None, "inconclusive", values)
    found = judge_pairs(values, t.better, t.floor)
    if found.finding == "inconclusive":
        reason = _too_few(len(values), found.runs_needed)
        return Verdict(name, found.ratio, None, "inconclusive", reason)
    bad = found.finding == "regression"
    floor = f"{t.floor:.0%}".replace("%", " %")
    reason = _said(found) + (f": worse than noise and the floor of {floor} allow" if bad else "")
    return Verdict(name, found.ratio, None, "fail" if bad else "pass", reason)


def _values(pairs: Sequence[tuple[Run, Run]], metric: str) -> list[tuple[float, float]] | str:
    """The metric in each pair, or why it cannot be judged."""
    found = []
    for pair in pairs:
        for run in pair:
            lacking = uncertified(run.metrics, metric)
            if lacking:
                return lacking
        a, b = (number(run.metrics, metric) for run in pair)
        if not (a and b and a > 0 and b > 0):
            return f"{metric} could not be measured in every run"
        found.append((a, b))
    return found or "there are no pairs"


def _said(c: Comparison) -> str:
    assert c.interval is not None
    assert c.noise is not None
    low, high = c.interval
    noise = f"{c.noise:.1%}".replace("%", " %")
    return (
        f"{c.ratio:.3f} of {c.new_runs} pairs (90 % interval {low:.3f} to {high:.3f}, "
        f"noise of a pair {noise})"
    )


def _invalid(name: str, runs: Sequence[Run], bound: float | None) -> Verdict:
    reasons = dict.fromkeys(invalid_reason(run) for run in runs)
    return Verdict(name, None, bound, "invalid", "; ".join(reasons))
