"""Calls into a driver keep to one core, and the client keeps off it."""

from __future__ import annotations

import io
import os
import sys
from types import SimpleNamespace

import pytest
from test_telemetry import nvml, record

from pytest_llmserve.load import priority, worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")


@pytest.fixture
def cores(monkeypatch):
    """A machine with cores 2 to 9, and what threads were told to use."""
    told = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2, 10)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: told.append((pid, cores)))
    return told


def test_telemetry_has_a_core_that_the_client_leaves_to_it(cores, monkeypatch):
    record(nvml())
    assert cores == [(0, {9})]
    with pytest.raises(ValueError, match="load"):
        run_worker(monkeypatch)
    assert cores[1:] == [(0, set(range(2, 9)))]


def run_worker(monkeypatch):
    """The worker's main, up to where it begins its load."""

    def load(_):
        raise ValueError("load")

    monkeypatch.setattr(worker, "Worker", load)
    monkeypatch.setattr(worker, "_raise_file_limit", lambda: None)
    monkeypatch.setattr(worker.os, "set_blocking", lambda fd, blocking: None)

    monkeypatch.setattr(worker.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"{}")))
    worker.main()


@pytest.mark.parametrize("few", [{0}, {0, 1}, {1, 3, 5}])
def test_few_cores_are_for_everybody(few, monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: few)
    assert priority.core_for_drivers() is None
    record(nvml())
    assert cores == []


def test_what_the_system_refuses_is_done_without(monkeypatch):
    def refuse(pid, cores):
        raise OSError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    priority.keep_to(0)
    priority.keep_off(0)
