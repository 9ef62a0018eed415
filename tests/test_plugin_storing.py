"""Runs become a baseline when their test has passed, and the summary says what to do next."""

import pytest
from stored_runs import files, loads, multiply

CHECK = """
THROUGHPUT = ["output_throughput"]
@quick
def test_it(load, baseline):
    baseline.check(load(closed_loop(users=2), **SHORT), metrics=THROUGHPUT)
"""

ENDINGS = """
@pytest.fixture
def breaks():
    yield
    raise RuntimeError("broken teardown")
@quick
@pytest.mark.parametrize("end", ["good", "assert", "slo", "skip"])
def test_ends(load, slo, baseline, end):
    run = load(closed_loop(users=2), **SHORT)
    baseline.check(run, metrics=["output_throughput"])
    if end == "slo":
        slo.check(run, at_least("output_throughput", 1e9))
    if end == "skip":
        pytest.skip("no more")
    assert end != "assert"
@quick
@pytest.mark.xfail
def test_unexpected(load, baseline):
    baseline.check(load(closed_loop(users=2), **SHORT), metrics=["output_throughput"])
@quick
def test_teardown(load, baseline, breaks):
    baseline.check(load(closed_loop(users=2), **SHORT), metrics=["output_throughput"])
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_only_what_passed_is_stored(project, workers):
    if workers:
        pytest.importorskip("xdist")
    pytester = project(ENDINGS)
    result = pytester.runpytest(
        "--llmserve-update-baselines=new", "-p", "no:randomly", *([f"-n{workers}"] * bool(workers))
    )
    (path,) = files(pytester.path)
    assert "test_ends" in path.name
    assert "good" in path.name
    shown = result.stdout.str()
    assert shown.count("not stored: the test did not pass") == 5
    assert "test_ends[good]: stored as run 1 of 5 that a verdict needs" in shown
    assert "baselines: 1 new, 5 missing" in shown


def test_a_worse_run_is_accepted_at_once_and_stored_in_the_end(project):
    pytester = project(CHECK)
    pytester.runpytest("--llmserve-update-baselines=new")
    (path,) = files(pytester.path)
    multiply(path, speed=2.0)
    before = path.read_bytes()
    worse = pytester.runpytest()
    worse.assert_outcomes(failed=1)
    worse.stdout.fnmatch_lines(["fail: baseline output_throughput: -*both runs are worse than*"])
    accept = ("--llmserve-update-baselines=all", "--llmserve-reason=smaller batches")
    refused = pytester.runpytest(accept[0])
    refused.assert_outcomes(failed=1)
    assert "to accept it: pytest" in refused.stdout.str()
    source = pytester.path / next(p.name for p in pytester.path.glob("test_*.py"))
    text = source.read_text()
    source.write_text(f"{text}\n    assert False\n")
    pytester.runpytest(*accept).assert_outcomes(failed=1)
    assert path.read_bytes() == before  # accepted, but the test failed afterwards
    source.write_text(text)
    taken = pytester.runpytest(*accept)
    taken.assert_outcomes(passed=1)
    taken.stdout.fnmatch_lines(["*::test_it: accepted (smaller batches) and stored as run 1 of 5*"])
    (load,) = loads(path).values()
    assert [entry["reason"] for entry in load["accepted"]] == ["smaller batches"]


def test_a_missing_baseline_fails_when_strict_and_is_stored_all_the_same(project):
    pytester = project(CHECK)
    result = pytester.runpytest("--llmserve-strict", "--llmserve-update-baselines=new")
    result.assert_outcomes(failed=1)
    assert len(files(pytester.path)) == 1


def test_a_file_that_cannot_be_added_to_is_an_error_of_one_sentence(project):
    pytester = project(CHECK)
    pytester.runpytest("--llmserve-update-baselines=new")
    (path,) = files(pytester.path)
    text = path.read_text()
    path.write_text(text.replace('"emulated": true,\n "loads"', '"emulated": false,\n "loads"'))
    before = path.read_bytes()
    result = pytester.runpytest("--llmserve-update-baselines=new")
    result.assert_outcomes(passed=0, errors=1)
    assert "is of real hardware and the run of emulated" in result.stdout.str()
    assert "Traceback" not in result.stdout.str()
    assert path.read_bytes() == before


def test_the_summary_counts_and_gives_the_command(project):
    pytester = project(
        CHECK
        + """
@quick
def test_other(load, baseline):
    baseline.check(load(closed_loop(users=1), **SHORT), metrics=THROUGHPUT)
@quick
def test_third(load, baseline):
    baseline.check(load(closed_loop(users=3), **SHORT), metrics=THROUGHPUT)
"""
    )
    name = next(p.name for p in pytester.path.glob("test_*.py"))
    where = "--llmserve-baselines=baselines"
    first = pytester.runpytest(where)
    first.stdout.fnmatch_lines(
        [
            "baselines: 3 missing",
            f"  missing: pytest {name}::test_it {name}::test_other {name}::test_third "
            f"--llmserve-update-baselines=new {where}",
        ]
    )
    pytester.runpytest("--llmserve-update-baselines=new", "-k", "not third")
    it, other = files(pytester.path)
    multiply(it)
    other.write_text(other.read_text().replace('"metrics_version": ', '"metrics_version": 9'))
    mixed = pytester.runpytest()
    mixed.stdout.fnmatch_lines(
        [
            "baselines: 1 compared, 1 missing, 1 mismatched",
            f"  missing: pytest {name}::test_third --llmserve-update-baselines=new",
            f"  mismatched: pytest {name}::test_other --llmserve-update-baselines=new",
        ]
    )


def test_unused_baselines_are_listed_when_the_selection_was_complete(project):
    body = CHECK + CHECK.replace("test_it", "test_gone").replace("users=2", "users=1")
    skipped = """
@quick
@pytest.mark.skip
def test_gone(): pass
"""
    pytester = project(body)
    pytester.runpytest("--llmserve-update-baselines=new")
    gone, _ = sorted(files(pytester.path), key=lambda path: "test_it" in path.name)
    far = pytester.path / "baselines" / "other-hardware" / gone.relative_to(pytester.path).name
    far.parent.mkdir()
    far.write_text(gone.read_text())
    source = pytester.path / next(p.name for p in pytester.path.glob("test_*.py"))
    source.write_text(source.read_text().replace("def test_gone", "def helper_gone"))
    pytester.runpytest().stdout.fnmatch_lines(
        ["baselines: 1 missing, 1 unused", f"  unused: rm {gone}"]
    )
    for arguments in (["-k", "it"], [f"{source.name}::test_it"], ["--deselect", "x"]):
        assert "unused: rm" not in pytester.runpytest(*arguments).stdout.str()
    source.write_text(source.read_text() + skipped)
    assert "unused: rm" not in pytester.runpytest().stdout.str()
    elsewhere = pytester.mkdir("elsewhere")
    (elsewhere / "test_x.py").write_text("def test_x(): pass")
    assert "unused: rm" not in pytester.runpytest("elsewhere").stdout.str()


def test_unused_baselines_under_xdist(project):
    pytest.importorskip("xdist")
    pytester = project(CHECK + CHECK.replace("test_it", "test_gone"))
    pytester.runpytest("--llmserve-update-baselines=new")
    source = pytester.path / next(p.name for p in pytester.path.glob("test_*.py"))
    source.write_text(source.read_text().replace("def test_gone", "def helper_gone"))
    pytester.runpytest("-n1").stdout.fnmatch_lines(["baselines: 1 missing, 1 unused"])
    pytester.makeconftest(
        """
        def pytest_collection_modifyitems(config, items):
            if hasattr(config, "workerinput"):
                config.hook.pytest_deselected(items=[items.pop()])
        """
    )
    source.write_text(source.read_text() + "\ndef test_left_out(): pass\n")
    assert "unused: rm" not in pytester.runpytest("-n1").stdout.str()
