"""Has it become worse? The statistics of runs, not of requests.

Requests of one run share its queues, its clocks and its neighbours; a test on them calls every
fifth unchanged run a regression. So one run gives one number a metric, and its logarithm is what
is compared: effects are ratios, and run-to-run noise is about normal on that scale.

Let `d` be the mean log of the new runs minus that of the baseline, signed so that positive is
worse, `s` a standard deviation of logs, and `floor` the change that matters at all.

**One new run** (≥ 5 baseline runs). The run *breaches* if it is worse than the one-sided 95 %
prediction bound for one more run, `d > t(0.95, n-1) · s · sqrt(1 + 1/n)`, and `d > floor`. Then
it is *suspected* and one more run is wanted; it is a regression only if both breach and are *real*.

**Three or more new runs** (≥ 5 baseline runs). Welch's t: a regression if the one-sided 95 % bound
of the ratio is beyond the floor, and the change is real. If only the first holds it is suspected.

**Real** means that Student's pooled t puts `d` beyond its one-sided 99.5 % bound: if nothing
changed, new and baseline runs have one variance, so pooling is right then. It keeps false alarms
of a whole comparison under 1 % where the noise is far above the floor, with three runs (for which
Welch's approximation is poor: up to 2 % at a nominal 1 %) and with noise that is itself skewed.

**Fewer baseline runs**: inconclusive, with the smallest change that could have been detected.

**Several metrics** (or points of a curve): Holm's step-down, so that the whole test, not each
metric, has these error rates.

References: Hahn & Meeker, Statistical Intervals (1991), ch. 4, for the prediction bound; Welch,
Biometrika 34 (1947); Holm, Scand. J. Statist. 6 (1979); Georges et al., OOPSLA 2007, and Kalibera &
Jones, ISMM 2013, for the run as the unit and for effects as ratios.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal, TypeVar

Better = Literal["higher", "lower"]
Rule = Literal["prediction", "welch", "paired", "none"]
Finding = Literal["regression", "suspected", "no_regression", "improvement", "inconclusive"]

#: What a family is keyed by: a metric's name, or a name and more.
Key = TypeVar("Key", bound=Hashable)

#: One-sided error of each bound.
ALPHA = 0.05
#: One-sided error of the bound that says that a change is real: half of the 1 % of false alarms
#: that a comparison may give, which leaves room for skewed noise.
REAL = 0.005
#: Runs that a baseline needs, and new runs from which Welch's test takes over.
BASELINE_RUNS = 5
WELCH_RUNS = 3
#: Power at which the minimum detectable effect is stated.
POWER = 0.8
#: No more runs than this are ever proposed.
MOST_RUNS = 50


@dataclass(frozen=True)
class Samples:
    """One metric: values of new and of baseline runs, all positive.

    `better` says which direction is good, `floor` the relative change that matters (0.03: 3 %).
    """

    new: Sequence[float]
    baseline: Sequence[float]
    better: Better
    floor: float


@dataclass(frozen=True)
class Comparison:
    """How one metric of new runs compares with the baseline's.

    `ratio` is new / baseline (geometric means) and `interval` its two-sided 90 % interval, whose
    ends are the one-sided 95 % bounds (at the family's level: wider); None without noise to know.
    `noise` is the run-to-run standard deviation as a fraction. `p_value` is comparable with the
    level given and already includes every condition but the floor of the prediction rule.
    `limit` is the value beyond which the new runs (one: a single run) would be called worse.
    `minimum_detectable_effect` is a relative change for the worse that would be found with 80 %
    power, `runs_needed` how many more runs would decide (baseline runs below five, else new
    ones; None if no sensible number would).
    """

    finding: Finding
    rule: Rule
    ratio: float
    interval: tuple[float, float] | None
    noise: float | None
    p_value: float
    limit: float | None
    minimum_detectable_effect: float | None
    runs_needed: int | None
    new_runs: int
    baseline_runs: int


@dataclass(frozen=True)
class _Spread:
    """Standard error of `d` and its degrees of freedom."""

    error: float
    freedom: float


def judge_new(
    new: Sequence[float],
    baseline: Sequence[float],
    better: Better,
    floor: float,
    alpha: float = ALPHA,
) -> Comparison:
    """Compare new runs with baseline runs by the rules of the module's text.

    One new run: `suspected` asks for one more. Raises ValueError for values that are not positive
    and finite, and without any new run.
    """
    samples = Samples(tuple(new), tuple(baseline), better, floor)
    _check(samples)
    sign = 1.0 if better == "lower" else -1.0
    worse_new = [sign * math.log(v) for v in samples.new]
    worse_old = [sign * math.log(v) for v in samples.baseline]
    step = log_floor(floor, better)
    if len(worse_old) < BASELINE_RUNS:
        return _too_few(samples, worse_new, worse_old, step, alpha)
    if len(worse_new) < WELCH_RUNS:
        return _predict(samples, worse_new, worse_old, step, alpha)
    return _welch(samples, worse_new, worse_old, step, alpha)


def judge_family(family: Mapping[Key, Samples], alpha: float = ALPHA) -> dict[Key, Comparison]:
    """Compare several metrics (or load points) at once; the family's error is that of one.

    Holm: the smallest p-value is judged at alpha / m, the next at alpha / (m - 1), …, and from
    the first that is above its level on, all are judged at that level.
    """
    alone = {
        name: judge_new(s.new, s.baseline, s.better, s.floor, alpha) for name, s in family.items()
    }
    level, stopped = alpha, False
    judged: dict[Key, Comparison] = {}
    for rank, name in enumerate(sorted(alone, key=lambda n: alone[n].p_value)):
        if not stopped:
            level = alpha / (len(alone) - rank)
            stopped = alone[name].p_value > level
        s = family[name]
        judged[name] = judge_new(s.new, s.baseline, s.better, s.floor, level)
    return {name: judged[name] for name in family}


def judge_pairs(
    pairs: Sequence[tuple[float, float]], better: Better, floor: float, alpha: float = ALPHA
) -> Comparison:
    """Compare B with A from pairs (A, B) measured side by side: is B worse, or better, than A?

    What drifts on the host moves both of a pair, so the ratio within each pair is the sample:
    Student's t on its logs, a regression if the one-sided 95 % bound is beyond the floor and the
    99.5 % bound beyond no change, an improvement likewise. Fewer than three pairs: inconclusive.
    `noise` is that of one pair's ratio. Raises ValueError as `judge_new` does.
    """
    samples = Samples([b for _, b in pairs], [a for a, _ in pairs], better, floor)
    _check(samples)
    sign = 1.0 if better == "lower" else -1.0
    logs = [sign * math.log(b / a) for a, b in pairs]
    n, difference, step = len(logs), fmean(logs), log_floor(floor, better)
    if n < WELCH_RUNS:
        return _comparison(
            samples, "inconclusive", "paired", difference, None, None, 1.0, None, None,
            WELCH_RUNS - n, alpha,
        )  # fmt: skip
    noise = math.sqrt(variance(logs))
    error = noise / math.sqrt(n)

    def worse(sign: float) -> float:
        real = _p_value(sign * difference, error, n - 1) * ALPHA / REAL
        return max(_p_value(sign * difference - step, error, n - 1), min(1.0, real))

    finding: Finding = "no_regression"
    if worse(1.0) <= alpha:
        finding = "regression"
    elif worse(-1.0) <= alpha:
        finding = "improvement"
    quantile = _quantile(1 - alpha, n - 1)
    bound = max(step + quantile * error, _quantile(1 - alpha * REAL / ALPHA, n - 1) * error)
    smallest = bound + _quantile(POWER, n - 1) * error
    return _comparison(
        samples, finding, "paired", difference, _Spread(error, n - 1), noise, worse(1.0), bound,
        smallest, 0, alpha,
    )  # fmt: skip


def log_floor(floor: float, better: Better) -> float:
    """A relative change for the worse as a difference of logs: 3 % less, or 10 % more."""
    return -math.log1p(-floor) if better == "higher" else math.log1p(floor)


def as_change(difference: float, better: Better) -> float:
    """The inverse of `log_floor`: a difference of logs as a relative change, 0 or more."""
    return -math.expm1(-difference) if better == "higher" else math.expm1(difference)


def detectable(noise: float, baseline_runs: int, new_runs: int, step: float, alpha: float) -> float:
    """The difference of logs that the rule finds with 80 % power at this noise.

    Fewer than three new runs: the prediction rule with its second run, in which each of two runs
    has to breach (0.894 · 0.894 = 0.8). An approximation: `s` is taken for its true value.
    """
    new = max(new_runs, 2)
    mean = noise * math.sqrt(1 / new + 1 / baseline_runs)
    freedom = new + baseline_runs - 2
    real = (_quantile(1 - alpha * REAL / ALPHA, freedom) + _quantile(POWER, freedom)) * mean
    if new_runs < WELCH_RUNS:
        error = noise * math.sqrt(1 + 1 / baseline_runs)
        bound = max(step, _quantile(1 - alpha, baseline_runs - 1) * error)
        return max(bound + _normal(math.sqrt(POWER)) * error, real)
    welch = _expected_freedom(new_runs, baseline_runs)
    return max(step + (_quantile(1 - alpha, welch) + _quantile(POWER, welch)) * mean, real)


def _expected_freedom(new: int, old: int) -> float:
    """Welch's degrees of freedom for two groups of equal variance."""
    return (1 / new + 1 / old) ** 2 / (1 / (new**2 * (new - 1)) + 1 / (old**2 * (old - 1)))


def _real(difference: float, noise: float, new: int, old: int) -> float:
    """Student's pooled p-value of `d`, scaled so that it is compared with the same level as the
    others are."""
    p_value = _p_value(difference, noise * math.sqrt(1 / new + 1 / old), new + old - 2)
    return min(1.0, p_value * ALPHA / REAL)


def _pooled(new: list[float], old: list[float]) -> float:
    """The standard deviation that both groups share if nothing changed."""
    squares = sum(variance(group) * (len(group) - 1) for group in (new, old) if len(group) > 1)
    return math.sqrt(squares / (len(new) + len(old) - 2))


def _predict(
    samples: Samples, new: list[float], old: list[float], step: float, alpha: float
) -> Comparison:
    center, noise, n = fmean(old), math.sqrt(variance(old)), len(old)
    error = noise * math.sqrt(1 + 1 / n)
    differences = [value - center for value in new]
    p_values = [_p_value(d, error, n - 1) for d in differences]
    breaches = [p <= alpha and d > step for p, d in zip(p_values, differences, strict=True)]
    gains = [_p_value(-d, error, n - 1) <= alpha and -d > step for d in differences]
    if len(new) > 1:
        p_values.append(_real(fmean(differences), _pooled(new, old), len(new), n))
    finding: Finding = "no_regression"
    needed: int | None = 0
    if all(breaches) and len(new) > 1 and p_values[-1] <= alpha:
        finding = "regression"
    elif all(breaches):
        finding = "suspected"
        needed = 1 if len(new) == 1 else _more_runs(fmean(differences), noise, 2, n, step, alpha)
    elif all(gains):
        finding = "improvement"
    spread = _Spread(noise * math.sqrt(1 / len(new) + 1 / n), n - 1)
    return _comparison(
        samples,
        finding,
        "prediction",
        fmean(differences),
        spread,
        noise,
        max(p_values),
        max(step, _quantile(1 - alpha, n - 1) * error),
        detectable(noise, n, len(new), step, alpha),
        needed,
        alpha,
    )


def _welch(
    samples: Samples, new: list[float], old: list[float], step: float, alpha: float
) -> Comparison:
    difference = fmean(new) - fmean(old)
    parts = variance(new) / len(new), variance(old) / len(old)
    error, freedom = math.sqrt(sum(parts)), float(len(new) + len(old) - 2)
    if error > 0:
        freedom = sum(parts) ** 2 / (
            parts[0] ** 2 / (len(new) - 1) + parts[1] ** 2 / (len(old) - 1)
        )
    noise = _pooled(new, old)
    matters = _p_value(difference - step, error, freedom)
    real = _real(difference, noise, len(new), len(old))
    gain = max(
        _p_value(-difference - step, error, freedom),
        _real(-difference, noise, len(new), len(old)),
    )
    finding: Finding = "no_regression"
    needed: int | None = 0
    if max(matters, real) <= alpha:
        finding = "regression"
    elif matters <= alpha:
        finding = "suspected"
        needed = _more_runs(difference, noise, len(new), len(old), step, alpha)
    elif gain <= alpha:
        finding = "improvement"
    return _comparison(
        samples,
        finding,
        "welch",
        difference,
        _Spread(error, freedom),
        noise,
        max(matters, real),
        step + _quantile(1 - alpha, freedom) * error,
        detectable(noise, len(old), len(new), step, alpha),
        needed,
        alpha,
    )


def _too_few(
    samples: Samples, new: list[float], old: list[float], step: float, alpha: float
) -> Comparison:
    n = len(old)
    difference = fmean(new) - fmean(old) if old else math.nan
    noise = math.sqrt(variance(old)) if n > 1 else None
    spread = None if noise is None else _Spread(noise * math.sqrt(1 / len(new) + 1 / n), n - 1)
    smallest = None if noise is None else detectable(noise, n, 1, step, alpha)
    needed = BASELINE_RUNS - n
    return _comparison(
        samples,
        "inconclusive",
        "none",
        difference,
        spread,
        noise,
        1.0,
        None,
        smallest,
        needed,
        alpha,
    )


def _comparison(
    samples: Samples,
    finding: Finding,
    rule: Rule,
    difference: float,
    spread: _Spread | None,
    noise: float | None,
    p_value: float,
    bound: float | None,
    smallest: float | None,
    needed: int | None,
    alpha: float,
) -> Comparison:
    plain = difference if samples.better == "lower" else -difference
    interval = None
    if spread is not None:
        half = _quantile(1 - alpha, spread.freedom) * spread.error
        interval = (_exp(plain - half), _exp(plain + half))
    return Comparison(
        finding=finding,
        rule=rule,
        ratio=_exp(plain),
        interval=interval,
        noise=noise,
        p_value=p_value,
        limit=None if bound is None else _limit(samples, bound),
        minimum_detectable_effect=(
            None if smallest is None else as_change(min(smallest, 700.0), samples.better)
        ),
        runs_needed=needed,
        new_runs=len(samples.new),
        baseline_runs=len(samples.baseline),
    )


def _limit(samples: Samples, bound: float) -> float:
    center = fmean(math.log(value) for value in samples.baseline)
    return _exp(center + bound if samples.better == "lower" else center - bound)


def _more_runs(
    difference: float, noise: float, new: int, old: int, step: float, alpha: float
) -> int | None:
    """New runs to add until a difference of this size would be called a regression."""
    for more in range(1, MOST_RUNS - new + 1):
        error = noise * math.sqrt(1 / (new + more) + 1 / old)
        matters = step + _quantile(1 - alpha, _expected_freedom(new + more, old)) * error
        real = _quantile(1 - alpha * REAL / ALPHA, new + more + old - 2) * error
        if max(matters, real) < difference:
            return more
    return None


def _check(samples: Samples) -> None:
    if not samples.new:
        raise ValueError("there is no new run to compare")
    if not 0 <= samples.floor < 1:
        raise ValueError(f"floor {samples.floor!r} must be a fraction from 0 to below 1")
    for value in (*samples.new, *samples.baseline):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"value {value!r} of a metric must be positive and finite")


def _p_value(difference: float, error: float, freedom: float) -> float:
    """One-sided: how often noise alone gives a difference this large or larger."""
    if error == 0:
        return 0.0 if difference > 0 else 1.0
    from scipy.special import stdtr

    return float(stdtr(freedom, -difference / error))


def _quantile(probability: float, freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def _normal(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


def _exp(value: float) -> float:
    return math.exp(max(-700.0, min(700.0, value))) if not math.isnan(value) else math.nan
