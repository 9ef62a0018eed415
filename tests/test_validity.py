from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from load_records import make_record

from pytest_llmserve.load.calibration import Calibration
from pytest_llmserve.load.plan import LoadPlan, Workload, closed_loop, open_loop
from pytest_llmserve.metrics.definitions import measure
from pytest_llmserve.verdict.validity import check

CLOSED = LoadPlan(closed_loop(2, ramp=0.0), Workload(10, 3), duration=10.0)
OPEN = LoadPlan(open_loop(2.0, arrivals="constant", lead_in=0.0), Workload(10, 3), duration=10.0)


def busy(change=lambda number, row: row):
    """Two users, back to back from 0 to past 10, one second a request."""
    rows = []
    for user in range(2):
        for number in range(11):
            t = float(number)
            row = {"intended": t, "user": user, "events": [t + 0.5, t + 0.75, t + 1.0]}
            row["want_output"] = 3
            rows.append(change(number, row))
    return rows


def counters_of(record, **change):
    return {
        "prompt_tokens": float(record.prompt_tokens.clip(0).sum()),
        "generation_tokens": float(record.output_tokens.clip(0).sum()),
        "ttft.sum": 0.39 * len(record.phase),
        "ttft.count": float(len(record.phase)),
        "prefix_queries": float(record.prompt_tokens.sum()),
        "prefix_hits": 0.0,
        **change,
    }


def failed(rows, plan=CLOSED, *, counters=None, bounds=None, facts=None, **more):
    """The names of the failed checks."""
    record = make_record(rows, **(facts or {}))
    found = check(
        record,
        measure(record, plan),
        plan,
        counters=counters_of(record, **(counters or {})),
        bounds=bounds or {},
        **more,
    )
    assert all(one.detail and "\n" not in one.detail for one in found)
    return {one.check for one in found if not one.ok}


def test_a_good_load_is_valid():
    assert failed(busy()) == set()
    arrivals = [{"intended": i / 2, "events": [i / 2 + 0.5] * 3} for i in range(20)]
    assert failed(arrivals, OPEN) == set()
    record = make_record(busy())
    bare = check(record, measure(record, CLOSED), CLOSED, counters={}, bounds={})
    assert all(one.ok for one in bare)
    assert any("not checked" in one.detail for one in bare)


def late(seconds):
    return lambda number, row: {**row, "sent": row["intended"] + seconds}


def with_(**fields):
    return lambda number, row: {**row, **fields}


def fifth(**fields):
    return lambda number, row: {**row, **fields} if number == 5 else row


@pytest.mark.parametrize(
    ("check", "case"),
    [
        ("server_alive", {"alive": False}),
        ("complete", {"facts": {"incomplete": True}}),
        ("client_cpu", {"facts": {"cpu": 10.5}}),
        ("token_counts", {"counters": {"generation_tokens": 70.0}}),
        ("token_counts", {"counters": {"prompt_tokens": 215.0}}),
        ("server_ttft", {"counters": {"ttft.sum": 0.6 * 22}}),
        ("prefix_cache", {"counters": {"prefix_hits": 100.0}}),
        ("client_lag", {"facts": {"timestamps": "user", "stalls": 0.2}}),
    ],
)
def test_a_fault_of_the_run_is_named(check, case):
    assert failed(busy(), **case) == {check}


def test_small_differences_of_counts_pass():
    assert failed(busy(), counters={"generation_tokens": 66 * 1.009}) == set()
    assert failed(busy(), counters={"prefix_hits": 2.0}) == set()
    slow = {"timestamps": "user", "stalls": 0.2}
    assert failed(busy(), facts=slow, bounds={"ttft.p95": 5.0}) == set()


@pytest.mark.parametrize(
    ("checks", "change"),
    [
        ({"concurrency", "send_delay"}, late(0.1)),
        ({"send_delay"}, late(0.015)),
        ({"prompt_length"}, with_(prompt_tokens=11)),
        ({"output_length", "errors"}, with_(want_output=4, error="wrong_length")),
        ({"errors"}, fifth(error="reset")),
        ({"errors"}, fifth(error="wrong_length")),
    ],
)
def test_a_fault_of_the_requests_is_named(checks, change):
    assert failed(busy(change)) == checks


def test_send_delay_is_judged_by_what_is_asserted():
    assert failed(busy(late(0.004)), bounds={"ttft.p95": 0.5}) == set()
    assert failed(busy(late(0.004)), bounds={"ttft.p95": 0.3}) == {"send_delay"}
    assert failed(busy(late(0.004)), bounds={"itl.p95": 0.02}) == set()


def test_errors_can_be_allowed():
    assert failed(busy(fifth(error="reset")), allow_errors=0.1) == set()


def test_coalescing_counts_only_where_gaps_are_asserted():
    rows = busy(with_(coalesced=[False, True, False]))
    assert failed(rows) == set()
    assert failed(rows, bounds={"ttft.p95": 1.0}) == set()
    assert failed(rows, bounds={"itl.p99": 1.0}) == {"coalescing"}


def test_an_idle_user_is_noticed_and_a_thinking_one_is_not():
    half = [row for row in busy() if row["user"] == 0 or row["intended"] % 2 == 0]
    assert failed(half) == {"concurrency"}
    thinking = LoadPlan(closed_loop(2, think_time=1.0, ramp=0.0), Workload(10, 3), duration=10.0)
    alternate = [row for row in busy() if row["intended"] % 2 == 0]
    assert failed(alternate, thinking) == set()


def test_a_rate_that_was_not_delivered():
    arrivals = [{"intended": i / 2, "events": [i / 2 + 0.5] * 3} for i in range(20)]
    unsent = {"sent": np.nan, "events": [], "error": "cancelled", "output_tokens": -1, "end": 20.0}
    assert failed([*arrivals[:18], *({**row, **unsent} for row in arrivals[18:])], OPEN) == {
        "rate",
        "drained",
    }
    assert failed(arrivals[:18], OPEN) == {"rate"}


def test_requests_the_drain_cut_off_before_a_token():
    cut = {
        "events": [],
        "error": "cancelled",
        "output_tokens": -1,
        "prompt_tokens": -1,
        "end": 40.0,
    }
    rows = busy(lambda number, row: {**row, **cut, "want_output": 3} if number == 9 else row)
    assert "drained" in failed(rows)


def test_a_server_may_have_made_more_for_what_was_cut_off():
    cut = {"error": "cancelled", "output_tokens": -1, "prompt_tokens": -1}
    rows = busy(lambda number, row: {**row, **cut} if number == 10 else row)
    assert failed(rows, counters={"generation_tokens": 66.0, "prompt_tokens": 220.0}) == set()
    assert failed(rows, counters={"generation_tokens": 80.0}) == {"token_counts"}


def test_no_steady_state():
    assert {"window"} <= failed([row for row in busy() if row["user"] == 0])


def test_a_shared_prefix_should_be_found():
    plan = LoadPlan(closed_loop(2, ramp=0.0), Workload(200, 3, shared_prefix=100), duration=10.0)
    rows = busy(with_(prompt_tokens=200, want_prompt=200))
    assert failed(rows, plan, counters={"prefix_hits": 21 * 96.0}) == set()
    assert failed(rows, plan, counters={"prefix_hits": 0.0}) == {"prefix_cache"}
    assert failed(rows, plan, counters={"prefix_hits": 4000.0}) == {"prefix_cache"}


CALIBRATION = Calibration(
    ttft_error={"p50": 1e-4, "p99": 4e-4},
    itl_error={"p50": 1e-6, "p99": 1e-5},
    pacing_error={"p50": 1e-5, "p99": 1e-4},
    cpu_per_event=5e-5,
    events_limit=1e5,
    timestamps="kernel",
    events=800,
)


def test_a_bound_below_the_clients_own_error_cannot_be_certified():
    def of(**bounds):
        named = {name.replace("_", "."): bound for name, bound in bounds.items()}
        return failed(busy(), bounds=named, calibration=CALIBRATION)

    assert of(ttft_p95=5e-4, itl_p99=2e-5) == set()
    assert of(ttft_p95=3e-4) == {"client_error"}
    assert of(e2e_p50=3e-4) == {"client_error"}
    assert of(itl_p50=9e-6) == {"client_error"}
    assert of(output_throughput=1e-9) == set()


def test_as_many_events_as_the_client_can_read_are_too_many():
    # 300 events a request, two users, one second each: 600 a second.
    def many(number, row):
        t = row["intended"]
        return {**row, "events": [t + 0.5 + i / 600 for i in range(1, 301)], "want_output": 300}

    plan = LoadPlan(closed_loop(2, ramp=0.0), Workload(10, 300), duration=10.0)
    assert failed(busy(many), plan, calibration=CALIBRATION) == set()
    slow = replace(CALIBRATION, events_limit=700.0)
    assert failed(busy(many), plan, calibration=slow) == {"client_cpu"}


def test_a_client_that_is_always_behind_is_the_bottleneck():
    record = make_record(busy())
    late = replace(record, event_lag=np.full(len(record.event_lag), 0.05, np.float32))
    metrics = measure(late, CLOSED)
    found = {one.check: one for one in check(late, metrics, CLOSED, counters={}, bounds={})}
    assert not found["client_cpu"].ok
    assert found["client_cpu"].detail.startswith("the client was the bottleneck, not the server")
    assert "a tenth of the events waited 50 ms or more" in found["client_cpu"].detail
