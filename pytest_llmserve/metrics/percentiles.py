"""Percentiles of raw samples, with confidence intervals that assume no distribution.

If n samples are independent, the number of them at or below the true p-quantile is binomial
(n, p). So the l-th and u-th smallest sample enclose it with probability P(l ≤ B < u), whatever
the distribution is. (David & Nagaraja, Order Statistics, section 7.1.) Samples of one run are
not quite independent; the interval says how far the sample alone carries, not how far one run
differs from the next, for which METRICS.md compares runs.

A percentile is *certified* from so many samples that, with 99 % confidence, at least two of them
lie beyond it: 1 − pⁿ − n·pⁿ⁻¹·(1 − p) ≥ 0.99. Its upper bound is then a sample that was seen and
not the single largest one. That gives 64 for p90, 130 for p95 and 662 for p99.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import bdtr

if TYPE_CHECKING:
    from pytest_llmserve.load.record import Array

CONFIDENCE = 0.99
PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


@functools.cache
def least_samples(p: float, confidence: float = CONFIDENCE) -> int:
    """The fewest samples from which the p-quantile is certified (module's text)."""
    beyond = max(p, 1.0 - p)
    n = 2
    while 1.0 - beyond**n - n * beyond ** (n - 1) * (1.0 - beyond) < confidence:
        n += 1
    return n


@functools.cache
def ranks(n: int, p: float, confidence: float = CONFIDENCE) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the samples that enclose the p-quantile with `confidence` or more.

    At most (1 − confidence)/2 is left out on each side. None: not even the smallest (largest)
    sample is surely low (high) enough.
    """
    tail = (1.0 - confidence) / 2
    spread = math.sqrt(n * p * (1 - p))
    low = max(0, math.floor(n * p - 6 * spread) - 2)
    high = min(n, math.ceil(n * p + 6 * spread) + 2)
    below = bdtr(np.arange(low, high + 1, dtype=float), n, p)  # P(B ≤ k)
    lower = low + int(np.searchsorted(below, tail, side="right"))
    upper = low + int(np.searchsorted(below, 1.0 - tail, side="left")) + 1
    return (lower if lower >= 1 else None), (upper if upper <= n else None)


def describe(samples: Array) -> dict[str, Any]:
    """Mean, p50 … p99 (linear interpolation), max and n of the samples that are not NaN.

    `ci` holds for each percentile [low, high] with 99 % confidence (None: open on that side),
    `certified` the percentiles that have samples enough. Without samples the values are None.
    """
    values = np.sort(samples[~np.isnan(samples)].astype(np.float64))
    n = len(values)
    if not n:
        empty: dict[str, Any] = dict.fromkeys(("mean", *PERCENTILES, "max"))
        return {**empty, "n": 0, "ci": {}, "certified": []}
    interpolated = _at(values, list(PERCENTILES.values()))
    bounds = {name: ranks(n, p) for name, p in PERCENTILES.items()}
    return {
        "mean": float(values.mean()),
        **dict(zip(PERCENTILES, interpolated, strict=True)),
        "max": float(values[-1]),
        "n": n,
        "ci": {
            name: [None if rank is None else float(values[rank - 1]) for rank in pair]
            for name, pair in bounds.items()
        },
        "certified": [name for name, p in PERCENTILES.items() if n >= least_samples(p)],
    }


def _at(ordered: Array, quantiles: list[float]) -> list[float]:
    position = np.asarray(quantiles) * (len(ordered) - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, len(ordered) - 1)
    part = position - low
    return [float(x) for x in ordered[low] * (1 - part) + ordered[high] * part]
