"""Files for other tools and readers, written at the end of a run."""

import json
import subprocess
import sys

import pytest

BODY = """
@quick
def test_it(load, slo):
    slo.check(load(closed_loop(users=2), **SHORT), at_least("output_throughput", 1))
@quick
def test_curve(load):
    for users in (1, 2):
        load(closed_loop(users=users), **SHORT)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_pytest_benchmark_reads_the_export(project, workers):
    pytest.importorskip("pytest_benchmark")
    if workers:
        pytest.importorskip("xdist")
    pytester = project(BODY)
    result = pytester.runpytest(
        "--llmserve-benchmark-json=speed.json",
        "--llmserve-json=out.json",
        *([f"-n{workers}"] * bool(workers)),
    )
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"results: {pytester.path / 'speed.json'}"])
    found = json.loads((pytester.path / "speed.json").read_text())["benchmarks"]
    assert len(found) == 3
    rates = [b["stats"]["ops"] for b in found]
    runs = json.loads((pytester.path / "out.json").read_text())["runs"]
    assert rates == pytest.approx([run["metrics"]["output_throughput"] for run in runs])
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", "speed.json", "--csv=table.csv"],
        cwd=pytester.path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = (pytester.path / "table.csv").read_text()
    assert table.count("(emulated)") >= 3


def test_a_test_may_take_benchmark_too(project):
    pytest.importorskip("pytest_benchmark")
    body = """
@quick
def test_both(load, slo, benchmark):
    run = benchmark.pedantic(lambda: load(closed_loop(users=1), **SHORT), rounds=2)
    slo.check(run, at_least("output_throughput", 1))
"""
    pytester = project(body)
    result = pytester.runpytest(
        "--llmserve-benchmark-json=ours.json", "--benchmark-json=theirs.json"
    )
    result.assert_outcomes(passed=1)
    ours, theirs = (
        json.loads((pytester.path / name).read_text())["benchmarks"]
        for name in ("ours.json", "theirs.json")
    )
    assert [b["stats"]["rounds"] for b in ours] == [b["stats"]["rounds"] for b in theirs] == [2]
    assert set(theirs[0]["stats"]) <= set(ours[0]["stats"])


def test_the_markdown_report_and_the_job_summary(project, monkeypatch):
    pytester = project(BODY)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    result = pytester.runpytest("--llmserve-markdown=report.md")
    result.assert_outcomes(passed=2)
    for name in ("report.md", "summary.md"):
        text = (pytester.path / name).read_text()
        assert "test_it" in text
        assert "EMULATED" in text


def test_the_html_report(project):
    for needed in ("altair", "vl_convert", "jinja2"):
        pytest.importorskip(needed)
    pytester = project(BODY)
    result = pytester.runpytest("--llmserve-report=report.html", "--llmserve-json=out.json")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"results: {pytester.path / 'report.html'}"])
    assert "test_curve" in (pytester.path / "report.html").read_text()


def test_the_html_report_is_refused_at_once_without_its_packages(project, monkeypatch):
    import pytest_llmserve.report.html as html

    monkeypatch.setattr(html, "find_spec", lambda name: None)
    result = project(BODY).runpytest("--llmserve-report=report.html")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*pip install pytest-llmserve[[]report]*"])


def test_a_file_that_cannot_be_written_fails_the_run_in_one_sentence(project):
    body = BODY.replace(
        "    slo.check", "    __import__('pathlib').Path('gone/x').parent.rmdir()\n    slo.check"
    )
    pytester = project(body)
    (pytester.path / "gone").mkdir()
    result = pytester.runpytest("--llmserve-json=gone/out.json", "--llmserve-markdown=report.md")
    assert result.ret == 4
    assert "gone/out.json cannot be written (No such file or directory)" in result.stdout.str()
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert (pytester.path / "report.md").is_file()


@pytest.mark.parametrize("option", ["benchmark-json", "report", "markdown"])
def test_a_folder_is_no_file(pytester, option):
    result = pytester.runpytest(f"--llmserve-{option}=.")
    assert result.ret == 4
    result.stderr.fnmatch_lines([f"*--llmserve-{option}*is a folder; name a file*"])
