"""How noisy is a test, what would its gate make of that, and what floors and repeats suit it?

From runs of one unchanged server: the run-to-run noise of each metric, then the false alarms and
the power that the rules of `regression` would have at that noise and the present floor, by
simulation of the rules themselves; then proposals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import variance

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.run import Run
from pytest_llmserve.verdict.baseline import Tracked
from pytest_llmserve.verdict.regression import (
    ALPHA,
    BASELINE_RUNS,
    WELCH_RUNS,
    as_change,
    detectable,
    judge_new,
    log_floor,
)
from pytest_llmserve.verdict.slo import number, uncertified

#: Changes for the worse at which power is stated.
EFFECTS = (0.03, 0.05, 0.10, 0.20)
#: The change that repeats are proposed for.
WANTED = 0.10
MOST_REPEATS = 20
TRIALS = 1000


@dataclass(frozen=True)
class Calibration:
    """One metric. `noise` is the run-to-run standard deviation as a fraction and `noise_interval`
    its 90 % interval (normal logs). `false_alarms` and `power` (by effect) are those of one new
    run, and a second if the first breaches, at `floor` and `baseline_runs`. `detectable` is the
    smallest change found with 80 % power. `proposed_repeats` is how many new runs find a change of
    10 % with 80 % power (None: not even 20)."""

    metric: str
    runs: int
    noise: float
    noise_interval: tuple[float, float]
    floor: float
    baseline_runs: int
    false_alarms: float
    power: Mapping[float, float]
    detectable: float
    proposed_floor: float
    proposed_repeats: int | None


def calibrate(
    values: Sequence[float], tracked: Tracked, *, baseline_runs: int | None = None, seed: int = 0
) -> Calibration:
    """Calibrate one metric from its values in three or more runs of an unchanged server.

    `baseline_runs` is the size of the baseline to judge by (None: as many as there are values,
    five at least). Raises ConfigError for too few values or for some that are not positive.
    """
    if len(values) < 3:
        raise ConfigError(
            f"{tracked.metric}: {len(values)} runs say too little about noise: "
            "measure 3 or more, best 10"
        )
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise ConfigError(f"{tracked.metric}: a run has no positive value: see the runs' validity")
    noise = math.sqrt(variance([math.log(v) for v in values]))
    size = max(BASELINE_RUNS, baseline_runs or len(values))
    step = log_floor(tracked.floor, tracked.better)
    smallest = detectable(noise, size, 1, step, ALPHA)
    return Calibration(
        metric=tracked.metric,
        runs=len(values),
        noise=noise,
        noise_interval=_interval(noise, len(values)),
        floor=tracked.floor,
        baseline_runs=size,
        false_alarms=_rate(noise, 0.0, tracked, size, seed),
        power={effect: _rate(noise, effect, tracked, size, seed) for effect in EFFECTS},
        detectable=as_change(smallest, tracked.better),
        proposed_floor=proposed_floor(noise),
        proposed_repeats=proposed_repeats(noise, size, tracked),
    )


def calibrate_runs(runs: Sequence[Run], metrics: Sequence[Tracked]) -> str:
    """The table of the valid ones of some runs of one load on an unchanged server, and a line on
    each metric that cannot be calibrated by them."""
    valid = [run for run in runs if run.valid]
    found, notes = [], []
    for t in metrics:
        values = [
            value
            for run in valid
            if (value := number(run.metrics, t.metric)) and not uncertified(run.metrics, t.metric)
        ]
        try:
            found.append(calibrate(values, t))
        except ConfigError as error:
            lacking = next((w for r in valid if (w := uncertified(r.metrics, t.metric))), "")
            notes.append(f"{error}{f' ({lacking})' if lacking else ''}\n")
    if len(valid) < len(runs):
        notes.append(f"{len(runs) - len(valid)} invalid runs are left out\n")
    return (as_text(found) if found else "") + "".join(notes)


def proposed_floor(noise: float) -> float:
    """Twice the noise in whole percents, 1 % at least: what is less cannot be seen in a run or two,
    and a higher floor would hide what can."""
    return max(0.01, math.ceil(200 * noise - 1e-9) / 100)


def proposed_repeats(noise: float, baseline_runs: int, tracked: Tracked) -> int | None:
    """The fewest new runs that find a change of 10 % with 80 % power; None if more than 20.

    A floor of 10 % or more hides such a change: then it is twice the floor.
    """
    change = WANTED if tracked.floor < WANTED else min(2 * tracked.floor, 0.9)
    step, target = log_floor(tracked.floor, tracked.better), log_floor(change, tracked.better)
    for new in (1, *range(WELCH_RUNS, MOST_REPEATS + 1)):
        if detectable(noise, baseline_runs, new, step, ALPHA) <= target:
            return int(new)
    return None


def _interval(noise: float, runs: int) -> tuple[float, float]:
    from scipy.special import chdtri

    freedom = runs - 1
    low, high = (math.sqrt(freedom / float(chdtri(freedom, tail))) for tail in (0.05, 0.95))
    return noise * low, noise * high


def _rate(noise: float, effect: float, tracked: Tracked, baseline_runs: int, seed: int) -> float:
    """How often a change for the worse of this size is called a regression."""
    import numpy as np

    rng = np.random.default_rng(seed)
    sign = 1.0 if tracked.better == "lower" else -1.0
    change = math.exp(sign * log_floor(effect, tracked.better))
    old = np.exp(noise * rng.standard_normal((TRIALS, baseline_runs)))
    new = change * np.exp(noise * rng.standard_normal((TRIALS, 2)))
    found = 0
    for before, after in zip(old.tolist(), new.tolist(), strict=True):
        finding = judge_new(after[:1], before, tracked.better, tracked.floor).finding
        if finding == "suspected":
            finding = judge_new(after, before, tracked.better, tracked.floor).finding
        found += finding == "regression"
    return found / TRIALS


def as_text(calibrations: Sequence[Calibration]) -> str:
    """The calibrations of one test as a Markdown table, which reads well in a terminal too."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    head = ["metric", "runs", "noise (90 % interval)", "floor", "false alarms"]
    head += [*(f"finds {e:.0%}".replace("%", " %") for e in EFFECTS), "least found"]
    head += ["proposed floor", "repeats for 10 %"]
    rows = [head]
    for c in calibrations:
        low, high = c.noise_interval
        repeats = f"{c.proposed_repeats}" if c.proposed_repeats else f"over {MOST_REPEATS}"
        rows.append(
            [
                c.metric,
                str(c.runs),
                f"{percent(c.noise)} ({100 * low:.1f} to {100 * high:.1f})",
                percent(c.floor),
                percent(c.false_alarms),
                *(f"{100 * c.power[e]:.0f} %" for e in EFFECTS),
                percent(c.detectable),
                percent(c.proposed_floor),
                f"{repeats}{'*' if c.floor >= WANTED else ''}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    if any(c.floor >= WANTED for c in calibrations):
        lines.append(f"\\* for twice the floor: the floor hides a change of {WANTED:.0%}")
    return "\n".join(lines) + "\n"
