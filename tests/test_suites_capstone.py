"""Capstone, soak and robustness: they pass on the emulated engine, and fail on one that has the
fault which each of them is about."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "suites" / "robustness"))

from emulated import emulated  # noqa: E402
from known_faults import known  # noqa: E402
from odd_requests import COMPLETIONS, Odd, complaint  # noqa: E402

#: The emulated profile with shorter loads of fewer users, and bounds to match.
PROFILE = """
extends: {profiles}/emulated.yaml
server: {server}
users: 8
duration: {duration}
output_tokens: 16
bounds: {bounds}
"""
BOUNDS = {
    "output_throughput": 500,
    "batching_gain": 3,
    "curve_users": 8,
    "most_users": 16,
    "search_duration": 1,
    "users_within_slo": 8,
    "soak_duration": 3,
    "odd_requests": 100,
    "answer_timeout": 5,
}
SERVER = """
engine: emulator
model: Qwen3-8B
gpus: 0
hardware: h100
args: {args}
emulation:
  hardware: h100
  model: qwen3-8b
  weights: bf16
  kv: bf16
  options: {options}
"""


@pytest.fixture
def suite(tmp_path):
    """Runs tests of the suites on an emulated H100 with these options of the emulator; gives the
    outcomes by test, and what was printed."""

    def run(
        *chosen: str, options: str = "{}", args: str = "{}", duration: float = 2, **bounds: float
    ):
        server, profile = tmp_path / "faulty.yaml", tmp_path / "profile.yaml"
        server.write_text(SERVER.format(options=options, args=args))
        profile.write_text(
            PROFILE.format(
                profiles=ROOT / "suites" / "profiles",
                server=server,
                duration=duration,
                bounds=json.dumps({**BOUNDS, **bounds}),
            )
        )
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v"]
        told = subprocess.run(
            [*command, f"--llmserve-profile={profile}", *chosen],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200", "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
            timeout=1200,  # loads of other runs on this machine come first
        )
        lines = re.findall(r"::(test_\w+) .*?(PASSED|FAILED|INVALID|INCONCLUSIVE)", told.stdout)
        return dict(lines), told.stdout

    return run


def test_all_of_it_passes_on_the_emulated_machine(suite):
    outcomes, printed = suite("-m", "capstone or soak or robustness", "suites")
    assert set(outcomes) == {
        "test_thirty_users",
        "test_latency_under_load",
        "test_users_within_slo",
        "test_poisson_arrivals",
        "test_nothing_drifts_and_nothing_leaks",
        "test_any_request_is_answered_or_refused",
        "test_clients_that_leave_give_their_memory_back",
        "test_overload_is_survived",
    }, printed
    # Short loads have few requests, and there is no baseline.
    assert set(outcomes.values()) <= {"PASSED", "INCONCLUSIVE"}, printed
    assert "EMULATED" in printed


@pytest.mark.parametrize(
    ("test", "fault", "outcome", "words"),
    [
        # a server that is too slow, serves one after the other, or has too few seats
        (
            "capstone/test_capstone.py::test_thirty_users",
            {"options": "{fault: 'throttle=factor:8,after:0'}"},
            "FAILED",
            "fail: output_throughput >= 500",
        ),
        (
            "capstone/test_capstone.py::test_latency_under_load",
            {"args": "{max-num-seqs: 2}", "duration": 6},
            "FAILED",
            "fail: output_throughput >=",
        ),
        (
            "capstone/test_capacity.py::test_users_within_slo",
            {"args": "{max-num-seqs: 1}", "ttft.p95": 0.2},
            "FAILED",
            "fail: users_within_slo >= 8",
        ),
        # one request in five waits a second before it gets anything
        (
            "capstone/test_capacity.py::test_poisson_arrivals",
            {"options": "{fault: 'stall=probability:0.2,token:0,seconds:1'}", "duration": 6},
            "FAILED",
            "fail: goodput.fraction >= 0.95",
        ),
        # what failed was no measurement
        (
            "capstone/test_capstone.py::test_thirty_users",
            {"options": "{fault: 'http-500=probability:0.05'}"},
            "INVALID",
            "http_status",
        ),
        (
            "capstone/test_capstone.py::test_thirty_users",
            {"options": "{fault: 'reset=probability:0.05'}"},
            "INVALID",
            "requests failed (reset",
        ),
        # slower and slower, and memory that is not given back
        (
            "capstone/test_soak.py",
            {"options": "{fault: 'drift=rate:6'}"},
            "FAILED",
            "fail: output_throughput >=",
        ),
        (
            "capstone/test_soak.py",
            {"options": "{fault: 'kv-leak=blocks:5'}"},
            "FAILED",
            "fail: server.kv_usage.last <= 0.01",
        ),
        (
            "capstone/test_soak.py",
            # No fault of the emulator takes host memory: what every process does is too much.
            {"soak_memory_growth": -1e9},
            "FAILED",
            "the server's processes held",
        ),
        (
            "robustness/test_robustness.py::test_clients_that_leave_give_their_memory_back",
            {"options": "{fault: 'kv-leak=blocks:5'}"},
            "FAILED",
            "fail: server.kv_usage.last <= 0.01",
        ),
        # dies in the middle of the odd requests, after the first load of some 640 tokens
        (
            "robustness/test_robustness.py::test_any_request_is_answered_or_refused",
            {"options": "{fault: 'crash=tokens:900'}", "odd_requests": 1000},
            "FAILED",
            "the server does not answer any more\ncurl -N http://127.0.0.1:",
        ),
        (
            "robustness/test_robustness.py::test_overload_is_survived",
            {"options": "{fault: 'throttle=factor:3,after:3'}"},
            "FAILED",
            "fail: output_throughput >=",
        ),
    ],
)
def test_a_fault_is_noticed(suite, test, fault, outcome, words):
    outcomes, printed = suite(f"suites/{test}", **fault)
    assert set(outcomes.values()) == {outcome}, printed
    assert words in re.sub(r"(?m)^E +", "", printed), printed


def asked(**changes: object) -> Odd:
    body = {"model": "qwen3-8b", "prompt": "Hello", "max_tokens": 16, "stream": True, **changes}
    return Odd(COMPLETIONS, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("fault", "stream", "words"),
    [
        ("http-500", False, "500: "),
        ("http-503", True, "503: "),
        ("refuse", True, "no whole answer: "),
        ("hang=token:2", True, "nothing came for 1 s"),
        ("reset=token:2", True, "no whole answer: "),
        ("truncate=token:2", True, "a stream without [DONE]"),
        ("no-done=token:2", True, "a stream without [DONE]"),
        ("malformed=token:2", True, "neither text nor a refusal"),
        ("error-event=token:2", True, "neither text nor a refusal"),
        ("never-ready", False, "503: "),
        ("fragment", True, None),
        ("fragment", False, None),
    ],
)
def test_what_is_no_proper_answer_is_said(fault, stream, words):
    wait_for = "Listening" if fault == "never-ready" else "Ready"
    with emulated("--fault", fault, "--hardware", "h100", wait_for=wait_for) as server:
        at = Server(f"http://{server.host}:{server.port}")
        said = complaint(at, asked(stream=stream), timeout=1)
    assert said is None if words is None else words in said


class Server:
    """As much of a server as a request needs."""

    api_key = None

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint


@pytest.mark.parametrize(
    "body", [b'{"a": "it\'s $HOME `x` \\u0000"}', b"@/etc/hostname", b"\xff\0%s\n", b""]
)
def test_a_failing_request_is_shown_as_a_command_that_sends_it_again(body, tmp_path):
    """Of the command line that is printed, curl gets the bytes that failed."""
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/sh\n[ "$6" = @- ] && cat || printf %s "$6"\n')
    curl.chmod(0o755)
    line = Odd(COMPLETIONS, body, leave=3).curl("http://127.0.0.1:1")
    assert line.endswith("# left after 3 events")
    path = f"{tmp_path}:{os.environ['PATH']}"
    told = subprocess.run(["bash", "-c", line], env={"PATH": path}, capture_output=True, check=True)
    assert told.stdout == body


def test_known_faults_are_known_by_request_and_answer():
    words = "500: 'list' object has no attribute 'get'"
    assert "44537" in known("vllm", asked(structured_outputs=[]), words)
    assert known("vllm", asked(structured_outputs={}), words) is None
    assert known("vllm", asked(structured_outputs=[]), "500: something else") is None
    assert known("tensorrt-llm", asked(structured_outputs=[]), words) is None
    assert known("vllm", Odd(COMPLETIONS, b"["), words) is None
