"""The client's own error: measured before the first load of a run, once, and told."""

from __future__ import annotations

import json

import jsonschema
import pytest

MEASURING = """
@quick
@pytest.mark.parametrize("number", range(2))
def test_it(load, slo, number):
    slo.check(load(closed_loop(users=2), **SHORT), at_least("requests", 1))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "pytest-llmserve"


@pytest.mark.parametrize("processes", [[], ["-n2"]], ids=["alone", "xdist"])
def test_it_is_in_the_result_and_the_summary(project, cache, schema, processes):
    if processes:
        pytest.importorskip("xdist")
    pytester = project(MEASURING)
    result = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "--llmserve-json=out.json", *processes, timeout=120
    )
    result.stdout.fnmatch_lines(["client error: TTFT p99 * ms, ITL p99 * ms on this machine *"])
    document = json.loads((pytester.path / "out.json").read_text())
    jsonschema.Draft202012Validator(schema("result")).validate(document)
    assert document["calibration"]["ttft_error"]["p99"] > 0
    for run in document["runs"]:
        checks = {check["check"]: check["detail"] for check in run["validity"]}
        assert "own error on this machine is" in checks["client_error"]
        assert "events/s of the" in checks["client_cpu"]
    for file in cache.glob("client-*.json"):  # none if something disturbed the measurement
        assert json.loads(file.read_text())["calibration"] == document["calibration"]


def test_a_run_without_a_load_does_not_measure_it(project, cache):
    result = project("def test_it(): pass").runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*client error*")
    assert not cache.exists()
