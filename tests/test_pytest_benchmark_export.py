"""The export is what pytest-benchmark itself writes and reads."""

import json
import subprocess
import sys

import pytest
from test_compare import run

from pytest_llmserve.report.pytest_benchmark import document, stats, write


@pytest.fixture
def storage(tmp_path):
    """Two exports where pytest-benchmark keeps its own."""
    folder = tmp_path / "Linux-CPython-3.11-64bit"
    folder.mkdir()
    write(folder / "0001_before.json", [run(1.0), run(1.1), run(0.9)])
    write(folder / "0002_after.json", [run(0.5)])
    return tmp_path


def test_pytest_benchmark_compares_it(storage):
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "--storage", f"file://{storage}", "compare"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "test_x" in done.stdout
    assert "0001_before" in done.stdout.replace("\n", "")
    assert "0002_after" in done.stdout.replace("\n", "")


@pytest.mark.parametrize("rounds", range(1, 9))
def test_the_statistics_are_those_of_pytest_benchmark(rounds):
    benchmark_stats = pytest.importorskip("pytest_benchmark.stats")
    seconds = [0.001, 0.0011, 0.0012, 0.0009, 0.00105, 0.003, 0.0001, 0.00101][:rounds]
    theirs = benchmark_stats.Stats()
    for value in seconds:
        theirs.update(value)
    ours = stats(seconds)
    for name, value in theirs.as_dict().items():
        assert ours[name] == pytest.approx(value), name


def test_operations_are_tokens_per_second():
    (benchmark,) = document([run(1.0)])["benchmarks"]
    assert benchmark["stats"]["ops"] == pytest.approx(1000)
    assert benchmark["stats"]["rounds"] == 1
    assert benchmark["fullname"] == "t.py::test_x"


def test_loads_of_one_test_are_benchmarks_of_their_own():
    names = [
        b["name"] for b in document([run(load="a"), run(load="b"), run(load="b")])["benchmarks"]
    ]
    assert names == ["test_x[a]", "test_x[b]"]


def test_invalid_runs_are_left_out_and_emulated_ones_marked():
    exported = document([run(ok=False), run(emulated=True)])
    (benchmark,) = exported["benchmarks"]
    assert benchmark["name"] == "test_x (emulated)"
    assert benchmark["extra_info"]["emulated"] is True


def test_it_is_plain_json_without_this_host(tmp_path):
    import socket

    write(tmp_path / "x.json", [run()])
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text)["version"]
    assert json.loads(text)["machine_info"]["node"] == ""
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
