"""Repeat only until the verdict is decided, and pay for every look.

Judging after each run and stopping at the first alarm gives many false ones. Here the error of the
whole plan of at most `most` new runs is spent over the looks by the function of Lan & DeMets
(Biometrika 70, 1983) in the manner of O'Brien & Fleming: little on the first runs, most on the
last. Each look is judged, by the rules of `regression`, at the part of the error that it spends;
the parts add up to that of one comparison, so the false alarms of the plan are at most those of
one (union bound: a little strict, and right whatever the looks have in common).

A plan ends with *no regression* as soon as the same error says of every metric that the change is
less than its floor. This end only saves runs: it can never make a false alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Generic

from pytest_llmserve.verdict.regression import (
    ALPHA,
    BASELINE_RUNS,
    Comparison,
    Finding,
    Key,
    Samples,
    judge_family,
    log_floor,
)

#: New runs of a plan at most, unless the user says otherwise.
MOST = 8
#: A regression takes two runs at least, so the first look spends nothing.
FIRST_LOOK = 2


@dataclass(frozen=True)
class Decision(Generic[Key]):
    """Where a plan stands after a run. `saved` are the runs of the plan that need not be made."""

    decided: bool
    finding: Finding
    comparisons: Mapping[Key, Comparison]
    runs: int
    saved: int


def decide(family: Mapping[Key, Samples], most: int = MOST) -> Decision[Key]:
    """Judge a plan of at most `most` new runs after those that `family` holds.

    All metrics must have the same number of new runs. Not decided: make one more run and ask
    again. With too few baseline runs nothing can be decided, and the plan ends at once.
    """
    runs = len(next(iter(family.values())).new)
    fewest = min(len(s.baseline) for s in family.values())
    if fewest < BASELINE_RUNS:
        return Decision(True, "inconclusive", judge_family(family), runs, most - runs)
    share = shares(fewest, most)[min(runs, most) - 1]
    comparisons = judge_family(family, ALPHA * share) if share else judge_family(family)
    findings = [c.finding for c in comparisons.values()]
    if runs >= FIRST_LOOK and "regression" in findings:
        return Decision(True, "regression", comparisons, runs, most - runs)
    level = ALPHA / most / len(family)
    if runs >= most or all(_within_floor(s, level) for s in family.values()):
        better = all(finding == "improvement" for finding in findings)
        finding: Finding = "improvement" if better else "no_regression"
        return Decision(True, finding, comparisons, runs, max(0, most - runs))
    return Decision(False, "suspected", comparisons, runs, 0)


def shares(baseline_runs: int, most: int) -> list[float]:
    """The part of the error that each of `most` looks spends; they add up to 1."""
    from scipy.special import ndtr, ndtri

    if most < FIRST_LOOK:
        return [1.0] * most
    information = [1 / (1 / new + 1 / baseline_runs) for new in range(1, most + 1)]
    quantile = -float(ndtri(ALPHA / 2))
    spent = [2 - 2 * float(ndtr(quantile / math.sqrt(i / information[-1]))) for i in information]
    spent[: FIRST_LOOK - 1] = [0.0] * (FIRST_LOOK - 1)
    before = [0.0, *spent[:-1]]
    return [(now - then) / ALPHA for now, then in zip(spent, before, strict=True)]


def _within_floor(s: Samples, level: float) -> bool:
    """Whether the change for the worse is surely less than the floor."""
    from scipy.special import stdtrit

    sign = 1.0 if s.better == "lower" else -1.0
    new, old = ([sign * math.log(v) for v in values] for values in (s.new, s.baseline))
    squares = sum(variance(group) * (len(group) - 1) for group in (new, old) if len(group) > 1)
    freedom = len(new) + len(old) - 2
    error = math.sqrt(squares / freedom * (1 / len(new) + 1 / len(old)))
    upper = fmean(new) - fmean(old) + float(stdtrit(freedom, 1 - level)) * error
    return upper < log_floor(s.floor, s.better)
