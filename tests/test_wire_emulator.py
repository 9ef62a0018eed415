"""Every dialect the emulator speaks is understood, and every fault it has is classified."""

from __future__ import annotations

import pytest
from wire_send import errors, send

from pytest_llmserve.load.calibration import MODEL, exact_server

TIMES = ("--schedule", "exact", "--ttft", "0.02", "--tpot", "0.002")


@pytest.mark.parametrize("dialect", ["vllm", "tensorrt-llm", "sglang", "llama.cpp", "ollama"])
def test_dialects(dialect, tmp_path):
    with exact_server(tmp_path / "truth.csv", *TIMES, "--dialect", dialect) as url:
        for api in ("completions", "chat"):
            for stream in (True, False):
                columns = send(url, 2, want=12, model=MODEL, api=api, stream=stream)
                assert errors(columns) == ["none"] * 2, (api, stream)
                assert list(columns["output_tokens"]) == [12] * 2
                assert columns["event_tokens"].sum() == pytest.approx(24)
                # What is streamed starts with the first token, not with a role or an empty chunk.
                assert (columns["first"] - columns["sent"] >= 0.02 - 1e-3).all()
                if not stream:
                    assert list(columns["events"]) == [1, 1]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("http-429", "http_status"),
        ("http-500", "http_status"),
        ("http-503", "http_status"),
        ("refuse", "reset"),
        ("reset", "reset"),
        ("truncate", "truncated"),
        ("no-done", "truncated"),
        ("malformed", "malformed"),
        ("error-event", "http_status"),
        ("hang", "timeout"),
        ("stall=seconds:0.1", "none"),
        ("fragment", "none"),
        ("wrong-length", "wrong_length"),
    ],
)
def test_faults(fault, error, tmp_path):
    with exact_server(tmp_path / "truth.csv", *TIMES, "--fault", fault) as url:
        columns = send(url, 2, want=12, model=MODEL, timeout=1.0 if fault == "hang" else 10.0)
    assert errors(columns) == [error] * 2
    if error != "none":
        return
    assert list(columns["output_tokens"]) == [12] * 2
    if fault.startswith("stall"):
        assert columns["event_coalesced"].any()
