"""How figures are shown: the right unit, no lost digits, columns that line up."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.report.console import align
from pytest_llmserve.report.digest import objectives, split_objective
from pytest_llmserve.report.units import show, show_margin, show_time

FACTORS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("ttft.p95", 0.2, "200 ms"),
        ("ttft.p95", 1.234, "1.23 s"),
        ("ttft.sum", 1.234, "1.23 s"),
        ("ttft.count", 200.0, "200"),
        ("itl.p99", 0.00003, "30 µs"),
        ("e2e.max", 1234.5, "1,234.5 s"),
        ("output_throughput", 1021.34, "1,021 tok/s"),
        ("user_throughput.p50", 34.12, "34.12 tok/s"),
        ("request_throughput", 0.5, "0.500 req/s"),
        ("concurrency.max", 30.0, "30"),
        ("ttft.p95", None, "–"),
        ("ttft.p95", math.nan, "–"),
    ],
)
def test_units(metric, value, shown):
    assert show(metric, value) == shown


@given(st.floats(1e-6, 1e5))
def test_a_shown_time_is_within_one_percent_of_the_measured_one(seconds):
    number, unit = show_time(seconds).replace(",", "").split()
    assert float(number) * FACTORS[unit] == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize(
    ("relation", "measured", "bound", "shown"),
    [
        (">=", 1020.0, 1000.0, "+2.0 %"),
        (">=", 900.0, 1000.0, "-10.0 %"),
        ("<=", 0.25, 0.5, "+50.0 %"),
        ("<=", 0.6, 0.5, "-20.0 %"),
        ("<=", None, 0.5, "–"),
        ("<=", 0.1, 0.0, "–"),
    ],
)
def test_a_positive_margin_is_always_the_good_side(relation, measured, bound, shown):
    assert show_margin(relation, measured, bound) == shown


@given(st.lists(st.tuples(st.text("ab1 ", max_size=9), st.text("xyz", max_size=9)), min_size=1))
def test_columns_line_up(rows):
    lines = align(rows, "<>")
    width = max(len(row[0]) for row in rows)
    for (left, right), line in zip(rows, lines, strict=True):
        assert line == line.rstrip()
        assert line[:width].rstrip() == left.rstrip()
        assert line.endswith(right)


def test_objectives_are_taken_apart():
    assert split_objective("ttft.p95 <= 0.5") == ("ttft.p95", "<=")
    assert split_objective("output_throughput >= 1000") == ("output_throughput", ">=")
    assert split_objective("baseline ttft.p95")[1] == ""
    assert not re.search(r"[<>]", split_objective("baseline ttft.p95")[0])


@pytest.mark.parametrize(
    ("objective", "measured", "bound", "shown"),
    [
        ("baseline output_throughput", 4705.0, 4405.0, ("≥ 4,405 tok/s", "+6.8 %")),
        ("drift ttft.p95", 0.08, 0.064, ("≤ 64 ms", "-25.0 %")),
        ("baseline ttft.p95", 0.05, None, ("–", "–")),
    ],
)
def test_a_comparison_has_its_margin_on_the_good_side_too(objective, measured, bound, shown):
    verdict = {"objective": objective, "measured": measured, "bound": bound, "verdict": "pass"}
    (found,) = objectives({"verdicts": [verdict | {"reason": ""}]})
    assert (found.bound, found.margin) == shown
