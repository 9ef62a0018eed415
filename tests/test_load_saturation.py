"""When the client is what limits a run, the run is no measurement and says so."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time

from emulated import emulated
from wire_server import WireServer, steady

from pytest_llmserve.load import control
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop
from pytest_llmserve.metrics.definitions import measure
from pytest_llmserve.verdict.validity import check

POOL = tuple(range(1000, 1200))


def judge(record, plan):
    found = check(record, measure(record, plan), plan, counters={}, bounds={})
    return {one.check: one for one in found}


def held(monkeypatch, running, stopped):
    """Let workers run for `running` seconds, then stop them for `stopped`, over and over."""
    popen = subprocess.Popen
    over = threading.Event()

    def hold(process):
        while process.poll() is None and not over.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(stopped)
                os.kill(process.pid, signal.SIGCONT)
            time.sleep(running)

    def start(*args, **kwargs):
        process = popen(*args, **kwargs)
        threading.Thread(target=hold, args=(process,), daemon=True).start()
        return process

    monkeypatch.setattr(control.subprocess, "Popen", start)
    return over


def test_a_client_that_gets_a_small_share_of_the_processor(monkeypatch):
    plan = LoadPlan(closed_loop(4, ramp=0.0), Workload(16, 50), duration=2.0)
    with WireServer(steady(0.02, 0.005)) as server:
        target = Target(server.url, "m", token_ids=POOL)
        over = held(monkeypatch, running=0.02, stopped=0.15)
        record = drive(target, plan)
        over.set()
    found = judge(record, plan)["client_cpu"]
    assert not found.ok
    assert found.detail.startswith("the client was the bottleneck, not the server")
    assert "a tenth of the events waited" in found.detail


def test_a_server_at_its_maximum_and_a_client_held_back(monkeypatch):
    flags = ("--load-time", "0", "--served-model-name", "m", "--schedule", "max-rate")
    plan = LoadPlan(closed_loop(8, ramp=0.0), Workload(16, 3000), duration=2.0, drain=30)
    with emulated(*flags) as server:
        target = Target(f"http://127.0.0.1:{server.port}", "m", {}, {"ignore_eos": True}, POOL)
        over = held(monkeypatch, running=0.02, stopped=0.15)
        record = drive(target, plan)
        over.set()
    found = judge(record, plan)["client_cpu"]
    assert not found.ok
    assert found.detail.startswith("the client was the bottleneck, not the server")


def test_a_server_without_any_schedule_is_named_as_the_limit_or_the_client_is():
    """The emulator's own maximum: whoever gives way, the check says how near the client was."""
    flags = ("--load-time", "0", "--served-model-name", "m", "--schedule", "max-rate")
    plan = LoadPlan(closed_loop(8, ramp=0.0), Workload(16, 2000), duration=1.5, drain=20)
    with emulated(*flags) as server:
        target = Target(f"http://127.0.0.1:{server.port}", "m", {}, {"ignore_eos": True}, POOL)
        record = drive(target, plan)
    assert not record.error.any()
    assert (record.events == 2000).all()
    found = judge(record, plan)["client_cpu"]
    span = record.end.max() - record.info.start
    behind = measure(record, plan)["client_lag"]["p90"] or 0.0
    worked = record.info.cpu - record.info.spun
    assert found.ok == (worked / span < 0.9 and behind <= 0.02)
