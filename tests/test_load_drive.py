"""A whole load, from the plan to the record, through the worker process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from wire_server import WireServer, steady

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load import control
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import (
    LoadPlan,
    Target,
    Workload,
    closed_loop,
    open_loop,
    plan_from_dict,
    plan_to_dict,
)
from pytest_llmserve.load.record import ERRORS, Record

POOL = tuple(range(1000, 1200))


def prompts_of(server):
    return [tuple(body["prompt"]) for _, _, body in server.requests]


def test_a_closed_loop_keeps_its_users_busy(tmp_path):
    seen = []
    plan = LoadPlan(closed_loop(4, ramp=0.4), Workload(40, 5), duration=0.8, warmup=6, drain=5)
    with WireServer(steady(0.02, 0.01)) as server:
        target = Target(server.url, "m", {"X-Test": "1"}, {"ignore_eos": True}, POOL)
        record = drive(target, plan, progress=seen.append, record_path=tmp_path / "x.npz")
        prompts = prompts_of(server)
        bodies = [body for _, _, body in server.requests]
    planned = record.phase == 1
    assert (~planned).sum() == 6
    assert set(record.user[planned]) == {0, 1, 2, 3}
    assert not record.error.any()
    assert (record.output_tokens == 5).all()
    # Warm-up is over before the plan starts; nothing is sent after its end.
    assert record.end[~planned].max() <= record.info.start
    assert record.intended[planned].min() >= record.info.start
    assert record.intended.max() < record.info.plan_end
    # A user's next request is due when the last one ended.
    for user in range(4):
        rows = np.flatnonzero(record.user == user)
        assert record.intended[rows[1:]] == pytest.approx(record.end[rows[:-1]], abs=1e-3)
    starts = [record.intended[record.user == user].min() - record.info.start for user in range(4)]
    assert starts == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert len(set(prompts)) == len(prompts) == len(record.phase)
    assert all(len(prompt) == 40 and set(prompt) <= set(POOL) for prompt in prompts)
    assert all(body["ignore_eos"] and body["max_tokens"] == 5 for body in bodies)
    assert [p.phase for p in seen if p.phase in ("ramp", "load")]
    assert seen[-1].requests == len(record.phase)
    again = Record.load(tmp_path / "x.npz")
    assert again.info == record.info
    assert np.array_equal(again.event_time, record.event_time)


def test_the_same_seed_gives_the_same_requests_and_another_does_not():
    def run(seed):
        plan = LoadPlan(
            open_loop(30, lead_in=0.1), Workload(20, 1), duration=0.4, warmup=2, seed=seed
        )
        with WireServer(steady(0.0, 0.0)) as server:
            record = drive(Target(server.url, "m", token_ids=POOL), plan)
            return sorted(prompts_of(server)), record.intended[2:] - record.info.start

    (prompts, times), (again, times_again), (other, other_times) = run(1), run(1), run(2)
    assert prompts == again
    assert times == pytest.approx(times_again)
    assert not set(prompts) & set(other)
    assert len(times) != len(other_times) or not np.allclose(times, other_times)


def test_an_open_loop_does_not_wait_for_answers():
    plan = LoadPlan(
        open_loop(20, arrivals="constant", lead_in=0.0), Workload(8, 1), duration=0.5, drain=5
    )
    with WireServer(steady(1.0, 0.0)) as server:
        record = drive(Target(server.url, "m", token_ids=POOL), plan)
    assert record.intended - record.info.start == pytest.approx(np.arange(10) / 20)
    assert record.sent.max() < record.first.min()
    assert not record.error.any()
    assert record.end.max() > record.info.plan_end


def test_think_time_passes_between_requests():
    plan = LoadPlan(closed_loop(1, think_time=0.15), Workload(8, 1), duration=0.6)
    with WireServer(steady(0.01, 0.0)) as server:
        record = drive(Target(server.url, "m", token_ids=POOL), plan)
    assert record.intended[1:] - record.end[:-1] == pytest.approx(0.15, abs=1e-3)


def test_what_the_drain_does_not_finish_is_cancelled():
    plan = LoadPlan(closed_loop(2, ramp=0.0), Workload(8, 1000), duration=0.4, drain=0.2)
    with WireServer(steady(0.01, 0.02)) as server:
        began = time.monotonic()
        record = drive(Target(server.url, "m", token_ids=POOL), plan)
        assert time.monotonic() - began < 15
    assert [ERRORS[code] for code in record.error] == ["cancelled"] * 2
    assert (record.events > 3).all()
    assert (record.end >= record.info.plan_end + 0.2).all()


def test_a_shared_prefix_is_shared_and_the_rest_is_not():
    plan = LoadPlan(
        closed_loop(2), Workload(30, 1, shared_prefix=20), duration=0.3, warmup=2, seed=3
    )
    with WireServer(steady(0.01, 0.0)) as server:
        drive(Target(server.url, "m", token_ids=POOL), plan)
        prompts = prompts_of(server)
    assert len({prompt[:20] for prompt in prompts[2:]}) == 1
    assert prompts[0][:20] == prompts[1][:20] != prompts[2][:20]
    assert len({prompt[20:] for prompt in prompts}) == len(prompts)


def test_a_server_that_fails_is_not_hammered():
    def answer(conn, request):
        return b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"

    plan = LoadPlan(closed_loop(2, ramp=0.0), Workload(8, 1), duration=0.5)
    with WireServer(answer) as server:
        record = drive(Target(server.url, "m", token_ids=POOL), plan)
    assert {ERRORS[code] for code in record.error} == {"http_status"}
    assert (record.status == 503).all()
    assert 2 <= len(record.error) <= 12


def test_a_load_whose_server_dies_is_stopped_and_kept():
    plan = LoadPlan(closed_loop(2, ramp=0.0), Workload(8, 10000), duration=60)
    with WireServer(steady(0.01, 0.02)) as server:
        ask = time.monotonic() + 1.5
        record = drive(
            Target(server.url, "m", token_ids=POOL), plan, alive=lambda: time.monotonic() < ask
        )
    assert record.info.incomplete
    assert (record.events > 3).all()


def test_an_interrupt_saves_what_there_is(tmp_path, monkeypatch):
    plan = LoadPlan(closed_loop(2, ramp=0.0), Workload(8, 10000), duration=60)
    started = []
    popen = subprocess.Popen

    def spy(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(control.subprocess, "Popen", spy)

    def interrupt(progress):
        if progress.phase == "load" and progress.tokens > 10 and progress.elapsed > 0.2:
            os.kill(started[0].pid, signal.SIGINT)

    with WireServer(steady(0.01, 0.02)) as server:
        record = drive(Target(server.url, "m", token_ids=POOL), plan, progress=interrupt)
    assert record.info.incomplete
    assert record.events.sum() > 10


def test_the_worker_ends_with_its_parent(tmp_path):
    script = (
        "import sys; from pytest_llmserve.load.control import drive\n"
        "from pytest_llmserve.load.plan import *\n"
        "plan = LoadPlan(closed_loop(1), Workload(8, 10000), duration=60)\n"
        "drive(Target(sys.argv[1], 'm', token_ids=tuple(range(200))), plan)"
    )
    gone = threading.Event()

    def answer(conn, request):
        try:
            return steady(0.01, 0.02)(conn, request)
        except OSError:
            gone.set()
            raise

    with WireServer(answer) as server:
        parent = subprocess.Popen([sys.executable, "-c", script, server.url])
        while not server.requests:
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        assert gone.wait(10)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target("http://no-such-host.invalid:1", "m", token_ids=POOL), "cannot be resolved"),
        (Target("http://127.0.0.1:9", "m", {"A": "b\r\nc"}, token_ids=POOL), "line break"),
    ],
)
def test_a_load_that_cannot_be_driven_is_one_sentence(target, words):
    with pytest.raises(LoadError, match=words) as caught:
        drive(target, LoadPlan(closed_loop(1), duration=1))
    assert "\n" not in str(caught.value)


def test_a_worker_that_breaks_is_one_sentence(tmp_path):
    with pytest.raises(LoadError, match="left no record") as caught:
        drive(
            Target("http://127.0.0.1:9", "m", token_ids=POOL),
            LoadPlan(open_loop(1), duration=0.1),
            record_path=tmp_path / "no" / "such" / "folder.npz",
        )
    assert "\n" not in str(caught.value)


def test_a_plan_survives_json():
    import json

    for arrivals in (closed_loop(3, think_time=1.0), open_loop(2.5, arrivals="constant")):
        plan = LoadPlan(arrivals, Workload(5, 6, shared_prefix=2), duration=3, seed=9)
        assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: closed_loop(0),
        lambda: closed_loop(1, ramp=-1),
        lambda: open_loop(0),
        lambda: open_loop(1, arrivals="sometimes"),
        lambda: Workload(prompt_tokens=0),
        lambda: Workload(shared_prefix=200),
        lambda: Workload(api="words"),
        lambda: LoadPlan(closed_loop(1), duration=0),
        lambda: LoadPlan(closed_loop(1), warmup=-1),
    ],
)
def test_a_wrong_plan_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"\w+\(.*=.*\): .+"):
        wrong()
