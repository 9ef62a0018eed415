"""The client against the emulator's exact times."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pytest_llmserve.emulator.truth import read_truth
from pytest_llmserve.errors import LoadError
from pytest_llmserve.load import calibration
from pytest_llmserve.load.calibration import (
    Calibration,
    as_text,
    calibrate,
    compare,
    errors,
    exact_server,
    for_run,
    in_words,
    of_run,
)
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop


def test_errors_are_what_the_client_says_beyond_the_log(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(
        "request,token,due,before,after\n"
        "a,0,1.0,0,0\nb,0,1.5,0,0\n"
        "a,1,2.0,2.000,2.0001\nb,1,2.5,2.500,2.5001\n"
        "a,2,2.7,2.700,2.7001\nb,2,2.9,2.900,2.9001\na,3,3.0,3.0,3.0001\n"
    )
    found = compare(
        np.array([2.501, 2.001, 0.5]),
        np.array([1.25, 1.0, 9.0]),
        [np.array([0.5]), np.array([0.7, 0.2]), np.array([])],
        log,
    )
    assert found.ttft == pytest.approx([0.25, 0.0])
    assert found.itl == pytest.approx([0.1, 0.0, -0.1])
    assert found.unmatched == 1


def test_the_clients_times_lie_where_the_servers_log_has_them(tmp_path):
    log = tmp_path / "truth.csv"
    times = ("--schedule", "exact", "--ttft", "0.03", "--tpot", "0.005")
    with exact_server(log, *times) as url:
        target = Target(url, calibration.MODEL, {}, {"ignore_eos": True}, calibration._IDS)
        record = drive(target, LoadPlan(closed_loop(4), Workload(8, 10), duration=0.4))
    found = errors(record, log)
    assert not record.error.any()
    assert found.unmatched == 0
    assert len(found.ttft) == len(record.phase)
    assert len(found.itl) == 9 * len(record.phase)
    # TTFT holds the way to the server; nothing can arrive before it left.
    assert (found.ttft > 0).all()
    if record.info.timestamps == "kernel":
        # The kernel stamps a packet while the server is in `send`, however slow either side is.
        sends = sorted((e.before, e.after) for e in read_truth(log) if e.token)
        place = np.searchsorted([before for before, _ in sends], record.event_time + 5e-6) - 1
        after = np.array([after for _, after in sends])[place]
        assert (record.event_time <= after + 5e-6).mean() > 0.95


GOOD = Calibration(
    ttft_error={"p50": 1e-4, "p99": 3e-4},
    itl_error={"p50": 1e-6, "p99": 9e-6},
    pacing_error={"p50": 1e-5, "p99": 1e-4},
    cpu_per_event=5e-5,
    events_limit=4e5,
    timestamps="kernel",
    events=800,
)
POOR = replace(GOOD, ttft_error={"p50": 1e-4, "p99": 5e-3})


def test_a_calibration_has_all_its_figures():
    found = calibrate()
    assert found.events > 200
    assert 0 < found.ttft_error["p50"] <= found.ttft_error["p99"]
    assert 0 <= found.itl_error["p50"] <= found.itl_error["p99"]
    assert 0 <= found.pacing_error["p50"] <= found.pacing_error["p99"]
    assert found.cpu_per_event > 0
    assert found.events_limit > 1000
    assert f"{found.events_limit:,.0f}" in as_text(found)


@pytest.fixture
def measured(monkeypatch):
    """The results of measurements to come; popped, so that none is made twice."""
    results = []
    monkeypatch.setattr(calibration, "_measure", lambda: results.pop(0))
    return results


def test_calibration_is_kept_for_machine_and_versions(tmp_path, measured, monkeypatch):
    measured += [GOOD]
    assert calibrate(tmp_path / "cache") == GOOD
    assert calibrate(tmp_path / "cache") == GOOD
    (file,) = (tmp_path / "cache").iterdir()
    content = json.loads(file.read_text())
    assert content["holds_for"]["client"] == calibration.CLIENT_VERSION
    assert content["measured"].endswith("Z")
    file.write_text("{")
    measured += [GOOD]
    assert calibrate(tmp_path / "cache") == GOOD
    assert file.read_text() != "{"
    monkeypatch.setattr(calibration, "CLIENT_VERSION", "another")
    measured += [GOOD]
    calibrate(tmp_path / "cache")
    assert not measured
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_disturbed_calibration_is_repeated_and_not_kept(tmp_path, measured):
    measured += [POOR, replace(POOR, events=1)]
    assert calibrate(tmp_path) == POOR
    measured += [POOR, GOOD]
    assert calibrate(tmp_path) == GOOD
    assert calibrate(tmp_path) == GOOD


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, measured):
    (tmp_path / "file").touch()
    measured += [GOOD]
    assert calibrate(tmp_path / "file" / "cache") == GOOD


def test_the_processes_of_a_run_calibrate_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert of_run(tmp_path) is None
    made = []

    def measure():
        made.append(time.sleep(0.2))
        return POOR if len(made) <= 2 else pytest.fail("measured again")

    monkeypatch.setattr(calibration, "_measure", measure)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(for_run, [tmp_path] * 4)) == [POOR] * 4
    assert of_run(tmp_path) == POOR
    assert "TTFT p99 5.000 ms, ITL p99 0.009 ms" in in_words(POOR)


def test_a_run_goes_on_without_a_calibration_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def measure():
        raise LoadError("no emulator here")

    monkeypatch.setattr(calibration, "_measure", measure)
    assert for_run(tmp_path) is None
    assert of_run(tmp_path) == "no emulator here"
    assert in_words("no emulator here").endswith("not measured on this machine: no emulator here")


def test_an_emulator_that_does_not_start_is_one_sentence(tmp_path):
    with (
        pytest.raises(LoadError, match="did not start") as caught,
        exact_server(tmp_path / "log.csv", "--schedule", "sometimes"),
    ):
        pass
    assert "\n" not in str(caught.value)
