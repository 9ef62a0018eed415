"""Faults to inject: each does what its name says, to whom it should, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from emulated import Emulated, emulated

from pytest_llmserve.emulator.faults import FAULTS, Faults, parse_fault

COMPLETIONS = "/v1/completions"
QUICK = ("--hardware", "h200", "--model", "qwen3-0.6b", "--overhead", "0")
ASKED = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}


def stream(server: Emulated, **more: object) -> tuple[bytes, str]:
    """The raw bytes of a streamed answer after its headers, and how the connection ended."""
    body = json.dumps({**ASKED, "stream": True, **more}).encode()
    with socket.create_connection((server.host, server.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            % len(body)
            + body
        )
        data = b""
        try:
            while piece := raw.recv(1 << 16):
                data += piece
        except ConnectionResetError:
            return data, "reset"
        except TimeoutError:
            return data, "silence"
    return data, "end"


def events(data: bytes) -> int:
    return data.count(b'"text":')


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_status_instead_of_an_answer(status: int) -> None:
    with emulated(*QUICK, "--fault", f"http-{status}") as server:
        got, _, data = server.ask(COMPLETIONS, ASKED)
        assert (got, json.loads(data)["error"]["code"]) == (status, status)
        assert server.ask("/health")[0] == 200


def test_a_connection_refused_by_reset() -> None:
    with emulated(*QUICK, "--fault", "refuse") as server:
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            server.ask(COMPLETIONS, ASKED)
        assert server.ask("/health")[0] == 200


@pytest.mark.parametrize(
    ("fault", "count", "ending", "last"),
    [
        ("reset=token:5", None, "reset", None),
        ("truncate=token:5", 5, "end", b"}\n\n\r\n"),
        ("no-done=token:5", 5, "end", b"}\n\n\r\n0\r\n\r\n"),
        ("error-event=token:5", 5, "end", b"data: [DONE]\n\n\r\n0\r\n\r\n"),
        ("fragment", 20, "end", b"data: [DONE]\n\n\r\n0\r\n\r\n"),
    ],
)
def test_a_stream_that_ends_early(fault: str, count: int, ending: str, last: bytes) -> None:
    with emulated(*QUICK, "--fault", fault) as server:
        data, end = stream(server)
        assert end == ending
        if count is not None:
            assert events(data) == count
            assert data.endswith(last)
        assert (b'data: {"error"' in data) == fault.startswith("error-event")
        now = server.metrics()
        assert now["vllm:num_requests_running"] == 0
        assert now["vllm:kv_cache_usage_perc"] == 0


def test_one_event_is_cut_in_half_and_the_stream_goes_on() -> None:
    with emulated(*QUICK, "--fault", "malformed=token:5") as server:
        lines = [line for line in server.events(COMPLETIONS, ASKED) if line != "data: [DONE]"]
        assert len(lines) == 20
        broken = []
        for number, line in enumerate(lines):
            try:
                json.loads(line[5:])
            except ValueError:
                broken.append(number)
        assert broken == [5]


def test_a_stream_that_hangs_stays_open_and_frees_its_blocks() -> None:
    with emulated(*QUICK, "--fault", "hang=token:5") as server:
        body = json.dumps({**ASKED, "stream": True}).encode()
        with socket.create_connection((server.host, server.port), timeout=0.5) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            data = b""
            while events(data) < 5:
                data += raw.recv(1 << 16)
            with pytest.raises(TimeoutError):
                raw.recv(1 << 16)
        assert events(data) == 5
        assert server.metrics()["vllm:kv_cache_usage_perc"] == 0


def test_a_stall_holds_tokens_back_and_loses_none(tmp_path) -> None:
    with emulated(*QUICK, "--fault", "stall=token:5,seconds:0.3") as server:
        begin = time.monotonic()
        assert len(server.chunks(COMPLETIONS, ASKED)) == 20
        assert time.monotonic() - begin >= 0.3


def test_counts_and_lengths_that_are_wrong() -> None:
    usage = {"stream_options": {"include_usage": True}}
    with emulated(*QUICK, "--fault", "wrong-count=by:7") as server:
        chunks = server.chunks(COMPLETIONS, {**ASKED, **usage})
        assert len(chunks) == 21
        assert chunks[-1]["usage"]["completion_tokens"] == 27
        assert server.json(COMPLETIONS, ASKED)["usage"]["completion_tokens"] == 27
    with emulated(*QUICK, "--fault", "wrong-length=by:-4") as server:
        assert len(server.chunks(COMPLETIONS, ASKED)) == 16


def test_text_that_is_not_reproducible() -> None:
    with emulated(*QUICK, "--fault", "wrong-text=probability:0.5") as server:
        texts = {server.json(COMPLETIONS, ASKED)["choices"][0]["text"] for _ in range(8)}
    assert len(texts) > 1


def test_blocks_that_leak() -> None:
    with emulated(*QUICK, "--num-gpu-blocks-override", "10", "--max-model-len", "100",
                  "--fault", "kv-leak=blocks:2") as server:  # fmt: skip
        for leaked in (0.2, 0.4):
            server.json(COMPLETIONS, ASKED)
            assert server.metrics()["vllm:kv_cache_usage_perc"] == pytest.approx(leaked)


def test_a_prefix_cache_that_finds_nothing() -> None:
    with emulated(*QUICK, "--fault", "no-prefix-reuse") as server:
        for _ in range(2):
            server.json(COMPLETIONS, {**ASKED, "prompt": [1] * 64})
        now = server.metrics()
        assert now["vllm:prefix_cache_queries_total"] == 128
        assert now["vllm:prefix_cache_hits_total"] == 0
        assert server.json("/server_info")["config"]["enable_prefix_caching"] is True


def test_throttling_and_drift_lengthen_steps() -> None:
    faults = Faults((parse_fault("throttle=factor:3,after:10,lasting:5"), parse_fault("drift=rate:0.6")), 0)  # fmt: skip  # noqa: E501
    assert faults.slowdown(0) == 1.0
    assert faults.slowdown(5) == pytest.approx(1.05)
    assert faults.slowdown(10) == pytest.approx(3 * 1.1)
    assert faults.slowdown(15) == pytest.approx(1.15)
    for_ever = Faults((parse_fault("throttle=after:1"),), 0)
    assert [for_ever.slowdown(t) for t in (0.5, 1.0, 1e6)] == [1.0, 2.0, 2.0]


def test_who_is_struck_is_drawn_by_seed_and_share() -> None:
    faults = tuple(map(parse_fault, ("http-503=probability:0.2", "stall=probability:0.5,token:3",
                                     "malformed=token:3", "fragment=probability:0")))  # fmt: skip
    drawn = [Faults(faults, 7).draw() for _ in range(2)]
    assert drawn[0] == drawn[1]
    server = Faults(faults, 7)
    fates = [server.draw() for _ in range(2000)]
    assert sum(f.refusal == 503 for f in fates) == pytest.approx(400, abs=60)
    stalls = sum(any(x.name == "stall" for x in f.within[3]) for f in fates)
    assert stalls == pytest.approx(1000, abs=80)
    assert all(any(x.name == "malformed" for x in f.within[3]) for f in fates)
    assert not any(f.fragment for f in fates)


def test_a_server_that_is_never_ready() -> None:
    with emulated(*QUICK, "--fault", "never-ready", wait_for="KV cache") as server:
        assert server.ask("/health")[0] == 503
        assert server.ask(COMPLETIONS, ASKED)[0] == 503


def test_a_slow_start_takes_its_time() -> None:
    with emulated(*QUICK, "--fault", "slow-start=seconds:30", wait_for="Loading") as server:
        assert server.log[-1].endswith("30.0 s")
        assert server.port == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0, "it can be ended while it loads"


def test_a_crash_while_loading_and_one_in_mid_stream() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_llmserve.emulator", "--port", "0",
         "--fault", "crash-at-load=code:3"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "crash-at-load (emulated fault)" in done.stdout
    with emulated(*QUICK, "--fault", "crash=tokens:10") as server:
        data, end = stream(server)
        assert (events(data) <= 10, end in ("end", "reset")) == (True, True)
        assert b"[DONE]" not in data
        assert server.process.wait(5) == -signal.SIGKILL


def test_sigterm_that_is_ignored() -> None:
    with emulated(*QUICK, "--fault", "ignore-sigterm") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.ask("/health")[0] == 200
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 0


def test_children_that_are_left_behind() -> None:
    with emulated(*QUICK, "--fault", "leak-children=count:2,seconds:30") as server:
        children = [int(line.split()[-1]) for line in server.log if "left a child" in line]
        assert len(children) == 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
    try:
        assert all(psutil.pid_exists(child) for child in children)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_every_fault_can_be_named_with_its_defaults() -> None:
    for name, values in FAULTS.items():
        assert dict(parse_fault(name).values) == dict(values)
        assert parse_fault(name.replace("-", "_").upper()).name == name
