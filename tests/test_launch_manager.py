"""A server is started once, described by its own words, shared, and ended with the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pytest_llmserve.engines import get_engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch.manager import ServerManager
from pytest_llmserve.servers import ProcessRunner
from tests.launching import answers, cleaned, fake_config, fake_engine, living, pids_in, soon

HERE = Path(__file__).parent


@pytest.fixture
def pids(tmp_path):
    yield from cleaned(tmp_path / "pids")


@pytest.fixture
def manager(tmp_path):
    manager = ServerManager(tmp_path / "run", os.getpid())
    yield manager
    manager.stop_all()


def port_of(server):
    return int(server.endpoint.rpartition(":")[2])


def test_starts_once_and_describes_the_server(manager, pids):
    config, engine, seen = fake_config(pids, args={"workers": 2}), fake_engine(), []
    server = manager.get(config, engine, seen.append)
    again = manager.get(config, engine, seen.append)

    assert again == server
    assert len(pids_in(pids)) == 3, "the server and two workers, once"
    assert (server.engine, server.model, server.version) == ("fake", "tiny", "1.2.3")
    assert server.effective == {"served": "tiny"}
    assert not server.emulated
    assert server.pid in pids_in(pids)
    assert manager.alive(server)
    assert manager.exit_reason(server) is None
    assert seen[0] == "starting fake"
    assert "opening" in seen
    assert seen[-1].startswith("ready after")


def test_stop_leaves_no_process_and_no_port(manager, pids):
    server = manager.get(fake_config(pids, args={"workers": 4}), fake_engine(), lambda _: None)
    assert soon(lambda: len(pids_in(pids)) == 5)
    manager.stop_all()
    assert not living(pids_in(pids))
    assert not answers(port_of(server))
    assert not manager.alive(server)


def test_configs_that_differ_in_name_only_are_one_server(manager, pids):
    one = manager.get(fake_config(pids, name="one"), fake_engine(), lambda _: None)
    two = manager.get(fake_config(pids, name="two / 2"), fake_engine(), lambda _: None)
    assert one.pid == two.pid
    assert two.config.name == "two / 2"


def test_configs_that_differ_are_different_servers(manager, pids):
    engine = fake_engine()
    first = manager.get(fake_config(pids), engine, lambda _: None)
    second = manager.get(fake_config(pids, args={"owned-by": "x"}), engine, lambda _: None)
    assert first.endpoint != second.endpoint
    assert manager.alive(first)
    assert manager.alive(second)


def test_stages_of_loading_are_told_as_they_come(manager, pids):
    say = ["Loading weights: 20%", "nothing", "Loading weights: 80%"]
    seen = []
    config = fake_config(pids, args={"say": say, "load-time": 1.0})
    manager.get(config, fake_engine(), seen.append)
    assert "loading weights, 80 %" in seen
    assert seen.index("loading weights, 80 %") < seen.index("opening")


def test_key_is_made_and_asked_for_but_not_on_the_command_line(manager, pids, tmp_path):
    server = manager.get(fake_config(pids), fake_engine(), lambda _: None)
    assert len(server.api_key) >= 20
    assert server.api_key not in repr(server)
    cmdline = Path(f"/proc/{server.pid}/cmdline").read_text()
    assert server.api_key not in cmdline
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and server.api_key in path.read_text(errors="replace"):
            assert path.name == "state.json"
            assert path.stat().st_mode & 0o077 == 0, "only its owner may read it"
    manager.stop_all()
    assert not list((tmp_path / "run").rglob("state.json"))


def test_environment_of_engine_config_and_gpu(manager, pids, monkeypatch):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "x")
    config = fake_config(pids, env={"MINE": "1", "FAKE_SETTING": "from the config"})
    server = manager.get(config, fake_engine(), lambda _: None)
    words = Path(f"/proc/{server.pid}/environ").read_text().split("\0")
    environment = dict(word.split("=", 1) for word in words if word)
    assert environment["MINE"] == "1"
    assert environment["FAKE_SETTING"] == "from the config"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "PYTEST_CURRENT_TEST" not in environment


def test_failed_start_is_one_diagnosis_and_is_not_tried_again(manager, pids):
    say = ["reading", "ValueError: no memory for weights", "RuntimeError: engine failed"]
    config = fake_config(pids, args={"say": say, "exit-code": 3})
    with pytest.raises(ServerError) as failure:
        manager.get(config, fake_engine(), lambda _: None)
    text = str(failure.value)
    assert text.startswith("fake (fake) did not start: no memory for weights; buy more.")
    assert "RuntimeError: engine failed" in text
    log = Path(text.rpartition("Log: ")[2])
    assert "reading" in log.read_text()
    with pytest.raises(ServerError, match="no memory for weights"):
        manager.get(config, fake_engine(), lambda _: None)
    assert len(pids_in(pids)) == 1


def test_unknown_failure_tells_how_it_ended_and_its_last_lines(manager, pids):
    config = fake_config(pids, args={"say": ["the moon is full"], "exit-code": 7})
    with pytest.raises(ServerError) as failure:
        manager.get(config, fake_engine(), lambda _: None)
    assert "ended by itself with exit code 7" in str(failure.value)
    assert "the moon is full" in str(failure.value)


def test_wrong_argument_is_named(manager, pids):
    with pytest.raises(ServerError, match="no argument --wrong"):
        manager.get(fake_config(pids, args={"wrong": True}), fake_engine(), lambda _: None)


def test_time_out_ends_the_tree_and_says_so(manager, pids):
    config = fake_config(pids, args={"never-ready": True, "workers": 2}, ready_timeout=0.8)
    with pytest.raises(ServerError, match=r"not ready after 0.8 s \(ready_timeout\)"):
        manager.get(config, fake_engine(), lambda _: None)
    assert not living(pids_in(pids))


def test_server_that_falls_silent_is_given_up_before_the_time_out(manager, pids):
    say = ["Loading weights: 10%"]
    changes = {"ready_timeout": 60.0, "stall_timeout": 0.7}
    config = fake_config(pids, args={"say": say, "load-time": 600}, **changes)
    with pytest.raises(ServerError) as failure:
        manager.get(config, fake_engine(), lambda _: None)
    assert "its log said nothing new for 0.7 s (stall_timeout)" in str(failure.value)
    assert "Loading weights: 10%" in str(failure.value)
    assert not living(pids_in(pids))


def test_port_that_is_taken_meanwhile_is_exchanged(manager, pids, tmp_path):
    seen = []
    config = fake_config(pids, args={"first-port-taken": str(tmp_path / "was taken")})
    server = manager.get(config, fake_engine(), seen.append)
    assert manager.alive(server)
    assert any("was taken meanwhile" in line for line in seen)


def test_port_of_the_config_that_is_taken_is_named(manager, pids):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = fake_config(pids, port=other.getsockname()[1])
        taken = r"port: \d+ of 127.0.0.1 cannot be used \(Address already in use\): leave `port`"
        with pytest.raises(ServerError, match=taken):
            manager.get(config, fake_engine(), lambda _: None)


def test_program_that_is_missing_is_named(manager, pids):
    config = fake_config(pids, runner=ProcessRunner(executable="/no/such/server"))
    with pytest.raises(ServerError, match=r"/no/such/server is not there; correct the path"):
        manager.get(config, fake_engine(), lambda _: None)


def test_engine_that_is_only_attached_to_is_not_started(manager, pids):
    config = fake_config(pids, engine="dynamo", runner=ProcessRunner())
    with pytest.raises(ServerError, match=r"dynamo is not started by pytest: start it .* endpoint"):
        manager.get(config, get_engine("dynamo"), lambda _: None)


def test_program_that_cannot_be_executed_is_told(manager, pids, tmp_path):
    broken = tmp_path / "server"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    config = fake_config(pids, runner=ProcessRunner(executable=str(broken)))
    with pytest.raises(ServerError, match="could not be run"):
        manager.get(config, fake_engine(), lambda _: None)


def test_model_folder_that_is_missing_is_named_before_anything_starts(manager, pids):
    with pytest.raises(ServerError, match="model: /no/such/model is not there"):
        manager.get(fake_config(pids, model="/no/such/model"), fake_engine(), lambda _: None)
    assert not pids_in(pids)


def test_server_that_dies_is_seen_explained_and_started_again(manager, pids):
    config, engine = fake_config(pids, args={"workers": 2}), fake_engine()
    server = manager.get(config, engine, lambda _: None)
    before = pids_in(pids)
    os.kill(server.pid, signal.SIGKILL)
    assert soon(lambda: not manager.alive(server))
    reason = manager.exit_reason(server)
    assert "was killed by signal 9 (SIGKILL)" in reason
    assert server.log in reason
    assert soon(lambda: not living(before)), "its workers go with it"
    fresh = manager.get(config, engine, lambda _: None)
    assert manager.alive(fresh)
    assert fresh.pid != server.pid


def test_manager_of_another_process_shares_but_does_not_end_servers(manager, pids, tmp_path):
    server = manager.get(fake_config(pids), fake_engine(), lambda _: None)
    other = ServerManager(tmp_path / "run", os.getppid())
    assert other.get(fake_config(pids), fake_engine(), lambda _: None) == server
    other.stop_all()
    assert manager.alive(server)


def test_processes_that_ask_at_once_get_one_server(manager, pids, tmp_path):
    code = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = {[str(HERE.parent)]!r}
        from pathlib import Path
        from pytest_llmserve.launch.manager import ServerManager
        from tests.launching import fake_config, fake_engine
        manager = ServerManager(Path({str(tmp_path / "run")!r}), {os.getpid()})
        config = fake_config(Path({str(pids)!r}), args={{"load-time": 0.5}})
        print(manager.get(config, fake_engine(), lambda _: None).endpoint)
        """
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    endpoints = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert len(endpoints) == 1
    assert len(pids_in(pids)) == 1
    (endpoint,) = endpoints
    assert answers(int(endpoint.rpartition(":")[2])), "it outlives the worker that started it"


def test_state_is_plain_json(manager, pids, tmp_path):
    manager.get(fake_config(pids), fake_engine(), lambda _: None)
    (state,) = (tmp_path / "run").rglob("state.json")
    assert json.loads(state.read_text())["engine"] == "fake"
