"""Leases of the machine: one process at a time, and never stale."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from filelock import Timeout

from pytest_llmserve.launch.leases import lease

ROOT = Path(__file__).parents[1]


@pytest.fixture
def resource(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield f"gpu {uuid.uuid4()}"
    monkeypatch.undo()
    import tempfile

    tempfile.tempdir = None


def holder(resource):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pytest_llmserve.launch.leases import lease\n"
        f"with lease({resource!r}):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_waits_until_it_is_given_back(resource):
    with holder(resource) as other:
        with pytest.raises(Timeout):
            lease(resource).acquire(timeout=0.2)
        with lease(resource + " of something else"):
            pass
        other.stdin.close()
        with lease(resource).acquire(timeout=20):
            assert other.wait(20) == 0


def test_the_end_of_its_holder_frees_it_even_after_sigkill(resource):
    with holder(resource) as other:
        other.send_signal(signal.SIGKILL)
        with lease(resource).acquire(timeout=20):
            pass


def test_the_same_process_may_enter_again_from_anywhere(resource):
    with lease(resource), lease(resource):
        pass
    with holder(resource) as other:  # it is free again
        other.stdin.close()
