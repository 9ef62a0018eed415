"""Servers that somebody else runs: recognised, or refused in one sentence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from pytest_llmserve.engines import get_engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch.attach import attach
from pytest_llmserve.launch.manager import ServerManager
from pytest_llmserve.launch.ports import free_port
from pytest_llmserve.servers import Emulation, ServerConfig
from tests.launching import FAKE, answers, soon


def attached(endpoint, **changes):
    return ServerConfig(name="attach", engine="attach", endpoint=endpoint, gpus=0, **changes)


@pytest.fixture
def fake(tmp_path):
    """Runs the fake server on its own, as somebody else would; gives its endpoint."""
    running = []

    def start(*words, **variables):
        port = free_port("127.0.0.1")
        line = [sys.executable, str(FAKE), "--port", str(port), "--pids", str(tmp_path / "p")]
        running.append(subprocess.Popen([*line, *words], env=os.environ | variables))
        assert soon(lambda: answers(port), within=20)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "engine"),
    [
        ((), "attach"),
        (("--owned-by", "vllm"), "vllm"),
        (("--metric", "vllm:num_requests_running{x='1'}"), "vllm"),
        (("--metric", "sglang:num_running_reqs"), "sglang"),
        (("--owned-by", "llamacpp"), "llama.cpp"),
        (("--metric", "dynamo_frontend_requests_total{model='x'}"), "dynamo"),
        (("--owned-by", "tensorrt_llm"), "tensorrt-llm"),
    ],
)
def test_real_engines_are_told_apart(fake, words, engine):
    server = attach(attached(fake(*words) + "/v1"))
    assert (server.engine, server.emulated) == (engine, False)
    assert server.model == "tiny"
    assert server.pid is None
    assert not server.endpoint.endswith("/v1")


@pytest.mark.parametrize(
    "words",
    [("--owned-by", "pytest-llmserve-emulator"), ("--metric", "vllm:emulated_info{}")],
)
def test_emulated_engines_confess(fake, words):
    server = attach(attached(fake(*words)))
    assert (server.engine, server.emulated) == ("emulator", True)


def test_a_model_called_emulator_is_no_emulated_engine(fake):
    endpoint = fake("--owned-by", "vllm", "--metric", 'vllm:x{model="/data/emulator/m"}')
    assert not attach(attached(endpoint)).emulated


def test_model_that_is_served_or_not(fake):
    endpoint = fake()
    assert attach(attached(endpoint, model="tiny")).model == "tiny"
    with pytest.raises(ServerError, match=r"does not serve 'huge'; it serves tiny: name one"):
        attach(attached(endpoint, model="huge"))


def test_key_comes_from_the_environment(fake, monkeypatch):
    endpoint = fake(FAKE_API_KEY="the-secret-key")
    with pytest.raises(ServerError, match=r"wants an API key \(HTTP status 401\): name the vari"):
        attach(attached(endpoint))
    config = attached(endpoint, api_key_env="MY_KEY")
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ServerError, match="the environment variable MY_KEY is not set"):
        attach(config)
    monkeypatch.setenv("MY_KEY", "another-secret")
    with pytest.raises(ServerError, match="correct the key in MY_KEY") as error:
        attach(config)
    assert "another-secret" not in str(error.value)
    monkeypatch.setenv("MY_KEY", "the-secret-key")
    server = attach(config)
    assert server.api_key == "the-secret-key"
    assert "the-secret-key" not in repr(server)


def test_endpoint_that_refuses_is_named():
    endpoint = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(ServerError) as error:
        attach(attached(endpoint))
    assert str(error.value) == (
        f"{endpoint} refuses connections: start the server, or correct the endpoint "
        "(--llmserve-endpoint, or `endpoint` of the server config)."
    )


def answering(text):
    """A port on which every connection gets `text`; gives its endpoint."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(text)

    threading.Thread(target=talk, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"", "does not speak HTTP"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP status 404 and no list of models"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "HTTP status 200 and no list of models"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"data": 5}', "HTTP status 200 and no list of models"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"data": [1, {"x": 2}]}', "and no list of models"),
    ],
)
def test_what_is_no_such_server(text, part):
    listener, endpoint = answering(text)
    with listener, pytest.raises(ServerError) as error:
        attach(attached(endpoint))
    assert str(error.value).startswith(endpoint)
    assert part in str(error.value)


def test_name_that_cannot_be_resolved():
    with pytest.raises(ServerError, match="cannot be reached"):
        attach(attached("http://no-such-host.invalid:1"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    manager = ServerManager(tmp_path_factory.mktemp("run"), os.getpid())
    config = ServerConfig(
        name="emulated",
        engine="emulator",
        model="Qwen3-8B",
        gpus=0,
        emulation=Emulation(),
        ready_timeout=60,
    )
    yield manager, manager.get(config, get_engine("emulator"), lambda _: None)
    manager.stop_all()


def test_the_emulated_engine_is_launched_and_says_so(emulated):
    _, server = emulated
    assert (server.engine, server.emulated) == ("emulator", True)
    assert server.model == "Qwen3-8B"
    assert server.version


def test_the_emulated_engine_behind_a_url_is_found_out(emulated, monkeypatch):
    manager, server = emulated
    with pytest.raises(ServerError, match=r"wants an API key \(HTTP status 401\)"):
        attach(attached(server.endpoint))
    monkeypatch.setenv("ITS_KEY", server.api_key)
    config = attached(server.endpoint, api_key_env="ITS_KEY")
    found = manager.get(config, get_engine("attach"), lambda _: None)
    assert (found.engine, found.emulated) == ("emulator", True)
    assert found.effective == server.effective


def test_attached_server_that_is_gone_is_seen(fake, tmp_path):
    manager = ServerManager(tmp_path / "run", os.getpid())
    server = manager.get(attached(fake()), get_engine("attach"), lambda _: None)
    assert manager.alive(server)
    assert manager.exit_reason(server) is None
    pid = int((tmp_path / "p").read_text())
    os.kill(pid, 9)
    assert soon(lambda: not manager.alive(server))
    assert manager.exit_reason(server) == f"{server.endpoint} refuses connections now"
