"""Real vLLM on the CPU: only where LLMSERVE_VLLM_PYTHON names an interpreter that has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

VARIABLE = "LLMSERVE_VLLM_PYTHON"
MAKER = Path(__file__).parents[1] / "tiny_model.py"


def pytest_collection_modifyitems(items):
    if os.environ.get(VARIABLE):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            reason = f"set {VARIABLE} to the Python of an environment with vLLM's CPU build"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def vllm_python():
    return os.environ[VARIABLE]


@pytest.fixture(scope="session")
def tiny_model(vllm_python, tmp_path_factory):
    """A model folder with a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([vllm_python, str(MAKER), str(folder)], check=True, timeout=120)
    return folder
