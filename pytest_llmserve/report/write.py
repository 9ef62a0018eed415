"""All files that a pytest run was asked to leave behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report.result import document, write_result

if TYPE_CHECKING:
    from pytest_llmserve.config import Settings
    from pytest_llmserve.load.calibration import Calibration


def write_all(
    settings: Settings,
    tests: Mapping[str, Mapping[str, Any]],
    client: Calibration | str | None = None,
) -> list[str]:
    """Write the files that the settings (and, on GitHub, the job) ask for.

    `client` is what `load.calibration.of_run` gives.

    Gives a sentence for each one that could not be written; the others are written none the less.
    """
    content = document(tests, client, settings.command)
    problems: list[str] = []

    def attempt(path: Path | str | None, write: Callable[[Path], None]) -> None:
        try:
            if path:
                write(Path(path))
        except ConfigError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path} cannot be written ({error.strerror})")

    # First of all: from here on the runs' arrays are where this file says.
    attempt(settings.json, lambda path: write_result(path, content))
    attempt(settings.benchmark_json, lambda path: _write_benchmark(path, content))
    attempt(settings.report, lambda path: _write_report(path, content, settings))
    attempt(settings.markdown, lambda path: _write_markdown(path, content))
    attempt(os.environ.get("GITHUB_STEP_SUMMARY"), lambda path: _append_summary(path, content))
    return problems


def _write_benchmark(path: Path, content: Mapping[str, Any]) -> None:
    from pytest_llmserve.report import pytest_benchmark

    pytest_benchmark.write(path, content["runs"])


def _write_report(path: Path, content: Mapping[str, Any], settings: Settings) -> None:
    from pytest_llmserve.report.html import write_report

    base = settings.json.parent if settings.json else settings.rootdir
    write_report(path, [content], base=base, baselines=settings.baselines)


def _write_markdown(path: Path, content: Mapping[str, Any]) -> None:
    from pytest_llmserve.report.markdown import write_markdown

    write_markdown(path, [content])


def _append_summary(path: Path, content: Mapping[str, Any]) -> None:
    from pytest_llmserve.report.markdown import append_step_summary

    append_step_summary(path, [content])
