"""Several new runs, and several points of a curve, held against a baseline at once."""

import json

import pytest
from stored_runs import files, multiply

CHECK = """
@quick
def test_it(load, baseline):
    baseline.check(load(closed_loop(users=2), **SHORT), metrics=["output_throughput"])
"""


def _measured(pytester):
    return json.loads((pytester.path / "out.json").read_text())["runs"]


def test_a_number_of_repeats_is_measured(project):
    pytester = project(CHECK)
    pytester.runpytest("--llmserve-update-baselines=new")
    multiply(*files(pytester.path))
    pytester.makeini("[pytest]\nllmserve_repeats = 3")
    result = pytester.runpytest("--llmserve-json=out.json")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  repeats 3: 3 runs were needed"])
    runs = _measured(pytester)
    assert len({run["load"]["seed"] for run in runs}) == 3
    assert [bool(run["verdicts"]) for run in runs] == [True, False, False]


@pytest.mark.parametrize(("speed", "outcome"), [(2.0, "failed"), (1.0, "passed")])
def test_auto_stops_when_it_is_decided_and_says_what_it_saved(project, speed, outcome):
    pytester = project(CHECK)
    pytester.runpytest("--llmserve-update-baselines=new")
    multiply(*files(pytester.path), speed=speed)
    result = pytester.runpytest("--llmserve-repeats=auto", "--llmserve-json=out.json")
    result.assert_outcomes(**{outcome: 1})
    made = len(_measured(pytester))
    assert made < 8
    result.stdout.fnmatch_lines([f"  repeats auto: {made} runs were needed, {8 - made} saved"])


def test_a_lone_first_run_makes_no_repeats(project):
    result = project(CHECK).runpytest("--llmserve-repeats=5")
    result.stdout.fnmatch_lines(["  repeats 5: 1 run was needed"])


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "often", "٣"])
def test_what_is_no_number_of_repeats_is_refused(pytester, value):
    result = pytester.runpytest(f"--llmserve-repeats={value}")
    assert result.ret == 4
    result.stderr.fnmatch_lines([f"*--llmserve-repeats {value!r}: write a whole number from 1 up*"])


CURVE = """
@quick
def test_curve(load, baseline):
    curve = [load(closed_loop(users=users), **SHORT) for users in (1, 2, 4)]
    baseline.check(*curve, metrics=["output_throughput"])
"""


def test_the_points_of_a_curve_are_judged_together(project):
    pytester = project(CURVE)
    result = pytester.runpytest("--llmserve-update-baselines=new")
    result.stdout.fnmatch_lines(["baselines: 3 new"])
    (path,) = files(pytester.path)
    multiply(path, speed=2.0, users=4)
    result = pytester.runpytest("--llmserve-json=out.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["baselines: 3 compared"])
    runs = _measured(pytester)
    assert [run["load"]["users"] for run in runs] == [1, 2, 4, 4]  # what seemed worse, once more
    assert [run["verdict"] for run in runs] == ["pass", "pass", "fail", None]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("baseline.check()", "without a run proves nothing"),
        ("baseline.check(3)", "3 is no run that `load` gave"),
        ("baseline.check(run, metrics='ttft.p95')", "write a list of names"),
        ("baseline.check(run, metrics=['requests'])", "says how the load went"),
    ],
)
def test_wrong_calls_are_one_sentence(project, call, sentence):
    body = f"@quick\ndef test_it(load, baseline):\n    run = None\n    {call}"
    if "run," in call:
        body = body.replace("run = None", "run = load(closed_loop(users=1), **SHORT)")
    result = project(body).runpytest()
    result.assert_outcomes(failed=1)
    assert sentence in result.stdout.str()
    assert "Traceback" not in result.stdout.str()
