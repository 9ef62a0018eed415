"""GPUs are leased to servers: none has two, and a server makes room for the next one.

There is no GPU where this is tested: a program named nvidia-smi lists two. All else is real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch.gpus import taken, visible_gpus
from pytest_llmserve.launch.manager import ServerManager
from tests.launching import cleaned, fake_config, fake_engine, living, pids_in, soon

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Two GPUs, and a folder of locks of its own."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-a)'\necho 'GPU 1: B (UUID: GPU-b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def pids(tmp_path):
    yield from cleaned(tmp_path / "pids")


@pytest.fixture
def manager(tmp_path):
    manager = ServerManager(tmp_path / "run", os.getpid())
    yield manager
    manager.stop_all()


def gpus_of(server):
    words = Path(f"/proc/{server.pid}/environ").read_text().split("\0")
    return dict(word.split("=", 1) for word in words if word)["CUDA_VISIBLE_DEVICES"]


def start(manager, pids, name, gpus=1, told=None, **changes):
    config = fake_config(pids, name=name, env={"NAME": name}, gpus=gpus, **changes)
    return manager.get(config, fake_engine(), [].append if told is None else told.append)


def test_gpus_that_are_visible(monkeypatch):
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-x")
    assert visible_gpus() == ["1", "GPU-x"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_each_is_taken_once():
    with taken(["0", "1"], 1) as first, taken(["0", "1"], 1) as second:
        assert (first.ids, second.ids) == (("0",), ("1",))
        with taken(["0", "1"], 1) as third:
            assert third is None
    with taken(["0", "1"], 2) as both:
        assert both.ids == ("0", "1")


def test_servers_get_gpus_of_their_own(manager, pids):
    one, two = start(manager, pids, "one"), start(manager, pids, "two")
    assert {gpus_of(one), gpus_of(two)} == {"0", "1"}
    assert gpus_of(start(manager, pids, "none", gpus=0)) == ""


def test_the_server_longest_unused_makes_room(manager, pids):
    told = []
    one, two = start(manager, pids, "one"), start(manager, pids, "two")
    assert start(manager, pids, "one") == one, "asked for again"
    three = start(manager, pids, "three", told=told)
    assert "two makes room on the GPU" in told
    assert manager.alive(one)
    assert not manager.alive(two)
    assert gpus_of(three) == "1"
    again = start(manager, pids, "two")
    assert manager.alive(again)
    assert not manager.alive(one)


def test_a_server_that_needs_both_gets_both(manager, pids):
    one, two = start(manager, pids, "one"), start(manager, pids, "two")
    both = start(manager, pids, "both", gpus=2)
    assert gpus_of(both) == "0,1"
    assert not living({one.pid, two.pid})


def test_a_gpu_is_free_when_its_tree_has_ended(manager, pids):
    start(manager, pids, "both", gpus=2, args={"workers": 2})
    with taken(["0", "1"], 1) as nothing:
        assert nothing is None
    manager.stop_all()
    assert not living(pids_in(pids))
    with taken(["0", "1"], 2) as both:
        assert both is not None


def test_another_run_is_waited_for(manager, pids, tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pytest_llmserve.launch.gpus import taken\n"
        "with taken(['0', '1'], 2) as gpus:\n"
        "    print(gpus.ids, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ServerError, match=r"other test runs held the GPUs for 0\.5 s"):
            start(manager, pids, "late", ready_timeout=0.5)
        told = []

        def end_the_other(stage):
            told.append(stage)
            if "waiting" in stage:
                other.send_signal(signal.SIGKILL)

        config = fake_config(pids, name="patient", gpus=1)
        server = manager.get(config, fake_engine(), end_the_other)
    assert "waiting for a GPU that another run holds" in told
    assert manager.alive(server)


def test_more_gpus_than_there_are(manager, pids):
    with pytest.raises(ServerError, match="gpus: 3 needed, 2 visible here: check `nvidia-smi`"):
        start(manager, pids, "large", gpus=3)


def test_gpus_of_a_run_that_was_killed_are_free(pids, tmp_path):
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from pytest_llmserve.launch.manager import ServerManager\n"
        "from tests.launching import fake_config, fake_engine\n"
        f"manager = ServerManager(Path({str(tmp_path / 'other')!r}), os.getpid())\n"
        f"config = fake_config(Path({str(pids)!r}), gpus=2, args={{'workers': 2}})\n"
        "manager.get(config, fake_engine(), lambda _: None)\n"
        "print('up', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"up\n"
        owner.send_signal(signal.SIGKILL)

    def free():
        with taken(["0", "1"], 2) as both:
            return both is not None

    assert soon(free)
    assert not living(pids_in(pids)), "free means that the tree is gone"
