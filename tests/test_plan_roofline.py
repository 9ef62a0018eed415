"""The `roofline` figure of a run, and how amounts are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.emulator.catalog import load_hardware, load_model
from pytest_llmserve.metrics.arithmetic import amount, roofline
from pytest_llmserve.metrics.roofline import Precision

QWEN, SPARK = load_model("qwen3-8b"), load_hardware("dgx-spark")
NVFP4 = Precision("nvfp4", "fp8")


def test_a_published_figure_against_its_ceiling() -> None:
    # FACTS: NVFP4, 30 users at a context of 512: the ceiling is 1,303 tok/s, and 70 % of it 912.
    found = roofline(QWEN, SPARK, NVFP4, rate=912, sequences=30, context=512)
    assert found.ceiling == pytest.approx(1303, abs=1)
    assert found.share == pytest.approx(0.70, abs=0.001)
    assert found.bound == "bandwidth"
    shown = [str(line) for line in found.lines]
    assert shown[-1] == "roofline: 912 tok/s / 1,303 tok/s = 70.0 %"
    assert shown[-3] == "ceiling (bandwidth binds): 30 / 23.0 ms = 1,303 tok/s"


def test_many_sequences_are_bound_by_compute() -> None:
    found = roofline(QWEN, SPARK, Precision("bf16", "fp8"), rate=100, sequences=2000, context=1)
    assert found.bound == "compute"
    assert found.ceiling == pytest.approx(125e12 / 15.14e9, rel=0.01)


def test_speculation_raises_the_ceiling_by_what_it_makes() -> None:
    plain = roofline(QWEN, SPARK, NVFP4, rate=900, sequences=29.7, context=192)
    guessing = roofline(QWEN, SPARK, NVFP4, rate=900, sequences=29.7, context=192, made=2.5,
                        drafts=3)  # fmt: skip
    assert guessing.ceiling == pytest.approx(2.5 * plain.ceiling)
    assert guessing.share == pytest.approx(plain.share / 2.5)


@given(
    rate=st.floats(0, 1e6),
    sequences=st.floats(0.1, 1e4),
    context=st.floats(0, 1e5),
)
def test_the_share_is_the_rate_by_the_ceiling(rate: float, sequences: float, context: float):
    found = roofline(QWEN, SPARK, NVFP4, rate=rate, sequences=sequences, context=context)
    assert found.share == rate / found.ceiling
    by_name = {line.name: line.value for line in found.lines}
    slower = max(by_name["bandwidth_time"], by_name["compute_time"])
    assert found.ceiling == pytest.approx(sequences / slower)
    assert (by_name["bandwidth_time"] >= by_name["compute_time"]) == (found.bound == "bandwidth")


@pytest.mark.parametrize(
    "wrong",
    [{"rate": -1.0}, {"sequences": 0.0}, {"context": -1.0}, {"made": 0.5}, {"made": 2.0},
     {"rate": float("nan")}],
)  # fmt: skip
def test_figures_that_no_run_can_have(wrong: dict[str, float]) -> None:
    given = {"rate": 1.0, "sequences": 1.0, "context": 1.0, **wrong}
    with pytest.raises(ValueError, match="no run has"):
        roofline(QWEN, SPARK, NVFP4, **given)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (5.15e9, "B", "5.15 GB"), (73_728, "B", "73.7 kB"), (999.0, "B", "999 B"),
        (0.0204, "s", "20.4 ms"), (9.15e-4, "s", "915 µs"), (0.0, "s", "0.00 µs"),
        (2.5, "s", "2.50 s"), (5e14, "FLOP/s", "500 TFLOP/s"), (0.0, "B", "0.00 B"),
        (1013.97, "tok/s", "1,014 tok/s"), (12.57, "tok/s", "12.6 tok/s"), (5425, "users",
        "5,425 users"), (0.7, "", "70.0 %"), (-2e9, "B", "-2.00 GB"),
    ],
)  # fmt: skip
def test_amounts(value: float, unit: str, shown: str) -> None:
    assert amount(value, unit) == shown
