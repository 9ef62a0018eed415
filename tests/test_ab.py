"""A against B: the order of runs, ratios, and what host drift does to them."""

import numpy as np
import pytest
from test_baseline_workflow import make

from pytest_llmserve.run import Check
from pytest_llmserve.verdict.ab import alternate, judge_ab
from pytest_llmserve.verdict.slo import at_least, at_most


def pairs(ratio, count=6, noise=0.01, drift=0.0, seed=0, **kind):
    rng = np.random.default_rng(seed)
    clock = iter(np.exp(drift * np.arange(2 * count) + noise * rng.standard_normal(2 * count)))
    return alternate(
        lambda: make(next(clock), **kind), lambda: make(ratio * next(clock), **kind), count
    )


def test_the_order_is_a_b_b_a():
    order = []
    found = alternate(lambda: order.append("A") or "a", lambda: order.append("B") or "b", 4)
    assert "".join(order) == "ABBAABBA"
    assert found == [("a", "b")] * 4


@pytest.mark.parametrize(
    ("ratio", "bound", "outcome"),
    [(1.3, 1.2, "pass"), (1.1, 1.2, "fail"), (1.2, 1.2, "inconclusive")],
)
def test_an_objective_is_on_the_ratio(ratio, bound, outcome):
    (verdict,) = judge_ab(pairs(ratio), [at_least("output_throughput", bound)])
    assert verdict.verdict == outcome
    assert verdict.measured == pytest.approx(ratio, rel=0.02)
    assert verdict.objective == f"B/A output_throughput >= {bound}"


def test_a_latency_objective_goes_the_other_way():
    (verdict,) = judge_ab(pairs(1.3), [at_most("ttft.p95", 0.9)])
    assert verdict.verdict == "pass"


def test_drift_of_the_host_does_not_decide():
    same = judge_ab(pairs(1.0, count=8, drift=-0.05))
    assert {v.verdict for v in same} == {"pass"}
    worse = judge_ab(pairs(0.8, count=8, drift=-0.05))
    assert {v.verdict for v in worse} == {"fail"}
    assert "worse than noise and the floor" in worse[0].reason


def test_two_pairs_are_too_few():
    for objectives in ([], [at_least("output_throughput", 1.0)]):
        verdict = judge_ab(pairs(1.0, count=2), objectives)[0]
        assert verdict.verdict == "inconclusive"
        assert "1 more is needed" in verdict.reason
    assert judge_ab([])[0].reason == "there are no pairs"


def test_invalid_runs_and_uncertified_percentiles_are_no_ground():
    spoilt = pairs(1.0, checks=[Check("client", False, "busy")])
    assert {v.verdict for v in judge_ab(spoilt)} == {"invalid"}
    assert judge_ab(spoilt, [at_least("output_throughput", 1)])[0].reason == "client: busy"
    few = judge_ab(pairs(1.0, n=50))
    assert [v.verdict for v in few] == ["pass", "inconclusive", "pass"]
    (missing,) = judge_ab(pairs(1.0), [at_most("e2e.p95", 1)])
    assert "could not be measured" in missing.reason
