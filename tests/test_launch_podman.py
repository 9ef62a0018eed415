"""The container runner for real: podman, and an image made of what the machine has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_llmserve.engines import get_engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch.manager import ServerManager
from pytest_llmserve.servers import ContainerRunner, Emulation, ServerConfig
from tests.container_image import write_rootfs
from tests.launching import answers, soon

IMAGE = "localhost/llmserve-emulator:test"
ENGINE = get_engine("emulator")
ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="containers need Linux"),
    pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="these storage options need root"),
]


@pytest.fixture(scope="module")
def podman(tmp_path_factory):
    """A podman with storage of its own and the options that also work inside a container."""
    folder = tmp_path_factory.mktemp("podman")
    runtime = next((name for name in ("crun", "runc") if shutil.which(name)), None)
    if runtime is None:
        pytest.skip("neither crun nor runc is installed")
    wrapper = folder / "podman"
    wrapper.write_text(
        f"#!/bin/sh\nexec {shutil.which('podman')} --root {folder}/storage --runroot {folder}/run "
        f"--storage-driver=vfs --cgroup-manager=cgroupfs --events-backend=file "
        f'--runtime={runtime} "$@"\n'
    )
    wrapper.chmod(0o755)
    rootfs = folder / "rootfs.tar"
    write_rootfs(rootfs)
    change = ["--change", "ENV PYTHONPATH=/app", "--change", "ENV PATH=/usr/bin"]
    made = subprocess.run(
        [wrapper, "import", *change, rootfs, IMAGE], capture_output=True, text=True, check=False
    )
    rootfs.unlink()
    if made.returncode:
        pytest.skip(f"podman cannot make an image here: {made.stderr.strip().splitlines()[-1]}")
    limits = ["--ulimit=nofile=20000:20000", "--ulimit=nproc=1000:1000"]
    tried = subprocess.run(
        [wrapper, "run", "--rm", "--network=host", *limits, IMAGE, "python3", "-c", "print(5)"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.stdout.strip() != "5":
        pytest.skip(f"podman cannot run here: {tried.stderr.strip().splitlines()[-1]}")
    yield wrapper
    subprocess.run([wrapper, "rm", "--all", "--force"], capture_output=True, check=False)
    subprocess.run([wrapper, "rmi", "--all", "--force"], capture_output=True, check=False)


@pytest.fixture
def config(podman):
    return ServerConfig(
        name="contained",
        engine="emulator",
        model="Qwen3-8B",
        gpus=0,
        emulation=Emulation(),
        runner=ContainerRunner(
            image=IMAGE,
            runtime=str(podman),
            options=("--ulimit=nofile=20000:20000", "--ulimit=nproc=1000:1000"),
        ),
        ready_timeout=90,
        stop_timeout=5,
    )


@pytest.fixture
def manager(tmp_path):
    manager = ServerManager(tmp_path / "run", os.getpid())
    yield manager
    manager.stop_all()


def containers(podman):
    told = subprocess.run(
        [podman, "ps", "--all", "--format", "{{.Names}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.split()


def port_of(server):
    return int(server.endpoint.rpartition(":")[2])


def test_starts_serves_and_leaves_nothing(podman, config, manager, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a-secret-token")
    mounted = tmp_path / "cache"
    runner = replace(
        config.runner, mounts=(f"{mounted}:/cache",), env=("MY_TOKEN", "NOT_SET_ANYWHERE")
    )
    seen = []
    server = manager.get(replace(config, runner=runner, env={"MINE": "1"}), ENGINE, seen.append)

    assert (server.emulated, server.model) == (True, "Qwen3-8B")
    assert server.version
    assert manager.alive(server)
    (name,) = containers(podman)
    inside = subprocess.run(
        [podman, "exec", name, "python3", "-c", "import os; print(dict(os.environ))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "'MY_TOKEN': 'a-secret-token'" in inside
    assert "'MINE': '1'" in inside
    assert "NOT_SET_ANYWHERE" not in inside
    assert mounted.is_dir(), "the folder to mount was made"
    client = Path(f"/proc/{server.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    assert "MY_TOKEN" in client
    assert "a-secret-token" not in client
    assert seen[-1].startswith("ready after")
    assert soon(lambda: "Listening on" in Path(server.log).read_text()), "its log is kept"

    manager.stop_all()
    assert containers(podman) == []
    assert not answers(port_of(server))


def test_container_that_is_killed_is_seen(podman, config, manager):
    server = manager.get(config, ENGINE, lambda _: None)
    (name,) = containers(podman)
    subprocess.run([podman, "kill", name], capture_output=True, check=True)
    assert soon(lambda: not manager.alive(server))
    assert "exit code 137" in manager.exit_reason(server)
    assert soon(lambda: containers(podman) == [])


def test_sigkill_of_the_client_removes_the_container(podman, config, manager):
    server = manager.get(config, ENGINE, lambda _: None)
    os.kill(server.pid, signal.SIGKILL)
    assert soon(lambda: containers(podman) == [] and not answers(port_of(server)), within=10)


@pytest.mark.parametrize("who", ["owner", "keeper"])
def test_sigkill_of_owner_or_supervisor_removes_the_container(podman, config, tmp_path, who):
    code = textwrap.dedent(
        f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from pytest_llmserve.engines import get_engine
        from pytest_llmserve.launch.manager import ServerManager
        from pytest_llmserve.servers import *
        manager = ServerManager(Path({str(tmp_path / "run")!r}), os.getpid())
        config = {config!r}
        print(manager.get(config, get_engine("emulator"), lambda _: None).endpoint, flush=True)
        time.sleep(600)
        """
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = int(owner.stdout.readline().rpartition(":")[2])
        assert len(containers(podman)) == 1
        (status,) = (tmp_path / "run").rglob("status.json")
        victim = owner.pid if who == "owner" else json.loads(status.read_text())["keeper"]
        os.kill(victim, signal.SIGKILL)
        assert soon(lambda: containers(podman) == [] and not answers(port), within=10)
    finally:
        owner.kill()
        owner.communicate()


def test_image_without_the_program_is_explained(config, manager):
    engine = replace(ENGINE, program="no-such-program")
    with pytest.raises(ServerError, match="the image does not have the engine's program"):
        manager.get(config, engine, lambda _: None)


def test_image_that_is_not_here_is_explained(config, manager):
    runner = replace(config.runner, image="127.0.0.1:1/no/such:image")
    with pytest.raises(ServerError, match="the image is not here and cannot be pulled"):
        manager.get(replace(config, runner=runner), ENGINE, lambda _: None)


def test_wrong_option_of_the_engine_is_explained(config, manager):
    emulation = Emulation(options={"no-such-option": 1})
    with pytest.raises(ServerError, match="does not know the option --no-such-option"):
        manager.get(replace(config, emulation=emulation), ENGINE, lambda _: None)
