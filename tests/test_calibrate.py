"""Calibration: noise, what a gate would make of it, and proposals."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compare import NOISE, result, run

from pytest_llmserve.cli import main
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.verdict.baseline import Tracked
from pytest_llmserve.verdict.calibrate import as_text, calibrate, proposed_floor, proposed_repeats

THROUGHPUT = Tracked("output_throughput", "higher", 0.03)
TTFT = Tracked("ttft.p95", "lower", 0.10)


def values(noise, runs, seed=0):
    return list(1000 * np.exp(noise * np.random.default_rng(seed).standard_normal(runs)))


def test_the_noise_is_found_and_its_interval_holds_it():
    inside = 0
    for seed in range(200):
        found = calibrate_noise(values(0.05, 10, seed))
        inside += found[0] <= 0.05 <= found[1]
    assert 160 < inside < 196  # a 90 % interval of 200


def calibrate_noise(runs):
    from pytest_llmserve.verdict.calibrate import _interval

    noise = float(np.std(np.log(runs), ddof=1))
    return _interval(noise, len(runs))


def test_a_quiet_metric_needs_one_run_and_a_loud_one_more():
    quiet, loud = calibrate(values(0.01, 10), THROUGHPUT), calibrate(values(0.08, 10), THROUGHPUT)
    assert quiet.false_alarms <= 0.02
    assert loud.false_alarms <= 0.02
    assert quiet.power[0.10] > 0.95
    assert loud.power[0.10] < 0.5
    assert list(quiet.power.values()) == sorted(quiet.power.values())
    assert quiet.proposed_repeats == 1
    assert loud.proposed_repeats is None or loud.proposed_repeats > 3
    assert quiet.proposed_floor < loud.proposed_floor
    assert quiet.detectable < 0.07 < loud.detectable


def test_proposals():
    assert proposed_floor(0.0) == 0.01
    assert proposed_floor(0.015) == 0.03
    assert proposed_floor(0.0151) == 0.04
    assert proposed_repeats(0.01, 10, TTFT) == 1  # of 20 %: its floor hides 10 %
    assert proposed_repeats(0.5, 10, THROUGHPUT) is None


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(0.001, 0.3), st.floats(1.0, 3.0))
def test_more_noise_never_needs_fewer_repeats(noise, factor):
    less, more = (proposed_repeats(n, 10, THROUGHPUT) or 99 for n in (noise, noise * factor))
    assert less <= more


@pytest.mark.parametrize(
    ("runs", "said"), [([1.0, 2.0], "3 or more"), ([1.0, 0.0, 2.0], "no positive value")]
)
def test_what_cannot_be_calibrated_is_said(runs, said):
    with pytest.raises(ConfigError, match=said):
        calibrate(runs, THROUGHPUT)


def test_the_table_names_each_metric():
    text = as_text([calibrate(values(0.02, 8), THROUGHPUT), calibrate(values(0.02, 8), TTFT)])
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert "output_throughput" in lines[2]
    assert "for twice the floor" in lines[-1]


def test_the_command_reads_results(tmp_path, capsys):
    path = result(tmp_path / "a.json", *(run(math.exp(n)) for n in NOISE), run(9.0, ok=False))
    assert main(["calibrate", "--results", str(path), "--metric", "output_throughput"]) == 0
    said = capsys.readouterr().out
    assert "t.py::test_x closed-30" in said
    assert "| output_throughput | 6 " in said
    assert "an invalid run" in said


def test_emulated_noise_says_so(tmp_path, capsys):
    path = result(tmp_path / "a.json", *(run(emulated=True) for _ in range(3)))
    assert main(["calibrate", "--results", str(path)]) == 0
    assert "EMULATED: t.py::test_x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give tests to run, or --results"),
        (["t.py", "--results", "x"], "and not both"),
        (["t.py", "-n", "2"], "3 or more"),
        (["--results", "/nowhere/at/all.json"], "does not exist"),
        (["no_such_test_file.py"], "measured nothing"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, said, capsys):
    assert main(["calibrate", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1]
    assert error[-1].startswith("llmserve: ")


def test_only_invalid_runs_are_no_calibration(tmp_path, capsys):
    path = result(tmp_path / "a.json", run(ok=False))
    assert main(["calibrate", "--results", str(path)]) == 2
    assert "no valid run" in capsys.readouterr().err
