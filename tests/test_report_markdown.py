"""The Markdown report: short, true to the result, within the platform's size, never markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report import markdown
from pytest_llmserve.report.units import in_one_unit, show

BAD = "</script>|<b>x</b> [l](javascript:alert(1)) `c` @user #1 https://x.y ![i](z) _e_ $m$\n# h"


@pytest.fixture(scope="module")
def capstone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return samples.capstone(tmp_path_factory.mktemp("capstone"))


def lines_with(text: str, start: str) -> list[list[str]]:
    """The cells of every row of a table whose first cell is `start`."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_figures_are_the_results(capstone: dict[str, Any]) -> None:
    text = markdown.render([capstone])
    curve = [run for run in capstone["runs"] if run["test"] == samples.CURVE]
    for run in curve:
        users = run["load"]["users"]
        head = f"{users} user{'s' if users > 1 else ''}"
        row = next(cells for cells in lines_with(text, head) if len(cells) == 11)
        wanted = [show("output_throughput", run["metrics"]["output_throughput"])]
        for name in ("ttft", "tpot", "e2e"):
            wanted += [show(name, run["metrics"][name][s]) for s in ("p50", "p95", "p99")]
        assert [cell.removesuffix(" ~") for cell in row[1:]] == wanted
    objective = next(c for c in lines_with(text, "30 users") if c[1] == "ttft.p95")
    verdict = capstone["runs"][0]["verdicts"][1]
    assert objective[2:4] == [
        show("ttft", verdict["measured"]),
        f"≤ {show('ttft', verdict['bound'])}",
    ]


def test_one_picture_with_the_curves_values(capstone: dict[str, Any]) -> None:
    text = markdown.render([capstone])
    assert text.count("```mermaid") == 1
    drawn = [
        [float(value) for value in line.split("[")[1].rstrip("]").split(",")]
        for line in text.splitlines()
        if line.startswith("    line [")
    ]
    curve = [run for run in capstone["runs"] if run["test"] == samples.CURVE]
    wanted = [[run["metrics"]["ttft"][s] for run in curve] for s in ("p50", "p95", "p99")]
    assert drawn == [pytest.approx([v * 1000 for v in line], rel=1e-3) for line in wanted]
    assert 'x-axis "users" ["1", "2", "4", "8", "16", "30"]' in text
    assert 'title "EMULATED' in text


def test_says_emulated_only_if_it_is(tmp_path: Path) -> None:
    run = samples.make_run(tmp_path, "a", 4, 3.0)
    assert "every number comes from the emulated engine" in markdown.render([samples.document(run)])
    real = samples.make_run(tmp_path, "b", 4, 3.0, emulated=False, engine="vllm")
    assert "mulated" not in markdown.render([samples.document(real)]).lower()


def test_foreign_text_is_no_markup(tmp_path: Path) -> None:
    run = samples.make_run(
        tmp_path, "a", 4, 3.0, test=f"t::x[{BAD}]", server=BAD, model=BAD, engine=BAD,
        checks=((BAD, False, f"{BAD} api_key=hunter2hunter2"),),
    )  # fmt: skip
    text = markdown.render([samples.document(run)])
    for markup in (
        "<b>",
        "</script",
        "[l]",
        "`c`",
        "@user",
        " #1",
        "https://",
        "_e_",
        "$m$",
        "\n# h",
    ):
        assert markup not in text, markup
    assert "hunter2" not in text
    body = [line for line in text.splitlines() if line.startswith("| ⚠️")]
    assert len(body) == 1
    assert body[0].count("|") == 4


@given(st.text(max_size=200))
def test_text_keeps_a_table_in_shape(text: str) -> None:
    shown = markdown._text(text, 100)
    assert not set("|<>`*[]\\") & set(shown)
    assert "\n" not in shown


def test_size_is_kept_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    run = samples.make_run(tmp_path, "a", 4, 3.0, bounds=(("ttft.p50", "<=", 1.0),))
    runs = [{**run, "test": f"suites/x.py::test_{i}"} for i in range(300)]
    runs[-1] = {**runs[-1], "verdict": "fail"}
    for limit in (8_000, 60_000):
        text = markdown.render([samples.document(*runs)], limit)
        assert len(text.encode()) <= limit
        assert "Left out:" in text
        assert "sections" in text
        assert "test_299" in text  # the worst comes first
    whole = markdown.render([samples.document(*runs)])
    assert len(whole.encode()) <= markdown.LIMIT
    assert "sections" not in whole


def test_variants_stand_side_by_side(tmp_path: Path) -> None:
    documents = [
        samples.document(
            samples.make_run(tmp_path, engine, 4, 3.0, engine=engine, emulated=False, speed=speed)
        )
        for engine, speed in (("vllm", 1.0), ("sglang", 1.2))
    ]
    text = markdown.render(documents)
    assert "| metric | vllm | sglang |" in text
    shown = [show("ttft", d["runs"][0]["metrics"]["ttft"]["p50"]) for d in documents]
    assert lines_with(text, "ttft.p50") == [["ttft.p50", *shown]]
    assert "engine: vllm / sglang" in text


def test_files_are_written_and_appended(tmp_path: Path, capstone: dict[str, Any]) -> None:
    path = tmp_path / "summary.md"
    path.write_text("# before\n")
    markdown.append_step_summary(path, [capstone])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# before\n## llmserve")
    markdown.write_markdown(path, [capstone])
    assert path.read_text(encoding="utf-8") == markdown.render([capstone])
    with pytest.raises(ConfigError, match="cannot be written"):
        markdown.write_markdown(tmp_path / "no/summary.md", [capstone])


def test_a_full_summary_stays_as_it_is(tmp_path: Path, capstone: dict[str, Any]) -> None:
    path = tmp_path / "summary.md"
    path.write_text("x" * (markdown.LIMIT - 100))
    markdown.append_step_summary(path, [capstone])
    assert path.stat().st_size == markdown.LIMIT - 100
    path.write_text("x" * (markdown.LIMIT - 6000))
    markdown.append_step_summary(path, [capstone])
    assert markdown.LIMIT - 6000 < path.stat().st_size <= markdown.LIMIT


@pytest.mark.parametrize(
    ("seconds", "unit", "shown"),
    [
        ([0.1, 0.25], "ms", [100.0, 250.0]),
        ([0.5, 1.5], "s", [0.5, 1.5]),
        ([5e-6, 2e-5], "µs", [5.0, 20.0]),
        ([], "µs", []),
    ],
)
def test_one_unit_for_an_axis(seconds: list[float], unit: str, shown: list[float]) -> None:
    assert in_one_unit(seconds) == (unit, shown)
