"""The four outcomes, as pytest shows, counts and exports them."""

import json
from xml.etree import ElementTree

import jsonschema
import pytest

PASSING = """
@quick
def test_it(load, slo):
    run = load(closed_loop(users=2), **SHORT)
    slo.check(run, at_least("output_throughput", 1), at_most("e2e.p50", 60))
"""


def test_pass(project):
    result = project(PASSING).runpytest("-p", "no:cacheprovider")
    assert result.ret == 0
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "llmserve: emulator: EMULATED engine, Qwen3-0.6B bf16, bf16 KV, emulated h100, *",
            "*= llmserve =*",
            "EMULATED: Every number below comes from the emulated engine, not from real hardware.",
            "*::test_it",
            "*2 users, 16 tokens in, 8 out*EMULATED*",
            "*objective*measured*bound*margin*verdict*",
            "*output_throughput*tok/s*1 tok/s*+*%*pass*",
            "*e2e.p50*60.0 s*+*%*pass*",
            "verdicts: 1 pass",
        ]
    )


def test_fail_is_explained(project):
    body = PASSING.replace('("output_throughput", 1)', '("output_throughput", 1e9)')
    result = project(body).runpytest()
    assert result.ret == 1
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["fail: output_throughput >= 1e+09: *", "verdicts: 1 fail"])
    assert "Traceback" not in result.stdout.str()
    assert "slo.check" not in result.stdout.str()  # the reason, not our source


INCONCLUSIVE = """
@quick
def test_it(load, slo):
    run = load(closed_loop(users=1), **SHORT)
    slo.check(run, at_most("ttft.p99", 60))
"""


def test_inconclusive_passes_with_its_own_letter(project):
    result = project(INCONCLUSIVE).runpytest()
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*I *[[]100%]", "*ttft.p99 <= 60: *needs*", "*1 inconclusive*"])
    verbose = project(INCONCLUSIVE).runpytest("-v")
    verbose.stdout.fnmatch_lines(["*::test_it INCONCLUSIVE*"])


def test_inconclusive_fails_when_strict(project):
    result = project(INCONCLUSIVE).runpytest("--llmserve-strict")
    assert result.ret == 1
    result.assert_outcomes(failed=1)


INVALID = """
@quick
def test_it(load, slo):
    run = load(closed_loop(users=1), duration=0.5, prompt_tokens=10**6, output_tokens=8, warmup=0)
    {check}
"""


@pytest.mark.parametrize("check", ["slo.check(run, at_least('requests', 0))", "assert True"])
def test_invalid_is_an_error_even_if_nobody_asks(project, check):
    result = project(INVALID.format(check=check)).runpytest()
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*E *[[]100%]", "*ERROR at call of test_it*", "invalid: *", "*1 error*"]
    )
    result.stdout.fnmatch_lines(["verdicts: 1 invalid"])
    assert "passed" not in result.outlines[-1]


def test_a_run_may_not_be_judged_without_objectives(project):
    body = "@quick\ndef test_it(load, slo): slo.check(load(closed_loop(users=1), **SHORT))"
    result = project(body).runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*without an objective proves nothing*"])


def test_wrong_arguments_of_a_load_are_one_sentence(project):
    body = "@quick\ndef test_it(load): load(closed_loop(users=0), **SHORT)"
    result = project(body).runpytest()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*users must be a whole number from 1 up*"])


def test_json_and_junit_carry_the_same_figures(project, schema):
    pytester = project(PASSING + INCONCLUSIVE.replace("test_it", "test_that"))
    result = pytester.runpytest("--llmserve-json=out.json", "--junitxml=out.xml")
    assert result.ret == 0
    document = json.loads((pytester.path / "out.json").read_text())
    jsonschema.Draft202012Validator(schema("result")).validate(document)
    assert document["emulated"] is True
    first, second = document["runs"]
    assert (first["verdict"], second["verdict"]) == ("pass", "inconclusive")
    assert (pytester.path / first["events"]).is_file()
    root = ElementTree.parse(pytester.path / "out.xml").getroot()
    cases = {case.get("name"): case for case in root.iter("testcase")}
    properties = {p.get("name"): p.get("value") for p in cases["test_it"].iter("property")}
    assert properties["llmserve.verdict"] == "pass"
    assert properties["llmserve.emulated"] == "true"
    throughput = first["metrics"]["output_throughput"]
    assert float(properties["llmserve.output_throughput"]) == throughput
    assert float(properties["llmserve.ttft.p95"]) == first["metrics"]["ttft"]["p95"]


def test_the_saved_arrays_give_the_same_metrics(project):
    from pytest_llmserve.load.record import Record

    pytester = project(PASSING)
    pytester.runpytest("--llmserve-json=out.json")
    run = json.loads((pytester.path / "out.json").read_text())["runs"][0]
    record = Record.load(pytester.path / run["events"])
    window = run["metrics"]["window"]
    arrived = record.event_time - record.info.start
    inside = (arrived >= window["start"]) & (arrived < window["end"])
    assert record.event_tokens[inside].sum() / window["duration"] == pytest.approx(
        run["metrics"]["output_throughput"], rel=0.01
    )


def test_several_loads_in_a_test_make_a_curve(project):
    body = """
@quick
def test_curve(load):
    for users in (1, 2, 4):
        load(closed_loop(users=users), **SHORT)
"""
    result = project(body).runpytest()
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*latency under load (EMULATED)",
            "*load*aggregate*TTFT p50*p95*",
            "* 1 *tok/s*",
            "* 4 *tok/s*",
        ]
    )


def test_open_loop(project):
    body = """
@quick
def test_open(load, slo):
    run = load(open_loop(rate=40, lead_in=0.2), duration=1.5, prompt_tokens=16, output_tokens=4)
    slo.check(run, at_least("request_throughput", 20))
"""
    result = project(body).runpytest()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*40 requests/s, 16 tokens in, 4 out*"])
