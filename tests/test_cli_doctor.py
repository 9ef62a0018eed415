"""`llmserve doctor`: each line says what is the case, and what to do where it is not well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llmserve import cli
from pytest_llmserve.launch.leases import lease
from tests.launching import FAKE, answers, soon
from tests.test_launch_leases import holder

CACHED = "hub/models--org--model/snapshots/abc"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with one GPU, no engine, an empty folder of locks and one model in its cache."""
    programs = tmp_path / "bin"
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "-L) echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)';;\n"
        "--version) echo 'CUDA Version        : 13.0';;\n"
        "*=name,driver_version*) echo 'NVIDIA H200, 580.1';;\n"
        "*=name*) echo 'NVIDIA H200';;\n"
        "*=driver_version*) echo 580.1;;\n"
        "*=memory.total*) echo 143771, 143000;;\n"
        "esac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / CACHED).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "servers").mkdir()


def config(name, text):
    Path("servers", f"{name}.yaml").write_text(text)


def doctor(capsys, *words):
    """Exit status, lines and standard error of `llmserve doctor`."""
    status = cli.main(["doctor", *words])
    told = capsys.readouterr()
    return status, told.out.splitlines(), told.err


def test_the_machine(capsys):
    status, lines, _ = doctor(capsys)
    assert status == 0
    assert lines[0] == "this machine"
    assert (
        "  ok       gpus: 1 visible (NVIDIA H200; driver 580.1; CUDA up to 13.0; "
        "149.9 of 150.8 GB free)"
    ) in lines
    assert any(line.startswith("  ok       system: Linux") for line in lines)
    assert "  ok       load: no other test run uses servers on this machine" in lines
    assert lines[-1] == "no problem"


def test_what_is_missing_of_a_machine_is_a_warning(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status, lines, _ = doctor(capsys)
    assert status == 0
    at = lines.index("  warning  gpus: none is visible")
    assert lines[at + 1].lstrip().startswith("→ if there should be one, check `nvidia-smi`")
    assert "  warning  containers: neither docker nor podman is installed" in lines
    assert "  ok       engines on PATH: none (server configs may name others)" in lines


def test_a_run_that_uses_servers_now_is_told(capsys):
    with holder("load") as other:
        _, lines, _ = doctor(capsys)
        assert "  warning  load: another test run uses servers on this machine now" in lines
        other.stdin.close()
        other.wait(20)
    with lease("load").acquire(timeout=0):
        pass


def test_a_server_that_can_be_started(capsys):
    config("good", "engine: vllm\nmodel: org/model\nrunner: {process: {executable: /bin/true}}\n")
    status, lines, _ = doctor(capsys, "--server", "good")
    assert status == 0
    own = lines[lines.index("server good (servers/good.yaml)") :]
    assert "  ok       program: /bin/true" in own
    assert any("org/model is in the cache" in line for line in own)
    assert own[-1] == "no problem"


def test_each_problem_is_told_with_its_mend(capsys):
    config(
        "bad",
        "engine: vllm\nmodel: /no/model\ngpus: 2\nrunner: {process: {executable: /no/vllm}}\n"
        "emulation: {hardware: dgx-spark, model: qwen3-8b, weights: nvfp4, kv: fp8}\n",
    )
    status, lines, _ = doctor(capsys, "--server", "servers/bad.yaml")
    assert status == 1
    problems = [line for line in lines if line.startswith("  problem")]
    assert len(problems) == 3
    assert "  problem  model: /no/model is not there" in problems
    assert f"{'':>11}→ correct the path" in lines
    assert "  problem  gpus: 2 needed, 1 visible here" in problems
    assert lines[-2] == "3 problems"
    assert "tests run the emulated engine in its place and say EMULATED" in lines[-1]


def test_json(capsys):
    config("bad", "engine: vllm\nmodel: /no/model\nrunner: {process: {executable: /bin/true}}\n")
    status, lines, _ = doctor(capsys, "--server", "bad", "--format", "json")
    told = json.loads("\n".join(lines))
    assert (status, told["schema"], told["problems"]) == (1, "llmserve-doctor/1", 1)
    (bad,) = [finding for finding in told["findings"] if finding["level"] == "fail"]
    assert bad == {
        "about": "server bad (servers/bad.yaml)",
        "level": "fail",
        "what": "model: /no/model is not there",
        "mend": "correct the path",
    }
    assert {finding["about"] for finding in told["findings"]} == {"this machine", bad["about"]}


def test_a_config_that_is_not_there_is_a_usage_error(capsys):
    status, lines, error = doctor(capsys, "--server", "nope")
    assert (status, lines) == (2, [])
    assert "nope" in error
    assert "Traceback" not in error


def test_an_endpoint_is_asked(capsys, tmp_path):
    from pytest_llmserve.launch.ports import free_port

    port = free_port("127.0.0.1")
    config("there", f"engine: attach\nendpoint: http://127.0.0.1:{port}\n")
    status, lines, _ = doctor(capsys, "--server", "there")
    assert status == 1
    refuses = f"  problem  endpoint: http://127.0.0.1:{port} refuses connections"
    assert any(line.startswith(refuses) for line in lines)
    line = [sys.executable, str(FAKE), "--port", str(port), "--pids", str(tmp_path / "p")]
    with subprocess.Popen([*line, "--owned-by", "vllm"], env=dict(os.environ)) as server:
        try:
            assert soon(lambda: answers(port), within=20)
            status, lines, _ = doctor(capsys, "--server", "there")
        finally:
            server.kill()
    assert status == 0
    assert f"  ok       endpoint: http://127.0.0.1:{port} serves tiny (vllm 1.2.3)" in lines
