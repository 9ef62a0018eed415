"""`llmserve report`: stored results become a report; bad input is one sentence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import report_samples as samples

from pytest_llmserve.commands.report import add_parser
from pytest_llmserve.errors import ConfigError


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *map(str, arguments)])
    result: int = args.run(args)
    return result


@pytest.fixture
def result(tmp_path: Path) -> Path:
    run = samples.make_run(tmp_path, "a", 4, 3.0, test="t.py::test_stored")
    return samples.write(tmp_path / "result.json", samples.document(run))


def test_html_and_markdown_of_a_stored_result(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("altair", reason="needs the extra `report`")
    page = tmp_path / "report.html"
    assert call(result, "-o", page) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert "t.py::test_stored" in page.read_text(encoding="utf-8")
    assert '"kind":"lanes"' in page.read_text(encoding="utf-8")  # arrays were found beside it
    assert call(result, result, "-o", tmp_path / "report.md") == 0
    assert "t.py::test_stored" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ('{"schema": NaN}', "is not valid JSON"),
        ("[]", "is not of type 'object'"),
        ('{"schema": "other/1"}', "name a file written by --llmserve-json"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_bad_file_is_one_sentence(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        call(path, "-o", tmp_path / "r.md")
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r.md").exists()


def test_what_is_missing_is_named(result: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        call(tmp_path / "none.json", "-o", tmp_path / "r.md")
    with pytest.raises(ConfigError, match=r"ends in \.html or \.md"):
        call(result, "-o", tmp_path / "r.pdf")
    with pytest.raises(ConfigError, match="there is no such folder"):
        call(result, "-o", tmp_path / "r.html", "--baselines", tmp_path / "none")
    document = json.loads(result.read_text())
    del document["runs"][0]["metrics"]["ttft"]
    samples.write(result, document)
    with pytest.raises(ConfigError, match="'ttft' is a required property"):
        call(result, "-o", tmp_path / "r.md")
