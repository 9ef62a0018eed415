"""A test that calibrates: each load many times, the noise in a table, no baseline judged."""

import json

import pytest

BODY = """
@quick
@pytest.mark.llmserve_calibrate({arguments})
def test_it(load, baseline):
    run = load(closed_loop(users=2), **SHORT)
    assert baseline.check(run, metrics=["output_throughput"]) == ()
"""


def test_the_table_is_shown_and_nothing_is_judged_or_stored(project):
    pytester = project(BODY.format(arguments="runs=4"))
    result = pytester.runpytest("--llmserve-json=out.json", "--llmserve-update-baselines=all")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "  runs of one load (EMULATED)",
            "  calibration of closed-2-16in-8out-* on emulator",
            "    | metric * | runs | noise (90 % interval) *",
            "    | output_throughput | 4 *",
            "verdicts: none asked for",
        ]
    )
    assert "ttft" not in result.stdout.str().split("calibration of")[1]
    runs = json.loads((pytester.path / "out.json").read_text())["runs"]
    assert len({run["load"]["seed"] for run in runs}) == 4
    assert all(run["verdicts"] == [] for run in runs)
    assert not (pytester.path / "baselines").exists()


def test_loads_are_calibrated_apart_and_by_the_usual_metrics(project):
    body = """
@quick
@pytest.mark.llmserve_calibrate(runs=3)
def test_it(load, slo):
    for users in (1, 2):
        slo.check(load(closed_loop(users=users), **SHORT), at_least("output_throughput", 1))
"""
    result = project(body).runpytest()
    result.stdout.fnmatch_lines(
        [
            "  calibration of closed-1-*",
            "    | output_throughput | 3 *",
            "    | tpot.p50 * 3 *",
            "    ttft.p95: 0 runs say too little about noise* (p95 rests on * and needs 130*",
            "  calibration of closed-2-*",
            "verdicts: 1 pass",
        ]
    )


@pytest.mark.parametrize("arguments", ["2", "runs=2", "runs='10'", "runs=True", "times=10"])
def test_wrong_arguments_are_one_sentence(project, arguments):
    result = project(BODY.format(arguments=arguments)).runpytest()
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*@pytest.mark.llmserve_calibrate*"])
    assert "Traceback" not in result.stderr.str()


def test_the_marker_is_listed(pytester):
    pytester.runpytest("--markers").stdout.fnmatch_lines(["@pytest.mark.llmserve_calibrate(*"])
