"""vLLM itself through the launcher: started once, described, ended; and its failures explained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_llmserve.engines import get_engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch import supervisor
from pytest_llmserve.launch.attach import attach
from pytest_llmserve.launch.manager import ServerManager
from pytest_llmserve.server_files import load_server_config
from pytest_llmserve.servers import ServerConfig
from tests.launching import living, soon

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "suites/servers/vllm-tiny-cpu.yaml"
ENGINE = get_engine("vllm")


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    manager = ServerManager(tmp_path_factory.mktemp("run"), os.getpid())
    yield manager
    manager.stop_all()


@pytest.fixture
def config(tiny_model, monkeypatch):
    monkeypatch.setenv("LLMSERVE_TINY_MODEL", str(tiny_model))
    return load_server_config(CONFIG)


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture
def server(manager, config, progress):
    return manager.get(config, ENGINE, progress.append)


def tree_of(server):
    status = json.loads((Path(server.log).parent / "status.json").read_text())
    return set(supervisor.descendants(status["guard"])) | {status["guard"]}


def test_stages_of_loading_are_shown(server, progress):
    told = " / ".join(progress)
    assert progress[0] == "starting vllm"
    assert "loading weights" in told
    assert "KV cache allocated" in told
    assert progress[-1].startswith("ready after")


def test_server_describes_itself(server):
    assert server.version.startswith("0.")
    assert server.model == "tiny"
    assert not server.emulated
    assert server.effective["max_model_len"] == 2048
    assert server.effective["max_num_seqs"] == 64
    assert server.effective["load_format"] == "dummy"
    assert server.effective["enforce_eager"] is True


def test_asked_for_again_it_costs_no_start(server, manager, config):
    seen = []
    assert manager.get(config, ENGINE, seen.append) == server
    assert seen == []


def test_it_generates_the_asked_number_of_tokens_for_who_has_the_key(server):
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 9, **ENGINE.body}
    request = urllib.request.Request(
        f"{server.endpoint}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"},
    )
    usage = json.load(urllib.request.urlopen(request, timeout=60))["usage"]
    assert usage["completion_tokens"] == 9
    assert usage["prompt_tokens"] == 3
    request.remove_header("Authorization")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=60)


def test_counters_have_the_names_we_know(server):
    text = urllib.request.urlopen(f"{server.endpoint}/metrics", timeout=60).read().decode()
    names = {line.partition("{")[0] for line in text.splitlines() if line.startswith("vllm:")}
    for ours, known in ENGINE.counters.items():
        if ours.startswith("spec_"):
            continue  # only there with speculative decoding
        theirs = {name for k in known for name in (k, f"{k}_sum")}
        assert theirs & names, f"{ours}: none of {known} in /metrics"


def test_attached_to_it_is_recognised(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", server.api_key)
    config = ServerConfig(
        name="attach", engine="attach", endpoint=server.endpoint, api_key_env="SOME_KEY"
    )
    found = attach(config)
    assert (found.engine, found.model, found.emulated) == ("vllm", "tiny", False)
    assert found.version == server.version


def test_key_is_in_no_log_and_no_command_line(server):
    assert server.api_key not in Path(server.log).read_text(errors="replace")
    for pid in living(tree_of(server)):
        assert server.api_key not in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")


def test_sigkill_of_the_api_server_orphans_nothing(server, manager):
    tree = tree_of(server)
    assert len(tree) >= 5, "guard, keeper, API server, engine core, worker"
    os.kill(server.pid, signal.SIGKILL)
    assert soon(lambda: not living(tree), within=10)
    assert not manager.alive(server)
    assert "SIGKILL" in manager.exit_reason(server)


def test_killed_worker_ends_the_server_and_is_named(manager, config):
    server = manager.get(config, ENGINE, lambda _: None)  # the one before was killed
    tree = tree_of(server)
    workers = [pid for pid in tree if _title(pid).startswith("VLLM::Worker")]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    assert soon(lambda: not manager.alive(server), within=30)
    assert "a worker process of vLLM was killed or crashed" in manager.exit_reason(server)
    assert soon(lambda: not living(tree), within=10)


def _title(pid):
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")


def test_sigkill_of_pytest_leaves_no_process(config, tmp_path):
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from pytest_llmserve.engines import get_engine\n"
        "from pytest_llmserve.launch.manager import ServerManager\n"
        "from pytest_llmserve.servers import *\n"
        f"manager = ServerManager(Path({str(tmp_path)!r}), os.getpid())\n"
        f"manager.get({config!r}, get_engine('vllm'), lambda _: None)\n"
        "print('up', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"up\n"
        (status,) = tmp_path.rglob("status.json")
        guard = json.loads(status.read_text())["guard"]
        tree = set(supervisor.descendants(guard)) | {guard}
        assert len(living(tree)) >= 5
        owner.send_signal(signal.SIGKILL)
    assert soon(lambda: not living(tree), within=5)


def test_sigkill_of_the_supervisor_leaves_no_process(manager, config):
    server = manager.get(config, ENGINE, lambda _: None)  # the one before was killed
    status = json.loads((Path(server.log).parent / "status.json").read_text())
    tree = tree_of(server)
    os.kill(status["keeper"], signal.SIGKILL)
    assert soon(lambda: not living(tree), within=5)


TWO_TESTS = """
import os, signal, threading
import pytest
from pytest_llmserve import at_least, closed_loop
SHORT = dict(duration=2, prompt_tokens=16, output_tokens=8)
@pytest.mark.llmserve(server="vllm-tiny-cpu")
def test_measures(llm_server, load, slo):
    print("PID", llm_server.pid)
    slo.check(load(closed_loop(users=2), **SHORT), at_least("output_throughput", 1))
@pytest.mark.llmserve(server="vllm-tiny-cpu")
def test_its_end_is_seen(llm_server, load):
    print("PID", llm_server.pid)
    threading.Timer(2, os.kill, (llm_server.pid, signal.SIGKILL)).start()
    load(closed_loop(users=2), duration=60)
"""


def test_one_start_for_two_tests_and_a_kill_under_load_is_told(config, pytester):
    pytester.makepyfile(TWO_TESTS)
    result = pytester.runpytest_subprocess(
        "-s", "--llmserve-engine=vllm", f"-ollmserve_server_dirs={CONFIG.parent}", timeout=200
    )
    result.assert_outcomes(passed=1, errors=1)
    pids = {line.split("PID")[1].split()[0] for line in result.outlines if "PID" in line}
    assert len(pids) == 1
    (invalid,) = [line for line in result.outlines if line.startswith("invalid: server_alive")]
    assert "vllm-tiny-cpu was killed by signal 9 (SIGKILL)" in invalid
    log = Path(invalid.rpartition("Its log: ")[2])
    assert "vLLM" in log.read_text(errors="replace")
    assert len(list(log.parent.glob("server*.log"))) == 1, "it was started once"


def failure(config, tmp_path):
    manager = ServerManager(tmp_path / "run", os.getpid())
    try:
        with pytest.raises(ServerError) as caught:
            manager.get(config, ENGINE, lambda _: None)
    finally:
        manager.stop_all()
    return str(caught.value)


def changed(config, **args):
    model = args.pop("model", config.model)
    return replace(config, model=model, args={**config.args, **args})


def test_wrong_flag(config, tmp_path):
    told = failure(changed(config, **{"no-such-flag": 3}), tmp_path)
    assert "does not know the argument --no-such-flag" in told


def test_folder_without_a_model(config, tmp_path):
    (tmp_path / "empty").mkdir()
    told = failure(changed(config, model=str(tmp_path / "empty")), tmp_path)
    assert "the model is neither a directory here nor a name on the Hugging Face hub" in told
    assert "Invalid repository ID or local directory" in told


def test_stop_leaves_no_process(manager, config):
    server = manager.get(config, ENGINE, lambda _: None)  # the one before was killed
    tree = tree_of(server)
    manager.stop_all()
    assert not living(tree)
