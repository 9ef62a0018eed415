from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from pytest_llmserve.metrics.percentiles import PERCENTILES, describe, least_samples, ranks


def test_the_least_samples_are_those_of_the_document():
    assert [least_samples(p) for p in (0.5, 0.9, 0.95, 0.99)] == [11, 64, 130, 662]


@given(st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_least_samples_is_where_two_lie_beyond(p):
    n = least_samples(p)
    assert binom.cdf(n - 2, n, p) >= 0.99
    assert binom.cdf(n - 3, n - 1, p) < 0.99


@given(st.integers(1, 5000), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_ranks_are_the_tightest_that_cover(n, p):
    low, high = ranks(n, p)
    tail = 0.005
    if low is not None:
        assert binom.cdf(low - 1, n, p) <= tail
    assert binom.cdf(low or 0, n, p) > tail
    if high is not None:
        assert binom.sf(high - 1, n, p) <= tail * (1 + 1e-9)
        assert binom.sf(high - 2, n, p) > tail
    else:
        assert binom.sf(n - 1, n, p) > tail


@pytest.mark.parametrize("draw", ["exponential", "standard_cauchy", "uniform"])
def test_intervals_cover_the_truth_as_often_as_they_say(draw):
    random = np.random.default_rng(1)
    true = {
        "exponential": lambda p: -np.log(1 - p),
        "standard_cauchy": lambda p: np.tan(np.pi * (p - 0.5)),
        "uniform": lambda p: p,
    }[draw]
    n, tries = 700, 1500
    hits = dict.fromkeys(PERCENTILES, 0)
    for _ in range(tries):
        found = describe(getattr(random, draw)(size=n))
        for name, p in PERCENTILES.items():
            low, high = found["ci"][name]
            hits[name] += low <= true(p) <= high
    for count in hits.values():
        assert binomtest(count, tries, 0.99, alternative="less").pvalue > 1e-4


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_percentiles_are_numpys(samples):
    found = describe(np.array([*samples, np.nan]))
    for name, p in PERCENTILES.items():
        assert found[name] == pytest.approx(np.percentile(samples, 100 * p), abs=1e-6)
    assert found["n"] == len(samples)
    assert found["max"] == max(samples)
    assert found["mean"] == pytest.approx(np.mean(samples), abs=1e-6)
    assert found["certified"] == [
        name for name, p in PERCENTILES.items() if len(samples) >= least_samples(p)
    ]


def test_nothing_measured_is_none_and_never_nan():
    found = describe(np.array([np.nan]))
    assert found["n"] == 0
    assert found["p50"] is found["mean"] is found["max"] is None
    assert describe(np.array([1.0]))["ci"]["p99"] == [None, None]
