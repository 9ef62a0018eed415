"""Shared by the tests of the plugin: a project with tests against a quick emulated server."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np  # noqa: F401 - pytester forgets what a run in this process imported, and
import pytest
import scipy.stats  # noqa: F401 - these cannot be imported twice

# Loads never overlap on a machine, by a lock in the folder for temporary files. Tests here say
# nothing of speed, so each pytest-xdist worker has such a folder, and locks, of its own.
# What such a worker is told by its environment is not for the runs that tests start.
if worker := os.environ.pop("PYTEST_XDIST_WORKER", None):
    os.environ.pop("COLUMNS", None)
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix=f"llmserve-{worker}-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

#: Put before every test file: `quick` is a marker for an emulated server with short steps.
HEADER = """
import pytest
from pytest_llmserve import at_least, at_most, closed_loop, open_loop
quick = pytest.mark.llmserve(
    engine="emulator", model="Qwen3-0.6B",
    emulation={"hardware": "h100", "model": "qwen3-0.6b", "weights": "bf16", "kv": "bf16"})
SHORT = dict(duration=0.5, prompt_tokens=16, output_tokens=8, warmup=1)
"""


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.Pytester]:
    """Makes a test file from a body, and `files` (path → text), and gives the pytester."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)  # not where our own tests write

    def make(body: str, files: Mapping[str, str] | None = None) -> pytest.Pytester:
        pytester.makepyfile(HEADER + body)
        for name, text in (files or {}).items():
            path = pytester.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return pytester

    return make


@pytest.fixture(scope="session")
def schema() -> Callable[[str], Mapping[str, Any]]:
    """Reads one of the package's JSON Schemas by name."""
    folder = Path(__file__).parents[1] / "pytest_llmserve" / "schemas"
    return lambda name: json.loads((folder / f"{name}.schema.json").read_text())
