"""The terminal's summary: every figure the result file's, at any width, verbosity and encoding."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.report.console import fold
from pytest_llmserve.report.plot import plot
from pytest_llmserve.report.units import several, show, show_margin

BOUNDS = (("output_throughput", ">=", 100.0), ("ttft.p50", "<=", 0.01), ("ttft.p99", "<=", 1.0))
#: Puts the runs of result documents on the reports of tests, as if they had measured them.
CONFTEST = """
import json, pathlib, pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    tests = json.loads(pathlib.Path("measured.json").read_text())
    if report.when == "call":
        report.llmserve = tests[report.nodeid.split("::")[1]]
"""

Shown = Callable[..., str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    checks = (("delivered load", True, "all users"), ("errors", False, "3 of 90 \x1b[31mfailed"))
    sides = [samples.make_run(folder, f"{s}{i}", 4, 2.0, seed=i) for i in (0, 1) for s in "AB"]
    return {
        "test_judged": [samples.make_run(folder, "j", 8, 4.0, bounds=BOUNDS)],
        "test_curve": [samples.make_run(folder, f"c{n}", n, 3.0) for n in (1, 4, 30)],
        "test_bad": [samples.make_run(folder, "b", 8, 2.0, checks=checks, bounds=BOUNDS[:1])],
        "test_sides": [run | {"label": "AB"[i % 2]} for i, run in enumerate(sides)],
    }


@pytest.fixture
def shown(pytester: pytest.Pytester, runs: Mapping[str, list[dict[str, Any]]]) -> Shown:
    """The summary that pytest prints for these runs."""
    pytester.makeconftest(CONFTEST)

    def run(
        *arguments: str, only: str = "", width: int | None = None, encoding: str = "utf-8",
        change: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        chosen = {name: found for name, found in runs.items() if only in name}
        tests = {
            name: {
                "verdict": found[0]["verdict"], "baselines": [], "calibrations": [],
                "runs": [{**run, **(change or {})} for run in found],
            }
            for name, found in chosen.items()
        }  # fmt: skip
        Path("measured.json").write_text(json.dumps(tests))
        pytester.makepyfile("\n".join(f"def {name}(): pass" for name in tests))
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        environment.pop("COLUMNS", None)
        environment |= {"COLUMNS": str(width)} if width else {}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            if not width:
                patch.delenv("COLUMNS", raising=False)
            result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)
        assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
        return result.stdout.str().split(" llmserve ===", 1)[1]

    return run


def test_figures_are_the_results(shown: Shown, runs: Mapping[str, list[dict[str, Any]]]) -> None:
    text = shown()
    (run,) = runs["test_judged"]
    for verdict in run["verdicts"]:
        metric, relation, _ = verdict["objective"].split()
        sign = {">=": "≥", "<=": "≤"}[relation]
        row = next(line for line in text.splitlines() if line.startswith(f"    {metric} "))
        cells = [show(metric, verdict["measured"]), f"{sign} {show(metric, verdict['bound'])}"]
        cells.append(show_margin(relation, verdict["measured"], verdict["bound"]))
        for cell in (*cells, verdict["verdict"]):
            assert f"  {cell}" in row
    for run in runs["test_curve"]:
        load = "1 user " if run["load"]["users"] == 1 else f"{run['load']['users']} users "
        row = next(line for line in text.splitlines() if line.startswith(f"    {load}"))
        metrics = run["metrics"]
        assert show("output_throughput", metrics["output_throughput"]) in row
        for name in ("ttft", "tpot", "e2e"):
            assert f" {show(name, metrics[name]['p50'])}" in row
            sure = "p95" in metrics[name]["certified"]
            assert f" {show(name, metrics[name]['p95'])}{'' if sure else '~'}" in row
    largest = runs["test_curve"][-1]["metrics"]
    assert f"{show('ttft', largest['ttft']['p95'])} │" in text  # the top of the plot's axis
    assert "TTFT against users, EMULATED" in text


def test_a_margin_has_a_bar_on_its_side(shown: Shown) -> None:
    text = shown(only="judged")
    rows = {line.split()[0]: line for line in text.splitlines() if "│" in line}
    assert re.search(r"% {7}│█+", rows["output_throughput"])  # the good side
    assert re.search(r"% +█+│ ", rows["ttft.p50"])  # the bad one
    for line in shown(only="judged", encoding="ascii").splitlines():
        assert line.isascii()
        if line.startswith("    ttft.p50 "):
            assert re.search(r"#####\| ", line)


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_wider_than_the_terminal(shown: Shown, width: int, encoding: str) -> None:
    text = shown("-v", width=width, encoding=encoding)
    ours = text.split("short test summary")[0].splitlines()[1:]
    whole = re.compile(r"\S*::\S+|\S{30,}")  # a test's id, a command: they can be copied whole
    assert [line for line in ours if len(line) > width and not whole.search(line)] == []
    assert "output_throughput" in text
    assert "30 users" in text


def test_each_side_of_a_comparison_is_named(shown: Shown) -> None:
    text = shown(only="sides")
    table = [line.split()[:3] for line in text.splitlines() if " 4 users " in line]
    assert table == [["A", "4", "users"], ["B", "4", "users"]] * 2


def test_quiet_is_one_line_a_test_and_what_is_wrong(shown: Shown) -> None:
    lines = [line for line in shown("-q", width=200).splitlines() if "test_" in line]
    assert [line.split(" ", 1)[0] for line in lines] == ["fail", "measured", "invalid", "measured"]
    assert all("EMULATED" in line for line in lines)
    text = shown("-q", width=200)
    assert "    ttft.p50 <= 0.01: measured" in text
    assert "    invalid: errors: 3 of 90" in text
    assert "margin" not in text
    assert "ok: delivered load" not in text
    assert "verdicts: 1 fail, 1 invalid" in text


def test_verbose_adds_checks_and_what_the_server_said(shown: Shown) -> None:
    assert "ok: delivered load" not in shown(only="judged")
    text = shown("-v", only="judged")
    assert "ok: delivered load: all users were served" in text
    assert "generation_tokens" in text


def test_colour_only_where_it_is_wanted(shown: Shown) -> None:
    assert "\x1b" not in shown()
    assert "\x1b[31m" in shown("--color=yes", only="judged")


def test_foreign_text_cannot_steer_the_terminal(shown: Shown) -> None:
    text = shown("-v", change={"server": "a\x1b]0;owned\x07\u202e", "label": "\x1b[2J"})
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "\ufffd" in text


@given(
    st.lists(st.tuples(*[st.text("ab", max_size=12)] * 5), min_size=1, max_size=5),
    st.integers(20, 90),
)
def test_folded_tables_keep_every_cell_and_fit(rows: list[tuple[str, ...]], width: int) -> None:
    blocks = fold(rows, "<>>>>", width)
    for number, row in enumerate(rows):
        said = [cell for block in blocks for cell in block[number].split()]
        assert sorted({*said}) == sorted({cell for cell in row if cell})
    widest = max(len(row[0]) for row in rows) + 2 + max(len(c) for row in rows for c in row[1:])
    assert all(len(line) <= max(width, widest) for block in blocks for line in block)


_LOADS = st.dictionaries(st.integers(1, 500), st.floats(1e-4, 10.0), min_size=2, max_size=8)


@given(_LOADS, st.sampled_from([40, 46, 60]), st.booleans())
def test_a_plot_puts_every_point_where_it_belongs(
    loads: dict[int, float], width: int, drawing: bool
) -> None:
    points = [(float(x), y) for x, y in loads.items()]
    rows = plot({"p95": points}, width=width, height=6, show=lambda v: f"{v:.3g}", drawing=drawing)
    assert all(len(row) <= width + 8 for row in rows)
    assert len(rows) == 8
    left = rows[0].index("│" if drawing else "|") + 1
    columns = len(rows[6]) - left
    low, high, top = min(loads), max(loads), max(loads.values())
    assert float(rows[0][: left - 1]) == pytest.approx(top, rel=0.01)
    for x, y in points:
        column = (x - low) / (high - low) * (columns - 1)
        row = (1 - y / top) * 5
        near = [
            rows[r][left + c]
            for r in range(6)
            for c in range(columns)
            if abs(r - row) <= 1 and abs(c - column) <= 1 and left + c < len(rows[r])
        ]
        assert any(cell not in " p95" for cell in near)


def test_plurals() -> None:
    assert [several(n, "run") for n in (0, 1, 2, 1000)] == [
        "0 runs",
        "1 run",
        "2 runs",
        "1,000 runs",
    ]
