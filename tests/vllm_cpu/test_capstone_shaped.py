"""The capstone's shape against real vLLM: 30 users, streamed, exact counts, a verdict.

Its speed on a CPU with a tiny model means nothing, so the bounds only have to be met by anything
that works; what is tested is that every figure is there and that both sides agree on it.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import jsonschema
import psutil
import pytest

from pytest_llmserve.engines import get_engine
from pytest_llmserve.launch.manager import ServerManager
from pytest_llmserve.server_files import load_server_config

CONFIG = Path(__file__).parents[2] / "suites/servers/vllm-tiny-cpu.yaml"
BODY = """
@pytest.mark.capstone
@pytest.mark.llmserve(server="vllm-tiny-cpu")
def test_thirty_users(load, slo, baseline):
    run = load(closed_loop(users=30), duration=15, prompt_tokens=64, output_tokens=32)
    slo.check(
        run,
        at_least("output_throughput", 30),
        at_most("ttft.p95", 60),
        at_least("concurrency.max", 30),
    )
    baseline.check(run)

@pytest.mark.capstone
@pytest.mark.llmserve(server="vllm-tiny-cpu")
def test_open_loop_chat(load, slo):
    run = load(open_loop(rate=5), duration=8, prompt_tokens=64, output_tokens=16, api="chat")
    slo.check(run, at_least("request_throughput", 1), at_most("e2e.p50", 60))
"""
#: Checks that need the server's own account, and must have had it.
TWO_SIDED = ("token_counts", "server_ttft", "prefix_cache", "prompt_length", "output_length")


@pytest.fixture
def capstone(project, tiny_model, monkeypatch):
    monkeypatch.setenv("LLMSERVE_TINY_MODEL", str(tiny_model))
    return project(BODY, {"servers/vllm-tiny-cpu.yaml": CONFIG.read_text()})


def _judge(result: pytest.RunResult, path: Path, schema) -> list[dict]:
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*1 inconclusive*"])  # no baseline yet, and it says so
    document = json.loads(path.read_text())
    jsonschema.Draft202012Validator(schema("result")).validate(document)
    assert document["emulated"] is False
    for run in document["runs"]:
        assert run["engine"] == "vllm"
        assert run["metrics"]["token_source"] == "usage"
        checks = {check["check"]: check for check in run["validity"]}
        for name in TWO_SIDED:
            assert checks[name]["ok"], checks[name]
            assert "not checked" not in checks[name]["detail"]
        assert run["metrics"]["tokens_per_event"] >= 1
    return document["runs"]


def test_vllm_started_by_the_fixture_serves_thirty_users(capstone, tiny_model, schema):
    result = capstone.runpytest_subprocess(
        "-m", "capstone", "--llmserve-json=out.json", timeout=400
    )
    runs = _judge(result, capstone.path / "out.json", schema)
    assert runs[0]["metrics"]["concurrency"]["max"] == 30
    assert "EMULATED" not in result.stdout.str()
    assert not _processes_of(tiny_model)


def _processes_of(model: Path) -> list[psutil.Process]:
    """Processes of servers of this model, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LLMSERVE_TINY_MODEL") == str(model):
                found.append(process)
    return found


def test_the_same_against_a_server_that_runs_already(capstone, schema, tmp_path, monkeypatch):
    manager = ServerManager(tmp_path, os.getpid())
    try:
        server = manager.get(load_server_config(CONFIG), get_engine("vllm"), lambda text: None)
        assert server.api_key
        monkeypatch.setenv("SERVER_KEY", server.api_key)
        result = capstone.runpytest_subprocess(
            "-m",
            "capstone",
            "--llmserve-json=out.json",
            f"--llmserve-endpoint={server.endpoint}",
            "--llmserve-api-key-env=SERVER_KEY",
            timeout=200,
        )
        _judge(result, capstone.path / "out.json", schema)
        assert server.api_key not in (capstone.path / "out.json").read_text()
        assert server.api_key not in result.stdout.str()
        assert manager.alive(server)
    finally:
        manager.stop_all()
