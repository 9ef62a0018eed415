"""The suites against real vLLM: every lesson that a CPU can give, once, with the profile cpu-tiny.

In one pytest run, so that lessons share the servers they have in common. The loads are shorter than
the profile's: its bounds allow for it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: All but TensorRT-LLM, which needs a GPU, and the rest of `nightly`.
LESSONS = {
    "capstone": 4,
    "soak": 1,
    "robustness": 3,
    "inference_vs_serving": 1,
    "three_numbers": 1,
    "continuous_batching": 1,
    "paged_attention": 1,
    "speculative_decoding": 1,
}
PROFILE = """
extends: {profiles}/cpu-tiny.yaml
duration: 6
bounds: {{most_users: 16, search_duration: 2, soak_duration: 6, odd_requests: 500}}
"""


def test_every_lesson_passes(tiny_model, vllm_python, tmp_path):
    profile, result = tmp_path / "profile.yaml", tmp_path / "result.json"
    profile.write_text(PROFILE.format(profiles=ROOT / "suites/profiles"))
    told = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "suites"),
            *("-m", " or ".join(LESSONS), "--llmserve-engine=vllm"),
            *(f"--llmserve-profile={profile}", f"--llmserve-json={result}"),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTEST_ADDOPTS": "",
            "LLMSERVE_VLLM_PYTHON": vllm_python,
            "LLMSERVE_TINY_MODEL": str(tiny_model),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(told.stdout)
    assert told.returncode == 0, told.stdout + told.stderr
    # Skipped is what the profile has no server for, such as a draft model.
    passed = re.findall(
        r"(?m)^suites/(\w+)/\S*::(test_\w+)\S* (?:PASSED|INCONCLUSIVE)", told.stdout
    )
    lessons = [lesson for lesson, _ in passed]
    for lesson, least in LESSONS.items():
        if lesson != "soak":  # it is in the capstone's folder
            assert lessons.count(lesson) >= least, lesson
    assert "test_nothing_drifts_and_nothing_leaks" in {test for _, test in passed}
    document = json.loads(result.read_text())
    assert document["emulated"] is False
    assert {run["engine"] for run in document["runs"]} == {"vllm"}
