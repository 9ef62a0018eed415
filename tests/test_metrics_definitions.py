from __future__ import annotations

import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_records import make_record

from pytest_llmserve.load.plan import LoadPlan, Workload, closed_loop, open_loop
from pytest_llmserve.metrics.definitions import concurrency, goodput, measure
from pytest_llmserve.metrics.window import window

CLOSED = LoadPlan(closed_loop(2), duration=10.0)
OPEN = LoadPlan(open_loop(1.0, lead_in=0.0), duration=10.0)


def test_the_window_opens_when_every_user_has_had_output():
    rows = [
        {"intended": 0.0, "user": 0, "events": [0.5, 9.0]},
        {"intended": 1.0, "user": 1, "events": [3.0, 9.0]},
        {"intended": 0.0, "user": 1, "events": [0.1], "phase": 0},
    ]
    assert window(make_record(rows, ramp_end=2.0), CLOSED) == (3.0, 10.0)
    assert window(make_record(rows, ramp_end=4.0), CLOSED) == (4.0, 10.0)
    assert window(make_record(rows, ramp_end=2.0, incomplete=True), CLOSED) == (3.0, 9.0)
    never = make_record(rows[:1])
    assert window(never, CLOSED) == (10.0, 10.0)
    assert window(make_record(rows, ramp_end=2.0), OPEN) == (2.0, 10.0)


def test_latencies_are_from_intention():
    row = {"intended": 1.0, "sent": 1.25, "events": [2.0, 2.5, 4.0], "end": 4.5}
    found = measure(make_record([row]), OPEN)
    assert found["ttft"]["p50"] == 1.0
    assert found["send_delay"]["p50"] == 0.25
    assert found["e2e"]["p50"] == 3.5
    assert found["tpot"]["p50"] == 1.0
    assert found["user_throughput"]["p50"] == 1.0
    assert [found["itl"][name] for name in ("n", "mean", "max")] == [2, 1.0, 1.5]
    assert found["requests"] == 1


def test_tpot_leaves_out_the_tokens_of_the_first_event():
    row = {"intended": 0.0, "events": [1.0, 2.0], "tokens": [3, 5], "output_tokens": 8}
    found = measure(make_record([row]), OPEN)
    assert found["tpot"]["p50"] == pytest.approx(0.2)
    assert found["tokens_per_event"] == 4.0
    assert found["itl"]["n"] == 1


def test_a_request_of_one_event_has_no_tpot():
    found = measure(make_record([{"intended": 0.0, "events": [1.0]}]), OPEN)
    assert found["tpot"]["n"] == 0
    assert found["tpot"]["p95"] is None
    assert found["ttft"]["n"] == 1


def test_throughput_counts_what_arrived_in_the_window():
    rows = [
        {"intended": 0.0, "events": [0.5, 1.5, 4.0], "end": 4.0},  # one before the lead-in's end
        {"intended": 2.0, "events": [3.0, 11.0, 12.0], "end": 12.0},  # two after the plan's end
        {"intended": 1.5, "events": [2.0], "phase": 0},
    ]
    found = measure(make_record(rows, ramp_end=1.0, plan_end=11.0), OPEN)
    assert found["window"] == {"start": 1.0, "end": 11.0, "duration": 10.0}
    assert found["output_throughput"] == pytest.approx(0.3)
    assert found["total_throughput"] == pytest.approx(1.3)
    assert found["request_throughput"] == pytest.approx(0.1)
    assert found["output_tokens"] == 3.0
    assert found["ttft"]["n"] == 1  # the other one was begun before the window


def test_what_ends_in_the_drain_counts_and_what_failed_does_not():
    rows = [
        {"intended": 9.0, "events": [15.0]},
        {"intended": 8.0, "events": [8.5], "error": "cancelled", "end": 20.0, "output_tokens": -1},
        {"intended": 7.0, "events": [], "error": "cancelled", "end": 20.0, "output_tokens": -1},
        {"intended": 6.0, "events": [6.1], "error": "reset", "end": 6.2, "output_tokens": -1},
    ]
    found = measure(make_record(rows), OPEN)
    assert (found["ttft"]["n"], found["ttft"]["max"]) == (2, 6.0)
    assert found["e2e"]["n"] == 1
    assert found["errors"] == {"reset": 1, "cancelled": 2}
    assert found["censored"] == 1


def test_goodput_wants_every_objective_met():
    rows = [
        {"intended": 1.0, "events": [1.2, 1.3]},
        {"intended": 2.0, "events": [2.9, 3.0]},  # first token late
        {"intended": 3.0, "events": [3.1, 3.9]},  # slow tokens
        {"intended": 4.0, "events": [4.1, 4.2], "error": "wrong_length"},
        {"intended": 5.0, "events": [5.1]},
    ]
    found = measure(make_record(rows), OPEN, objectives={"ttft": 0.5, "tpot": 0.2})
    assert found["goodput"] == {"rate": 0.2, "fraction": 0.4}
    assert goodput(make_record(rows), OPEN, {"user_throughput": 5.0})["fraction"] == 0.6


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), max_size=30),
    st.floats(0, 10),
    st.floats(0.1, 10),
)
def test_concurrency_is_the_time_average(spans, start, length):
    rows = [{"intended": a, "events": [a + b]} for a, b in spans]
    record = make_record(rows or [{"intended": 0.0, "events": [0.0], "phase": 0}])
    end = start + length
    found = concurrency(record, start, end)
    edges = sorted({start, end, *(t for a, b in spans for t in (a, a + b) if start < t < end)})
    area, most = 0.0, 0
    for left, right in itertools.pairwise(edges):
        middle = (left + right) / 2
        active = sum(a <= middle < a + b for a, b in spans)
        area += active * (right - left)
        most = max(most, active)
    assert found["mean"] == pytest.approx(area / length, abs=1e-6)
    assert found["max"] >= most


def test_users_in_a_row_are_one_at_a_time():
    rows = [{"intended": float(t), "events": [t + 1.0]} for t in range(5)]
    assert concurrency(make_record(rows), 0.0, 5.0) == {"mean": 1.0, "max": 1}


def test_nothing_at_all_gives_none_and_never_nan():
    row = {"intended": 0.0, "events": [], "error": "refused", "end": 0.0, "output_tokens": -1}
    for record, plan in (
        (make_record([{**row, "sent": math.nan, "user": 0}]), CLOSED),
        (make_record([row]), OPEN),
    ):
        found = measure(record, plan, objectives={"ttft": 1.0})
        assert "NaN" not in json.dumps(found)
        assert found["ttft"]["p95"] is None


def big(requests=1000, events=1000):
    random = np.random.default_rng(0)
    begin = np.sort(random.uniform(0, 50, requests))
    times = (begin[:, None] + np.cumsum(random.exponential(0.02, (requests, events)), 1)).ravel()
    base = make_record([{"intended": 0.0, "events": [1.0]}], plan_end=60.0)
    counts = np.full(requests, events, np.int32)
    edges = times.reshape(requests, events)
    kept = ("phase", "user", "connect", "status", "error", "prompt_tokens", "cached_tokens")
    many = {name: np.repeat(getattr(base, name), requests) for name in (*kept, "want_prompt")}
    return type(base)(
        info=base.info, **many, intended=begin, sent=begin, first=edges[:, 0], last=edges[:, -1],
        end=edges[:, -1], output_tokens=counts, want_output=counts, events=counts,
        event_request=np.repeat(np.arange(requests, dtype=np.int32), events), event_time=times,
        event_lag=random.exponential(1e-5, len(times)).astype(np.float32),
        event_tokens=np.ones(len(times), np.float32), event_coalesced=np.zeros(len(times), bool),
    )  # fmt: skip


def test_a_million_events_take_little_memory_and_space(tmp_path):
    record = big()
    plan = LoadPlan(open_loop(20.0, lead_in=0.0), Workload(10, 1000), duration=60.0)
    tracemalloc.start()
    found = measure(record, plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["itl"]["n"] > 900_000
    assert peak < 250e6
    record.save(tmp_path / "record.npz")
    assert (tmp_path / "record.npz").stat().st_size < 30e6
