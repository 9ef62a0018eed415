"""Exact schedules and the truth log: the ground that the client's clock is measured on.

No test here asserts how late a token is: that is a figure of `benchmarks/emulator`.
"""

from __future__ import annotations

import json
import socket
import time
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from emulated import Emulated, emulated

from pytest_llmserve.emulator.truth import Event, TruthLog, read_truth

COMPLETIONS = "/v1/completions"


def post(server: Emulated, body: dict[str, object]) -> socket.socket:
    data = json.dumps(body).encode()
    raw = socket.create_connection((server.host, server.port))
    raw.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    return raw


def drain(raw: socket.socket) -> tuple[bytes, float]:
    data = b""
    while b"[DONE]\n\n" not in data:
        piece = raw.recv(1 << 16)
        assert piece, data
        data += piece
    raw.close()
    return data, time.monotonic()


def truth(path: Path) -> dict[str, list[Event]]:
    events = sorted(read_truth(path), key=lambda e: e.request)
    return {request: list(rows) for request, rows in groupby(events, key=lambda e: e.request)}


def test_every_request_has_its_own_exact_schedule(tmp_path: Path) -> None:
    log = tmp_path / "truth.csv"
    flags = ("--schedule", "exact", "--ttft", "0.05", "--tpot", "0.01", "--truth-log", str(log))
    with emulated(*flags) as server:
        before = time.monotonic()
        raws = [post(server, {"prompt": [i], "max_tokens": 10 + i, "ignore_eos": True,
                              "stream": True}) for i in range(5)]  # fmt: skip
        ends = [drain(raw)[1] for raw in raws]
    by_request = truth(log)
    assert len(by_request) == 5
    for number, events in enumerate(by_request.values()):
        arrival, *tokens = events
        assert (arrival.token, arrival.due) == (0, arrival.before)
        assert before <= arrival.due
        assert [event.token for event in tokens] == list(range(1, 11 + number))
        for i, event in enumerate(tokens):
            assert event.due == pytest.approx(arrival.due + 0.05 + i * 0.01, abs=2e-6)
            assert event.due <= event.before <= event.after, "a token left before its time"
        assert tokens[-1].before <= ends[number]


def test_steps_of_a_batch_have_the_length_that_physics_says(tmp_path: Path) -> None:
    log = tmp_path / "truth.csv"
    with emulated("--truth-log", str(log), "--overhead", "0") as server:
        drain(post(server, {"prompt": [3] * 64, "max_tokens": 6, "ignore_eos": True,
                            "stream": True}))  # fmt: skip
    (events,) = truth(log).values()
    dues = [event.due for event in events[1:]]
    # One sequence: weights of 5.152 GB and 72 KiB for each token of context, at 70 % of 273 GB/s.
    for i, (a, b) in enumerate(pairwise(dues)):
        context = 65 + i
        expected = (5.1518e9 + 73_728 * context) / (0.7 * 273e9)
        assert b - a == pytest.approx(expected, rel=1e-3)


def test_several_events_go_in_one_write(tmp_path: Path) -> None:
    log = tmp_path / "truth.csv"
    flags = ("--schedule", "exact", "--ttft", "0", "--tpot", "0.005", "--events-per-write", "4")
    with emulated(*flags, "--truth-log", str(log)) as server:
        data, _ = drain(post(server, {"prompt": "a", "max_tokens": 10, "ignore_eos": True,
                                      "stream": True}))  # fmt: skip
    assert data.count(b"data: {") == 10
    (events,) = truth(log).values()
    writes = [len(list(rows)) for _, rows in groupby(events[1:], key=lambda e: e.before)]
    assert writes == [4, 4, 2]


def test_max_rate_streams_everything_to_a_slow_reader_too() -> None:
    with emulated("--schedule", "max-rate") as server:
        slow = post(server, {"prompt": "a", "max_tokens": 30_000, "ignore_eos": True,
                             "stream": True})  # fmt: skip
        quick = post(server, {"prompt": "b", "max_tokens": 2_000, "ignore_eos": True,
                              "stream": True})  # fmt: skip
        data, _ = drain(quick)  # while the other one's socket is full
        assert data.count(b"data: {") == 2_000
        data, _ = drain(slow)
        assert data.count(b"data: {") == 30_000
        now = server.metrics()
        assert now["vllm:generation_tokens_total"] == 32_000
        assert now["vllm:request_success_total"] == 2


def test_a_log_is_complete_after_a_kill(tmp_path: Path) -> None:
    log = tmp_path / "truth.csv"
    with emulated("--schedule", "exact", "--ttft", "0", "--tpot", "0.001",
                  "--truth-log", str(log)) as server:  # fmt: skip
        drain(post(server, {"prompt": "a", "max_tokens": 50, "ignore_eos": True, "stream": True}))
        end = time.monotonic() + 5
        while log.read_text().count("\n") < 52 and time.monotonic() < end:
            time.sleep(0.02)  # it is written when the server is idle
        server.process.kill()
        server.process.wait()
    (events,) = truth(log).values()
    assert len(events) == 51


def test_the_log_reads_back_what_was_written(tmp_path: Path) -> None:
    log = TruthLog(tmp_path / "t.csv")
    rows = [("a", i, i + 0.25, i + 0.5, i + 0.75) for i in range(5)]
    for row in rows:
        log.add(row)
    log.flush(2)
    assert log.pending == 3
    log.close()
    assert list(read_truth(tmp_path / "t.csv")) == [Event(*row) for row in rows]
