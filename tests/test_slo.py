"""Objectives: construction, the four outcomes, and what a missed one explains."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.load.plan import LoadPlan, closed_loop
from pytest_llmserve.run import Check, Run
from pytest_llmserve.servers import Server, ServerConfig
from pytest_llmserve.verdict.slo import (
    MINIMUM_SAMPLES,
    Objective,
    at_least,
    at_most,
    judge,
    known_metrics,
    worst,
)


def make_run(metrics, *, checks=(), server_metrics=None):
    server = Server(ServerConfig("s", "vllm"), "http://127.0.0.1:1", "m", "vllm")
    plan = LoadPlan(closed_loop(4))
    return Run("t.py::t", server, plan, metrics, tuple(checks), {}, server_metrics or {})


def ttft(value=0.63, n=1000, **more):
    return {"ttft": {"p50": value / 2, "p95": value, "p99": value, "n": n, **more}}


def one(run, objective):
    (verdict,) = judge(run, [objective])
    return verdict


def test_an_objective_reads_as_it_is_meant():
    assert str(at_most("ttft.p95", 0.5)) == "ttft.p95 <= 0.5"
    assert str(at_least("output_throughput", 1000)) == "output_throughput >= 1000"


@pytest.mark.parametrize("name", known_metrics())
def test_every_metric_may_be_asked_for(name):
    assert at_least(name, 1).metric == name


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: at_most("tftt.p95", 1), "did you mean ttft.p95"),
        (lambda: at_least("throughput", 1), "output_throughput"),
        (lambda: at_most("ttft", 1), "is a group: name one of ttft.mean"),
        (lambda: at_least("users", 30), "concurrency.max"),
        (lambda: at_most("server.preemption", 0), "did you mean server.preemptions"),
        (lambda: at_most("preemptions", 0), "server.preemptions"),
        (lambda: at_most("server.waiting", 0), "is a group: name one of server.waiting.mean"),
        (lambda: at_most("gpu.power.p95", 0), "gpu.power.m"),
        (lambda: at_least("zzz", 1), "use one of output_throughput"),
        (lambda: at_most("ttft.p95", float("nan")), "finite"),
        (lambda: at_most("ttft.p95", float("inf")), "finite"),
        (lambda: at_most("ttft.p95", "0.5"), "must be a number"),
        (lambda: at_most("ttft.p95", True), "must be a number"),
        (lambda: at_most(95, 1), "named by a string"),
        (lambda: Objective("ttft.p95", "<", 1), "write '>=' or '<='"),
    ],
)
def test_what_cannot_be_judged_is_refused_at_once(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("objective", "outcome"),
    [
        (at_most("ttft.p95", 0.7), "pass"),
        (at_most("ttft.p95", 0.63), "pass"),
        (at_most("ttft.p95", 0.5), "fail"),
        (at_least("ttft.p95", 0.5), "pass"),
        (at_least("ttft.p95", 0.7), "fail"),
        (at_most("e2e.p95", 1.0), "inconclusive"),
    ],
)
def test_outcomes(objective, outcome):
    assert one(make_run(ttft()), objective).verdict == outcome


def test_a_value_that_is_not_a_number_is_inconclusive():
    verdict = one(make_run({"output_throughput": float("nan")}), at_least("output_throughput", 1))
    assert verdict.verdict == "inconclusive"
    assert verdict.measured is None


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        ("server.acceptance_rate", "vllm does not show it in its metrics"),
        ("gpu.power.mean", "there is no GPU"),
        ("energy_per_token", "there is no GPU"),
        ("roofline", "nobody knows this chip"),
    ],
)
def test_what_could_not_be_measured_is_inconclusive_with_its_reason(metric, why):
    run = replace(
        make_run({"server": {"acceptance_rate": None}, "roofline": None}),
        telemetry={"reason": "there is no GPU"},
        roofline={"reason": "nobody knows this chip"},
    )
    verdict = one(run, at_least(metric, 1))
    assert (verdict.verdict, verdict.measured) == ("inconclusive", None)
    assert why in verdict.reason


@pytest.mark.parametrize(("statistic", "needed"), MINIMUM_SAMPLES.items())
def test_a_percentile_needs_its_samples(statistic, needed):
    def outcome(n):
        run = make_run({"ttft": {statistic: 0.1, "n": n}})
        return one(run, at_most(f"ttft.{statistic}", 0.5))

    assert outcome(needed).verdict == "pass"
    short = outcome(needed - 1)
    assert short.verdict == "inconclusive"
    assert f"{needed:,}" in short.reason


def test_the_minima_are_those_of_the_percentiles():
    from pytest_llmserve.metrics.percentiles import PERCENTILES, least_samples

    assert dict(MINIMUM_SAMPLES) == {name: least_samples(p) for name, p in PERCENTILES.items()}


def test_what_the_metrics_call_certified_decides():
    listed = make_run(ttft(n=5, certified=["p95"]))
    assert one(listed, at_most("ttft.p95", 1)).verdict == "pass"
    unlisted = make_run(ttft(n=5000, certified=["p50"]))
    assert one(unlisted, at_most("ttft.p95", 1)).verdict == "inconclusive"


def test_too_few_samples_neither_pass_nor_fail():
    assert one(make_run(ttft(n=20)), at_most("ttft.p95", 0.1)).verdict == "inconclusive"


def test_an_invalid_run_proves_nothing():
    checks = [Check("concurrency", False, "21 of 30 users"), Check("errors", True, "none")]
    verdicts = judge(
        make_run(ttft(), checks=checks), [at_most("ttft.p95", 9), at_least("e2e.p50", 9)]
    )
    assert [v.verdict for v in verdicts] == ["invalid", "invalid"]
    assert all("concurrency: 21 of 30 users" in v.reason for v in verdicts)
    assert all("errors" not in v.reason for v in verdicts)


def test_a_missed_objective_says_how_far_and_what_went_with_it():
    run = make_run(
        {**ttft(ci={"p95": [0.60, 0.66]}), "send_delay": {"p99": 0.2}},
        server_metrics={
            "queue_time.sum": 12.0,
            "queue_time.count": 100,
            "series": {"waiting": [0.0, 17.0, float("nan")], "kv_usage": [0.5, 0.98]},
            "preemptions": 3,
            "prefix_queries": 1000,
            "prefix_hits": 250,
        },
    )
    reason = one(run, at_most("ttft.p95", 0.5)).reason
    for part in (
        "630 ms measured",
        "130 ms (26.0 %) over the bound of 500 ms",
        "4.3 times the half-width",
        "queued 120 ms",
        "up to 17 requests waited",
        "3 preemptions",
        "25% of prompt tokens",
        "KV cache up to 98% full",
        "client sent up to 200 ms late",
    ):
        assert part in reason


def test_nothing_is_said_of_what_is_not_known():
    reason = one(make_run(ttft()), at_most("ttft.p95", 0.5)).reason
    assert ";" not in reason
    assert "half-width" not in reason


def test_a_zero_bound_has_no_relative_margin():
    run = make_run({"errors": {"refused": 3}})
    assert one(run, at_most("errors.refused", 0)).reason == "3 measured is 3 over the bound of 0"


def test_thirty_users():
    run = make_run({"concurrency": {"mean": 29.4, "max": 30}})
    assert one(run, at_least("concurrency.max", 30)).verdict == "pass"
    assert one(run, at_least("concurrency.mean", 30)).verdict == "fail"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_at_least_and_at_most_divide_the_line(measured, bound):
    run = make_run({"output_throughput": measured})
    low, high = judge(
        run, [at_least("output_throughput", bound), at_most("output_throughput", bound)]
    )
    assert (low.verdict == "pass") == (measured >= bound)
    assert (high.verdict == "pass") == (measured <= bound)


def test_the_worst_verdict_decides():
    run = make_run(ttft())
    good, bad, open_ = judge(
        run, [at_most("ttft.p95", 1), at_most("ttft.p95", 0.1), at_most("e2e.p95", 1)]
    )
    assert worst([good]) == "pass"
    assert worst([good, open_]) == "inconclusive"
    assert worst([open_, bad, good]) == "fail"
    assert worst([]) is None


def test_objectives_import_nothing_heavy():
    code = (
        "import sys, pytest_llmserve.verdict.slo as s; s.at_most('ttft.p95', 1); "
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"numpy", "scipy", "yaml", "jsonschema", "psutil"} & set(loaded.stdout.split())


def test_a_missed_objective_tells_of_capped_power():
    run = make_run({"output_throughput": 10.0, "gpu": {"power_capped": 0.75}})
    assert (
        "power was capped in 75% of the window"
        in one(run, at_least("output_throughput", 20)).reason
    )
