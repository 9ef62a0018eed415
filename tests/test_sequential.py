"""Adaptive repeats: false alarms in spite of many looks, runs saved, ends."""

import numpy as np
import pytest

from pytest_llmserve.verdict.regression import Samples, judge_new
from pytest_llmserve.verdict.sequential import MOST, decide, shares


def plan(rng, effect, noise, most=MOST, baseline=8, floor=0.03):
    old = np.exp(noise * rng.standard_normal(baseline))
    new = (1 + effect) * np.exp(noise * rng.standard_normal(most))
    for runs in range(1, most + 1):
        decision = decide({"x": Samples(new[:runs], old, "higher", floor)}, most)
        if decision.decided:
            return decision
    raise AssertionError("a plan ends with its last run")


def naive(rng, noise, most=MOST, baseline=8):
    old = np.exp(noise * rng.standard_normal(baseline))
    new = np.exp(noise * rng.standard_normal(most))
    return any(
        judge_new(new[:runs], old, "higher", 0.0).finding == "regression"
        for runs in range(2, most + 1)
    )


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
def test_looking_after_every_run_makes_no_false_alarms(noise):
    rng = np.random.default_rng(1)
    alarms = sum(plan(rng, 0.0, noise).finding == "regression" for _ in range(800))
    assert alarms <= 16  # 1 % of 800 is 8; more than 16 has a chance below 0.4 %


def test_the_looks_must_be_paid_for():
    rng = np.random.default_rng(2)
    careless = sum(naive(rng, 0.08) for _ in range(600))
    rng = np.random.default_rng(2)
    careful = sum(plan(rng, 0.0, 0.08, floor=0.0).finding == "regression" for _ in range(600))
    assert careful * 2 <= careless


def test_a_large_change_is_decided_early_and_saves_runs():
    rng = np.random.default_rng(3)
    decisions = [plan(rng, -0.3, 0.02) for _ in range(100)]
    assert all(d.finding == "regression" for d in decisions)
    assert np.mean([d.runs for d in decisions]) < 4
    assert all(d.saved == MOST - d.runs for d in decisions)


def test_a_change_well_inside_the_floor_ends_early_too():
    rng = np.random.default_rng(4)
    decisions = [plan(rng, 0.0, 0.003) for _ in range(100)]
    assert {d.finding for d in decisions} <= {"no_regression", "improvement"}
    assert np.mean([d.runs for d in decisions]) < 3


def test_repeats_find_what_one_run_does_not():
    rng = np.random.default_rng(5)
    found = sum(plan(rng, -0.10, 0.04).finding == "regression" for _ in range(200))
    rng = np.random.default_rng(5)
    alone = 0
    for _ in range(200):
        old = np.exp(0.04 * rng.standard_normal(8))
        new = 0.9 * np.exp(0.04 * rng.standard_normal(2))
        alone += judge_new(new, old, "higher", 0.03).finding == "regression"
    assert found > alone


@pytest.mark.parametrize("baseline", [5, 8, 20])
@pytest.mark.parametrize("most", [2, 3, 8, 20])
def test_the_looks_spend_all_of_the_error_and_no_more(baseline, most):
    parts = shares(baseline, most)
    assert len(parts) == most
    assert sum(parts) == pytest.approx(1.0)
    assert parts[0] == 0.0
    assert all(part >= 0 for part in parts)


def test_too_few_baseline_runs_end_the_plan_at_once():
    decision = decide({"x": Samples([1.0], [1.0, 1.1], "higher", 0.03)})
    assert decision.decided
    assert decision.finding == "inconclusive"


def test_one_suspicious_run_is_never_enough():
    decision = decide({"x": Samples([0.5], [1.0, 1.01, 0.99, 1.0, 1.0], "higher", 0.03)})
    assert not decision.decided
