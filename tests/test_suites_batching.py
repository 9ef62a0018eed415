"""Lessons 1 to 3 of the suites: they pass on the emulated engine, and fail on one that has the
fault which each of them is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: The emulated profile with shorter loads; `extra` are further lines.
PROFILE = """
extends: {profiles}/emulated.yaml
server: {server}
users: 8
duration: {duration}
output_tokens: {output}
"""
SERVER = """
engine: emulator
model: Qwen3-8B
gpus: 0
hardware: h100
emulation:
  hardware: h100
  model: qwen3-8b
  weights: bf16
  kv: bf16
  options: {options}
"""


@pytest.fixture
def lesson(tmp_path):
    """Runs tests of a lesson on an emulated H100 with these options of the emulator; gives the
    outcomes by test, and what was printed."""

    def run(name: str, *tests: str, options: str = "{}", duration: float = 5, output: int = 16):
        server, profile = tmp_path / "faulty.yaml", tmp_path / "profile.yaml"
        server.write_text(SERVER.format(options=options))
        profile.write_text(
            PROFILE.format(
                profiles=ROOT / "suites" / "profiles",
                server=server,
                duration=duration,
                output=output,
            )
        )
        file = f"suites/{name}/test_{name}.py"
        chosen = [f"{file}::{test}" for test in tests] or [file]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA"]
        for _ in range(3):
            told = subprocess.run(
                [*command, f"--llmserve-profile={profile}", *chosen],
                cwd=ROOT,
                env={**os.environ, "COLUMNS": "200", "PYTEST_ADDOPTS": ""},
                capture_output=True,
                text=True,
                timeout=1200,  # loads of other runs on this machine come first
            )
            lines = re.findall(r"^([A-Z]+) suites/\S+::(test_\w+)", told.stdout, re.MULTILINE)
            outcomes = {test: outcome for outcome, test in lines}
            # A machine that was busy with something else measured nothing: that is no answer.
            if "INVALID" not in outcomes.values():
                break
        return outcomes, told.stdout + told.stderr

    return run


@pytest.mark.parametrize("name", ["inference_vs_serving", "three_numbers", "continuous_batching"])
def test_a_lesson_passes_on_the_emulated_machine(lesson, name):
    outcomes, printed = lesson(name)
    assert outcomes, printed
    assert set(outcomes.values()) == {"PASSED"}, printed
    assert "EMULATED" in printed


SERIAL, STATIC = "{batching: serial}", "{batching: static}"
#: First tokens at once and the others evenly, whatever the prompt.
EXACT = "{schedule: exact, ttft: 0.05, tpot: 0.008}"
STALL = "{fault: 'stall=token:8,seconds:0.3'}"
THROTTLE = "{fault: 'throttle=factor:25,after:0'}"

#: Lesson, options of the emulator, and the tests that must fail by them with the metric they miss.
FAULTS = [
    (
        "inference_vs_serving",
        SERIAL,
        {
            "test_one_user_leaves_the_chip_idle": "output_throughput",
            "test_many_users_share_the_machine": "output_throughput",
            "test_against_one_at_a_time": "B/A output_throughput",
        },
    ),
    ("three_numbers", EXACT, {"test_time_to_first_token_grows_with_the_prompt": "ttft.mean"}),
    ("three_numbers", STALL, {"test_tokens_come_as_fast_in_long_answers": "user_throughput.mean"}),
    ("three_numbers", THROTTLE, {"test_faster_than_one_reads": "user_throughput.mean"}),
    ("three_numbers", SERIAL, {"test_throughput_is_paid_for_with_latency": "output_throughput"}),
    (
        "continuous_batching",
        SERIAL,
        {
            "test_a_late_request_joins_what_runs": "ttft.max",
            "test_beyond_the_seats_requests_queue": "output_throughput",
            "test_against_one_at_a_time": "B/A output_throughput",
        },
    ),
    (
        "continuous_batching",
        STATIC,
        {
            "test_a_late_request_joins_what_runs": "ttft.max",
            "test_short_answers_do_not_wait_for_long_ones": "ttft.mean",
        },
    ),
]


@pytest.mark.parametrize(("name", "options", "missed"), FAULTS)
def test_a_lesson_fails_on_a_server_with_its_fault(lesson, name, options, missed):
    # A throttled server needs short answers to end some within the load.
    output = 4 if options == THROTTLE else 16
    outcomes, printed = lesson(name, *missed, options=options, output=output)
    assert outcomes == dict.fromkeys(missed, "FAILED"), printed
    for test, metric in missed.items():
        told = re.search(rf"::{test}\n(?:.+\n)*? +{re.escape(metric)} .* fail\n", printed)
        assert told, f"{test} does not miss {metric}:\n{printed}"
