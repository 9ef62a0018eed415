"""When the requests of a plan are to start, all decided beforehand from the seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_llmserve.load.files import read_trace
from pytest_llmserve.load.plan import ClosedLoop, OpenLoop, Trace

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.load.record import Array


def user_starts(plan: LoadPlan) -> Array:
    """When each user of a closed loop starts: seconds from the plan's start, spread evenly."""
    assert isinstance(plan.arrivals, ClosedLoop)
    return np.arange(plan.arrivals.users) * (plan.lead / plan.arrivals.users)


def arrival_times(plan: LoadPlan) -> Array:
    """Arrivals of an open loop, lead-in included: seconds from the plan's start, ascending.

    A process of rate 1 (constant, Poisson or gamma gaps) is run in the time that counts expected
    arrivals and then carried to clock time by inverting the integral of the rate.
    """
    arrivals, end = plan.arrivals, plan.lead + plan.duration
    if isinstance(arrivals, Trace):
        times = np.array([row.at for row in read_trace(arrivals.file)]) * arrivals.scale
        inside: Array = times[times < end]
        return inside
    assert isinstance(arrivals, OpenLoop)
    knots, expected = _expected(arrivals, plan.lead, end)
    total = float(expected[-1])
    random = np.random.default_rng([plan.seed, 0x0A])
    if arrivals.arrivals == "constant":
        counts = np.arange(int(np.ceil(total - 1e-9)), dtype=float)
    elif arrivals.arrivals == "poisson":
        # Given how many arrivals it has, a Poisson process is that many uniform times in order.
        counts = np.sort(random.uniform(0.0, total, random.poisson(total)))
    else:
        counts = _gamma(random, arrivals.burstiness, total)
    return _inverse(counts, knots, expected, arrivals, plan.lead)


def _gamma(random: np.random.Generator, burstiness: float, total: float) -> Array:
    """Arrivals in [0, total) whose gaps have mean 1 and variance `burstiness`."""
    parts, reached = [], 0.0
    while reached < total:
        gaps = random.gamma(1.0 / burstiness, burstiness, int(total - reached) + 100)
        parts.append(reached + np.cumsum(gaps))
        reached = float(parts[-1][-1])
    counts = np.concatenate(parts) if parts else np.empty(0)
    inside: Array = counts[counts < total]
    return inside


def _rates(arrivals: OpenLoop, knots: Array, lead: float) -> Array:
    """The rate just after each of `knots` (seconds from the plan's start)."""
    if not arrivals.profile:
        return np.full(len(knots), arrivals.rate)
    at = np.array([time for time, _ in arrivals.profile]) + lead
    rates = np.array([rate for _, rate in arrivals.profile])
    if arrivals.between == "ramp":
        return np.asarray(np.interp(knots, at, rates))
    held: Array = rates[np.maximum(np.searchsorted(at, knots, side="right") - 1, 0)]
    return held


def _expected(arrivals: OpenLoop, lead: float, end: float) -> tuple[Array, Array]:
    """Times at which the rate changes its course, and the arrivals expected by then."""
    inner = [time + lead for time, _ in arrivals.profile if 0.0 < time + lead < end]
    knots = np.array([0.0, *inner, end])
    rates = _rates(arrivals, knots, lead)
    lengths = np.diff(knots)
    if arrivals.profile and arrivals.between == "ramp":
        areas = (rates[1:] + rates[:-1]) / 2 * lengths
    else:
        areas = rates[:-1] * lengths
    return knots, np.concatenate([[0.0], np.cumsum(areas)])


def _inverse(
    counts: Array, knots: Array, expected: Array, arrivals: OpenLoop, lead: float
) -> Array:
    """When so many arrivals are expected: the inverse of the integral of the rate."""
    piece = np.clip(np.searchsorted(expected, counts, side="right") - 1, 0, len(knots) - 2)
    rest = counts - expected[piece]
    length = np.diff(knots)[piece]
    area = np.diff(expected)[piece]
    if not (arrivals.profile and arrivals.between == "ramp"):
        return np.asarray(knots[piece] + rest / area * length)
    rates = _rates(arrivals, knots, lead)
    begin, slope = rates[piece], np.diff(rates)[piece] / length
    # begin·t + slope·t²/2 = rest, in the form that is exact for a slope of 0 too
    root = np.sqrt(np.maximum(begin * begin + 2 * slope * rest, 0.0))
    return np.asarray(knots[piece] + 2 * rest / np.maximum(begin + root, 1e-300))
