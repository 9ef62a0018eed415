"""The client against the emulator's exact times."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_llmserve.emulator.truth import read_truth
from pytest_llmserve.errors import LoadError
from pytest_llmserve.load import calibration
from pytest_llmserve.load.calibration import calibrate, compare, errors, exact_server
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


def test_calibration_is_measured_once_for_a_machine(tmp_path, monkeypatch):
    found = calibrate(tmp_path / "cache")
    assert found.events > 200
    assert 0 < found.ttft_error["p50"] <= found.ttft_error["p99"]
    assert 0 <= found.itl_error["p50"] <= found.itl_error["p99"]
    assert found.cpu_per_event > 0
    monkeypatch.setattr(calibration, "_measure", lambda: pytest.fail("measured again"))
    assert calibrate(tmp_path / "cache") == found
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text("{")
    monkeypatch.setattr(calibration, "_measure", lambda: found)
    assert calibrate(tmp_path / "cache") == found
    assert file.read_text() != "{"


def test_an_emulator_that_does_not_start_is_one_sentence(tmp_path):
    with (
        pytest.raises(LoadError, match="did not start") as caught,
        exact_server(tmp_path / "log.csv", "--schedule", "sometimes"),
    ):
        pass
    assert "\n" not in str(caught.value)
