"""docs/examples: the script of a nightly gate does what its page says, for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs/examples"

TEST = """
@pytest.mark.nightly
def test_a_night(load, slo, llm_profile):
    run = load(closed_loop(users=llm_profile.users), **SHORT)
    slo.check(run, at_least("output_throughput", llm_profile.bound("output_throughput")))

@pytest.mark.soak
def test_a_first_night(load, baseline, llm_profile):
    baseline.check(load(closed_loop(users=llm_profile.users), **SHORT))
"""
SERVER = """
engine: emulator
model: Qwen3-0.6B
gpus: 0
emulation: {hardware: h100, model: qwen3-0.6b, weights: bf16, kv: bf16}
"""
PROFILE = """
server: quick
users: 2
duration: 1
prompt_tokens: 16
output_tokens: 8
bounds: {output_throughput: %d}
"""


@pytest.fixture
def night(project, monkeypatch):
    """A machine for the script: gives a function from a bound and a server to exit status, output
    and the folder of results."""
    pytester = project(TEST, {"servers/quick.yaml": SERVER})
    programs = pytester.path / "bin"
    programs.mkdir()
    for name, module in (("pytest", "pytest"), ("llmserve", "pytest_llmserve.cli")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parents[1]))
    for name, value in (("PROFILE", "quick"), ("ENGINE", "emulator"), ("TESTS", "nightly")):
        monkeypatch.setenv(f"LLMSERVE_NIGHT_{name}", value)

    def run(bound, server="quick"):
        (pytester.path / "profiles").mkdir(exist_ok=True)
        (pytester.path / "profiles/quick.yaml").write_text(PROFILE % bound)
        monkeypatch.setenv("LLMSERVE_NIGHT_SERVER", server)
        done = subprocess.run(
            ["bash", str(EXAMPLES / "nightly.sh")],
            cwd=pytester.path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, pytester.path / "nightly"

    return run


def test_nights_leave_results_and_a_history(night):
    pytest.importorskip("altair")
    status, output, results = night(bound=1)
    assert (status, "verdicts: 1 pass" in output) == (0, True), output
    (first,) = results.glob("*/")
    assert {path.name for path in first.iterdir()} >= {
        "doctor.txt",
        "junit.xml",
        "report.html",
        "result.json",
        "summary.md",
    }
    assert "no problem" in (first / "doctor.txt").read_text()
    status, output, results = night(bound=10**9)
    assert (status, "verdicts: 1 fail" in output) == (1, True), output
    assert len(list(results.glob("*/result.json"))) == 2
    assert (results / "history.html").is_file()


def test_a_first_night_stores_its_run_and_is_no_pass(night, monkeypatch):
    pytest.importorskip("altair")
    monkeypatch.setenv("LLMSERVE_NIGHT_TESTS", "soak")
    monkeypatch.setenv("LLMSERVE_NIGHT_UPDATE", "new")
    status, output, results = night(bound=1)
    assert (status, "baselines: 1 new" in output) == (1, True), output
    assert list((results.parent / "baselines").rglob("*.json"))


def test_a_machine_that_is_not_fit_is_not_loaded(night):
    status, output, results = night(bound=1, server="missing")
    assert status != 0
    assert "no server config" in output
    assert not list(results.glob("*/result.json"))
