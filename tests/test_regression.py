"""The rules that call a regression: error rates, power, invariances, exact small cases."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pytest_llmserve.verdict.regression import (
    Samples,
    as_change,
    judge_family,
    judge_new,
    judge_pairs,
    log_floor,
)

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.floats(1e-3, 1e4)
BASELINE = [1000, 1010, 990, 1005, 995]


def rates(effect, noise, *, new=1, baseline=5, floor=0.03, trials=1500, seed=0):
    """How often the rule (with its second run) says each finding at a true change."""
    rng = np.random.default_rng(seed)
    found = {}
    for _ in range(trials):
        old = np.exp(noise * rng.standard_normal(baseline))
        now = (1 + effect) * np.exp(noise * rng.standard_normal(max(new, 2)))
        said = judge_new(now[:new], old, "higher", floor).finding
        if new == 1 and said == "suspected":
            said = judge_new(now, old, "higher", floor).finding
        found[said] = found.get(said, 0) + 1 / trials
    return found


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.08, 0.15])
@pytest.mark.parametrize("new", [1, 3])
def test_an_unchanged_server_is_hardly_ever_called_worse(noise, new):
    # 1 % would give 15 of 1500; 27 or more has a chance below 0.3 % at exactly 1 %
    assert rates(0.0, noise, new=new).get("regression", 0) <= 27 / 1500


def test_a_tenth_less_is_found_and_a_hundredth_is_not():
    assert rates(-0.10, 0.015, trials=300)["regression"] > 0.97
    assert rates(-0.01, 0.015, trials=1000).get("regression", 0) < 0.02


@pytest.mark.parametrize(
    ("noise", "new", "baseline"), [(0.02, 1, 8), (0.05, 1, 20), (0.05, 3, 8), (0.02, 5, 5)]
)
def test_the_detectable_effect_is_detected_four_times_in_five(noise, new, baseline):
    rng = np.random.default_rng(5)
    smallest = np.mean(
        [
            judge_new(
                np.exp(noise * rng.standard_normal(new)),
                np.exp(noise * rng.standard_normal(baseline)),
                "higher",
                0.03,
            ).minimum_detectable_effect
            for _ in range(200)
        ]
    )
    power = rates(-smallest, noise, new=new, baseline=baseline, trials=800, seed=6)["regression"]
    assert 0.6 < power < 0.93


def test_one_new_run_is_judged_by_the_prediction_bound():
    logs = np.log(BASELINE)
    limit = math.exp(logs.mean() - stats.t.ppf(0.95, 4) * logs.std(ddof=1) * math.sqrt(1 + 1 / 5))
    assert judge_new([limit * 1.001], BASELINE, "higher", 0.0).finding == "no_regression"
    below = judge_new([limit * 0.999], BASELINE, "higher", 0.0)
    assert below.finding == "suspected"
    assert below.runs_needed == 1
    assert below.limit == pytest.approx(limit)


def test_only_both_breaches_are_a_regression():
    assert judge_new([900], BASELINE, "higher", 0.03).finding == "suspected"
    assert judge_new([900, 1000], BASELINE, "higher", 0.03).finding == "no_regression"
    assert judge_new([900, 905], BASELINE, "higher", 0.03).finding == "regression"


def test_what_is_within_the_floor_does_not_matter_however_sure():
    steady = [1000.0, 1000.1, 999.9, 1000.05, 999.95]
    assert judge_new([980, 980], steady, "higher", 0.03).finding == "no_regression"
    assert judge_new([980] * 5, steady, "higher", 0.03).finding == "no_regression"
    assert judge_new([960, 960], steady, "higher", 0.03).finding == "regression"


def test_welch_agrees_with_scipy():
    new, old = [0.60, 0.62, 0.65, 0.61], [0.50, 0.52, 0.51, 0.49, 0.53, 0.50]
    found = judge_new(new, old, "lower", 0.0)
    reference = stats.ttest_ind(np.log(new), np.log(old), equal_var=False)
    interval = reference.confidence_interval(0.90)
    assert found.rule == "welch"
    assert found.interval == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert found.finding == "regression"
    pooled = stats.ttest_ind(np.log(new), np.log(old), alternative="greater")
    assert found.p_value == pytest.approx(max(reference.pvalue / 2, 10 * pooled.pvalue))


def test_welch_needs_the_bound_beyond_the_floor():
    old = [100, 101, 99, 100, 100.5]
    assert judge_new([111, 112, 110], old, "lower", 0.10).finding == "no_regression"
    assert judge_new([116, 117, 115], old, "lower", 0.10).finding == "regression"


def test_a_suspicion_says_how_many_more_runs_would_decide():
    found = judge_new([800, 900, 760], [1000, 1100, 950, 1080, 900], "higher", 0.03)
    assert found.finding == "suspected"
    assert found.runs_needed >= 1


@pytest.mark.parametrize("runs", range(5))
def test_too_few_baseline_runs_are_inconclusive(runs):
    found = judge_new([1.0], BASELINE[:runs], "higher", 0.03)
    assert found.finding == "inconclusive"
    assert found.runs_needed == 5 - runs
    assert (found.minimum_detectable_effect is None) == (runs < 2)
    assert (found.noise is None) == (runs < 2)


def test_deterministic_runs_have_no_noise_and_no_trouble():
    same = [7.0] * 6
    assert judge_new([7.0], same, "higher", 0.0).finding == "no_regression"
    assert judge_new([7.0] * 3, same, "lower", 0.03).finding == "no_regression"
    assert judge_new([6.0, 6.0], same, "higher", 0.03).finding == "regression"
    assert judge_new([6.0] * 3, same, "higher", 0.03).finding == "regression"
    assert judge_new([8.0] * 3, same, "higher", 0.03).finding == "improvement"


@pytest.mark.parametrize(
    ("new", "baseline", "floor"),
    [
        ([], [1] * 5, 0.1),
        ([0], [1] * 5, 0.1),
        ([1], [1, -1], 0.1),
        ([math.nan], [1], 0.1),
        ([1], [1], 1.0),
    ],
)
def test_what_has_no_logarithm_is_refused(new, baseline, floor):
    with pytest.raises(ValueError, match=r"must be|no new run"):
        judge_new(new, baseline, "higher", floor)


@relaxed
@given(
    st.lists(VALUES, min_size=1, max_size=6),
    st.lists(VALUES, min_size=0, max_size=9),
    st.floats(1e-2, 1e2),
)
def test_units_do_not_matter(new, old, scale):
    one = judge_new(new, old, "lower", 0.05)
    two = judge_new([v * scale for v in new], [v * scale for v in old], "lower", 0.05)
    assume(abs(one.p_value - 0.05) > 1e-6)
    assert one.finding == two.finding
    if old:
        assert one.ratio == pytest.approx(two.ratio, rel=1e-6)


@relaxed
@given(st.lists(VALUES, min_size=1, max_size=6), st.lists(VALUES, min_size=5, max_size=9))
def test_less_throughput_is_more_time_per_token(new, old):
    rate = judge_new(new, old, "higher", 0.0)
    time = judge_new([1 / v for v in new], [1 / v for v in old], "lower", 0.0)
    assume(abs(rate.p_value - 0.05) > 1e-6)
    assert rate.finding == time.finding
    assert rate.ratio == pytest.approx(1 / time.ratio, rel=1e-6)


@relaxed
@given(
    st.lists(VALUES, min_size=1, max_size=2),
    st.lists(VALUES, min_size=5, max_size=9),
    st.floats(1.0, 2.0),
)
def test_worse_runs_are_never_judged_better(new, old, factor):
    order = ["improvement", "no_regression", "suspected", "regression"]
    one = judge_new(new, old, "lower", 0.05).finding
    two = judge_new([v * factor for v in new], old, "lower", 0.05).finding
    assert order.index(two) >= order.index(one)


@given(st.floats(0, 0.9), st.sampled_from(["higher", "lower"]))
def test_changes_and_logs_are_inverse(change, better):
    assert as_change(log_floor(change, better), better) == pytest.approx(change, abs=1e-12)


def test_many_metrics_have_the_error_of_one():
    rng = np.random.default_rng(3)
    trials, alone, together = 700, 0, 0
    for _ in range(trials):
        family = {
            str(i): Samples(
                np.exp(0.08 * rng.standard_normal(4)),
                np.exp(0.08 * rng.standard_normal(6)),
                "lower",
                0.0,
            )
            for i in range(8)
        }
        together += any(c.finding == "regression" for c in judge_family(family).values())
        alone += any(
            judge_new(s.new, s.baseline, s.better, s.floor).finding == "regression"
            for s in family.values()
        )
    assert together / trials <= 0.022
    assert alone > 2 * together


def test_holm_steps_down():
    def sample(shift):
        return Samples(
            [v * (1 + shift) for v in (100, 101, 99)], [100, 101, 99, 100.5, 99.5], "lower", 0.0
        )

    family = {"same": sample(0.0), "worse": sample(0.06), "much worse": sample(0.2)}
    found = judge_family(family)
    assert list(found) == list(family)
    assert [c.finding for c in found.values()] == ["no_regression", "regression", "regression"]


def test_a_family_of_one_is_the_metric_alone():
    sample = Samples([900], BASELINE, "higher", 0.03)
    assert judge_family({"x": sample})["x"] == judge_new([900], BASELINE, "higher", 0.03)


def test_pairs_cancel_the_drift_of_the_host():
    drift = [1.0, 0.8, 1.3, 0.7, 1.5]
    same = judge_pairs([(100 * d, 100.5 * d) for d in drift], "higher", 0.03)
    assert same.finding == "no_regression"
    worse = judge_pairs(
        [(100 * d, 85 * d * n) for d, n in zip(drift, (1, 1.01, 0.99, 1.005, 1), strict=True)],
        "higher",
        0.03,
    )
    assert worse.finding == "regression"
    assert worse.ratio == pytest.approx(0.85, rel=0.01)
    unpaired = judge_new([85 * d for d in drift], [100 * d for d in drift], "higher", 0.03)
    assert unpaired.finding == "no_regression"


def test_pairs_judge_both_ways_and_need_three():
    pairs = [(1.0, 0.70), (1.1, 0.78), (0.9, 0.62), (1.0, 0.71)]
    assert judge_pairs(pairs, "lower", 0.05).finding == "improvement"
    assert judge_pairs(pairs, "higher", 0.05).finding == "regression"
    few = judge_pairs(pairs[:2], "lower", 0.05)
    assert few.finding == "inconclusive"
    assert few.runs_needed == 1


@pytest.mark.parametrize("pairs", [3, 5])
def test_pairs_of_the_same_are_hardly_ever_called_different(pairs):
    rng = np.random.default_rng(8)
    findings = []
    for _ in range(1500):
        logs = 0.08 * rng.standard_normal((pairs, 2))
        findings.append(judge_pairs([tuple(np.exp(row)) for row in logs], "lower", 0.0).finding)
    assert findings.count("regression") <= 27
    assert findings.count("improvement") <= 27
