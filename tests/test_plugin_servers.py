"""Servers as tests see them: shared, attached to, made by factories, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

STARTS = """
@quick
def test_one(llm_server):
    print("PID", llm_server.pid, llm_server.endpoint)
@quick
def test_two(llm_server):
    print("PID", llm_server.pid, llm_server.endpoint)
"""


def _gone(pids: set[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_one_server_serves_all_tests_of_one_config_and_ends_with_the_run(project):
    result = project(STARTS).runpytest_subprocess("-s")
    result.assert_outcomes(passed=2)
    pids = {int(word) for word in _words_after(result.outlines, "PID")}
    assert len(pids) == 1
    assert _gone(pids, 0)


def _words_after(lines: list[str], mark: str) -> list[str]:
    return [line.split(mark)[1].split()[0] for line in lines if mark in line]


def test_xdist_workers_share_one_server(project):
    pytest.importorskip("xdist")
    body = "\n".join(
        f"""
@quick
def test_{n}(llm_server, load, slo, record_property):
    record_property("pid", llm_server.pid)
    slo.check(load(closed_loop(users=1), **SHORT), at_least("output_throughput", 1))
"""
        for n in range(4)
    )
    pytester = project(body)
    result = pytester.runpytest_subprocess("-n2", "--junitxml=x.xml", "--llmserve-json=x.json")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["verdicts: 4 pass"])
    import json
    import re

    pids = set(re.findall(r'name="pid" value="(\d+)"', (pytester.path / "x.xml").read_text()))
    assert len(pids) == 1
    assert _gone({int(pid) for pid in pids}, 0)
    assert len(json.loads((pytester.path / "x.json").read_text())["runs"]) == 4


def test_tests_of_one_server_run_together(project):
    body = """
other = pytest.mark.llmserve(engine="emulator", model="Qwen3-1.7B",
    emulation={"hardware": "h100", "model": "qwen3-1.7b", "weights": "bf16", "kv": "bf16"})
@quick
def test_a(llm_server): pass
def test_plain(): pass
@other
def test_b(llm_server): pass
@quick
def test_c(llm_server): pass
"""
    result = project(body).runpytest("--collect-only", "-q")
    order = [line.split("::")[1] for line in result.outlines if "::" in line]
    assert order == ["test_a", "test_plain", "test_c", "test_b"]


def test_a_factory_makes_more_servers(project):
    pytester = project(
        """
def test_two_servers(llm_server, tiny, load_tiny, slo):
    assert tiny.endpoint != llm_server.endpoint
    assert tiny.model == "tiny-model"
    slo.check(load_tiny(closed_loop(users=1), **SHORT), at_least("output_throughput", 1))
test_two_servers = quick(test_two_servers)
"""
    )
    pytester.makeconftest(
        """
        from pytest_llmserve import factories
        tiny = factories.llm_server(engine="emulator", model="tiny-model", emulation={
            "hardware": "h100", "model": "qwen3-0.6b", "weights": "bf16", "kv": "bf16"})
        load_tiny = factories.load("tiny")
        """
    )
    pytester.runpytest().assert_outcomes(passed=1)


@contextlib.contextmanager
def emulator(port: int):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest_llmserve.emulator",
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--model",
            "qwen3-0.6b",
            "--hardware",
            "h100",
            "--weights",
            "bf16",
            "--kv",
            "bf16",
        ]
    )
    try:
        import urllib.request

        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_attach_measures_a_running_server_and_leaves_it_running(project):
    body = """
@pytest.mark.llmserve(server="anything")
def test_it(load, slo):
    slo.check(load(closed_loop(users=2), **SHORT), at_least("output_throughput", 1))
"""
    with emulator(_free_port()) as url:
        pytester = project(body)
        for endpoint in (url, url + "/v1"):
            result = pytester.runpytest_subprocess(f"--llmserve-endpoint={endpoint}")
            result.assert_outcomes(passed=1)
            # An emulator stays one when it is attached to.
            result.stdout.fnmatch_lines([f"llmserve: attach: attach {url}, *", "EMULATED: *"])
        wrong = pytester.runpytest_subprocess(
            f"--llmserve-endpoint={url}", "--llmserve-model=other"
        )
        wrong.assert_outcomes(errors=1)
        wrong.stdout.fnmatch_lines(["*other*"])


def test_an_endpoint_that_refuses_is_one_sentence(project):
    endpoint = f"http://127.0.0.1:{_free_port()}"
    result = project("@quick\ndef test_it(llm_server): pass").runpytest(
        f"--llmserve-endpoint={endpoint}"
    )
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"*{endpoint}*"])
    assert "Traceback" not in result.stdout.str()


LONG = """
@quick
def test_long(llm_server, load):
    print("PID", llm_server.pid, flush=True)
    load(closed_loop(users=4), duration=60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_however_pytest_ends_no_server_is_left(project, how):
    pytester = project(LONG)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=pytester.path,
        start_new_session=True,
        # Shells start background jobs, CI among them, with SIGINT ignored; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    pid = 0
    for line in process.stdout:
        if "PID" in line:
            pid = int(line.split("PID")[1].split()[0])
            break
    assert psutil.pid_exists(pid)
    time.sleep(2.0)  # into the load
    mine = {p.pid for p in psutil.process_iter() if _belongs(p, pid, process.pid)}
    assert pid in mine
    os.kill(process.pid, how)
    process.wait(30)
    process.stdout.close()
    assert _gone(mine, 5.0)


def _belongs(process: psutil.Process, server: int, owner: int) -> bool:
    """The server's tree, its supervisor, and everything that pytest started."""
    with contextlib.suppress(psutil.Error):
        parents = {process.pid, *(p.pid for p in process.parents())}
        same_server = process.environ().get("LLMSERVE_SERVER_ID") not in (None, "") and (
            process.environ().get("LLMSERVE_SERVER_ID")
            == psutil.Process(server).environ().get("LLMSERVE_SERVER_ID")
        )
        return (owner in parents and process.pid != owner) or server in parents or same_server
    return False
