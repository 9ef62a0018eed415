"""Comparing with and storing into a baseline: who is compared, what is stored, what is said."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.load.plan import LoadPlan, Workload, closed_loop
from pytest_llmserve.load.record import Record, RecordInfo
from pytest_llmserve.run import Check, Run, Verdict
from pytest_llmserve.servers import Emulation, Server, ServerConfig
from pytest_llmserve.verdict.baseline import (
    TRACKED,
    command,
    compare,
    entry_of,
    path_of,
    store,
    tracked,
    unused,
)
from pytest_llmserve.verdict.baseline_file import read
from pytest_llmserve.verdict.fingerprint import fingerprint
from pytest_llmserve.verdict.sketch import POINTS, cdf, sketch
from pytest_llmserve.verdict.slo import worst

HARDWARE = {
    "slug": "nvidia-h200", "cpu": "C", "cores": 8, "memory": 1, "gpu": "NVIDIA H200",
    "gpu_count": 1, "driver": "1", "compute_capability": "9.0",
}  # fmt: skip
NOISE = (0.0, 0.008, -0.007, 0.004, -0.005, 0.002, 0.006, -0.003)


def make(
    factor=1.0, *, users=30, test="t.py::test_x", checks=(), n=2000, engine="vllm", version="1",
    emulated=False, args=None, hardware=HARDWARE, model="Qwen/Qwen3-8B",
):  # fmt: skip
    """A run whose speed is `factor` of the usual."""
    emulation = Emulation() if emulated else None
    config = ServerConfig("qwen", engine, model, args=args or {}, emulation=emulation)
    server = Server(config, "http://127.0.0.1:9", "m", engine, version, emulated=emulated)
    plan = LoadPlan(closed_loop(users), Workload(), duration=60)
    metrics = {
        "output_throughput": 1000 * factor,
        "ttft": {"p50": 0.2 / factor, "p95": 0.4 / factor, "p99": 0.5 / factor, "n": n},
        "tpot": {"p50": 0.03 / factor, "n": n},
        "requests": n,
    }
    facts = fingerprint(server, plan, hardware, metrics_version=1)
    return Run(test, server, plan, metrics, tuple(checks), facts)


def judge(run, root, **how):
    """The verdicts on one run."""
    return compare([run], root, **how)[0].verdicts


def check(run, root, *, mode="none", reason=None, others=(), **how):
    """Compare and store, as the fixture and the end of a passed test do."""
    (compared,) = compare([run], root, mode=mode, reason=reason, **how)
    stored = store(run, root, (*compared.found, *others), mode=mode, reason=reason)
    return SimpleNamespace(
        verdicts=compared.verdicts, status=compared.after(stored), stored=stored, runs=compared.runs
    )


def fill(root, runs=5, **kind):
    for noise in NOISE[:runs]:
        check(make(math.exp(noise), **kind), root, mode="new")


def outcomes(verdicts):
    return [v.verdict for v in verdicts]


def test_without_a_baseline_it_says_what_to_type(tmp_path):
    checked = check(make(), tmp_path)
    assert outcomes(checked.verdicts) == ["inconclusive"] * len(TRACKED)
    assert checked.status == "missing"
    assert checked.stored.action == "kept"
    assert "`pytest t.py::test_x --llmserve-update-baselines=new`" in checked.verdicts[0].reason
    assert not list(tmp_path.iterdir())


def test_a_test_name_is_quoted_for_the_shell(tmp_path):
    reason = check(make(test="t.py::test_x[a b]"), tmp_path).verdicts[0].reason
    assert "pytest 't.py::test_x[a b]' --llmserve" in reason


def test_new_fills_up_to_five_and_all_goes_on(tmp_path):
    actions = [check(make(math.exp(n)), tmp_path, mode="new") for n in NOISE[:6]]
    assert [c.stored.action for c in actions] == ["new", "added", "added", "added", "added", "kept"]
    assert [c.status for c in actions] == ["new"] * 5 + ["compared"]
    assert "run 2 of 5" in actions[1].stored.message
    assert check(make(), tmp_path, mode="all").stored.action == "added"
    (load,) = read(path_of(make(), tmp_path)).loads.values()
    assert len(load.runs) == 6
    assert list(load.origin) == [run.id for run in load.runs[:5]]


@pytest.mark.parametrize("runs", [2, 3, 4])
def test_few_runs_are_inconclusive_with_what_could_be_seen(tmp_path, runs):
    fill(tmp_path, runs)
    verdict = check(make(), tmp_path).verdicts[0]
    assert verdict.verdict == "inconclusive"
    assert f"{runs} of 5 baseline runs" in verdict.reason
    assert f"{5 - runs} more would decide" in verdict.reason
    assert "80 % power" in verdict.reason


def test_the_same_speed_passes_and_a_tenth_less_fails(tmp_path):
    fill(tmp_path)
    good = check(make(0.995), tmp_path)
    assert outcomes(good.verdicts) == ["pass"] * 3
    assert "no regression; a change of -" in good.verdicts[0].reason
    bad = check(make(0.89), tmp_path, rerun=lambda run: make(0.885))
    assert worst(bad.verdicts) == "fail"
    assert "-11.3 % from the baseline (5 runs, run-to-run noise 0.6 %)" in bad.verdicts[0].reason
    assert bad.verdicts[0].bound == pytest.approx(970, abs=3)


def test_a_breach_is_measured_again_once(tmp_path):
    fill(tmp_path)
    calls = []

    def rerun(run):
        calls.append(1)
        return make(1.0)

    assert worst(judge(make(0.89), tmp_path, rerun=rerun)) == "pass"
    assert len(calls) == 1
    assert worst(judge(make(0.999), tmp_path, rerun=rerun)) == "pass"
    assert len(calls) == 1


def test_a_breach_that_cannot_be_repeated_is_inconclusive(tmp_path):
    fill(tmp_path)
    assert "1 more would decide" in judge(make(0.89), tmp_path)[0].reason
    spoilt = make(0.89, checks=[Check("client", False, "client CPU at 100 %")])
    verdict = judge(make(0.89), tmp_path, rerun=lambda run: spoilt)[0]
    assert verdict.verdict == "inconclusive"
    assert "client CPU at 100 %" in verdict.reason


def test_invalid_runs_are_judged_invalid_and_never_stored(tmp_path):
    spoilt = make(checks=[Check("errors", False, "3 requests failed")])
    checked = check(spoilt, tmp_path, mode="all", reason="because")
    assert outcomes(checked.verdicts) == ["invalid"] * 3
    assert checked.status == "invalid"
    assert checked.stored.action == "kept"
    assert not path_of(spoilt, tmp_path).exists()


def test_a_run_that_missed_an_objective_is_never_stored(tmp_path):
    missed = Verdict("ttft.p95 <= 0.1", 0.4, 0.1, "fail", "too slow")
    checked = check(make(), tmp_path, mode="all", reason="because", others=[missed])
    assert checked.stored.action == "kept"
    assert not path_of(make(), tmp_path).exists()


def test_accepting_a_worse_run_needs_a_reason_which_is_stored(tmp_path):
    fill(tmp_path)
    worse = {"rerun": lambda run: make(0.8), "mode": "all"}
    before = path_of(make(), tmp_path).read_bytes()
    for reason in (None, "", "  "):
        refused = check(make(0.8), tmp_path, reason=reason, **worse)
        assert worst(refused.verdicts) == "fail"
        assert "--llmserve-reason 'why it is worse'" in refused.verdicts[0].reason
    assert path_of(make(), tmp_path).read_bytes() == before
    taken = check(make(0.8), tmp_path, reason="batch size halved", **worse)
    assert taken.stored.action == "accepted"
    assert worst(taken.verdicts) == "pass"
    (load,) = read(path_of(make(), tmp_path)).loads.values()
    (accepted,) = load.accepted
    assert accepted.reason == "batch size halved"
    assert accepted.changes["output_throughput"] == pytest.approx(0.8, rel=0.01)
    assert [run.id for run in load.current()] == [accepted.run]
    assert list(load.origin) == [accepted.run]
    assert check(make(0.8), tmp_path).verdicts[0].verdict == "inconclusive"


def test_new_never_accepts_a_worse_run(tmp_path):
    fill(tmp_path)
    checked = check(make(0.8), tmp_path, rerun=lambda run: make(0.8), mode="new", reason="why not")
    assert worst(checked.verdicts) == "fail"
    assert checked.stored.action == "kept"


def test_what_measured_something_else_is_named_not_compared(tmp_path):
    fill(tmp_path)
    checked = check(make(args={"max-num-seqs": 8}), tmp_path)
    assert checked.status == "mismatched"
    assert outcomes(checked.verdicts) == ["inconclusive"] * 3
    assert "args.max-num-seqs: none → 8" in checked.verdicts[0].reason
    other_gpu = {**HARDWARE, "compute_capability": "9.1"}
    assert "9.0 → 9.1" in check(make(hardware=other_gpu), tmp_path).verdicts[0].reason


def test_what_should_match_is_compared_and_named(tmp_path):
    fill(tmp_path)
    verdict = check(make(version="2"), tmp_path).verdicts[0]
    assert verdict.verdict == "pass"
    assert "compared although they differ in engine_version: 1 → 2" in verdict.reason


def test_loads_of_one_test_are_kept_apart(tmp_path):
    fill(tmp_path, users=1)
    fill(tmp_path, 2, users=30)
    content = read(path_of(make(), tmp_path))
    assert sorted(len(load.runs) for load in content.loads.values()) == [2, 5]
    assert worst(judge(make(users=1), tmp_path)) == "pass"
    assert worst(judge(make(users=30), tmp_path)) == "inconclusive"
    assert "no baseline of this load" in judge(make(users=7), tmp_path)[0].reason


def test_emulated_runs_never_meet_real_ones(tmp_path):
    kind = {"emulated": True, "engine": "emulator"}
    fill(tmp_path, **kind)
    path = path_of(make(**kind), tmp_path)
    assert path.relative_to(tmp_path).parts[0] == "emulated-dgx-spark"
    assert check(make(), tmp_path).status == "missing"
    real = path_of(make(), tmp_path)
    real.parent.mkdir(parents=True)
    content = json.loads(path.read_text())
    real.write_text(json.dumps(content))
    assert check(make(), tmp_path).status != "compared"
    with pytest.raises(ConfigError, match="is of emulated hardware and the run of real"):
        check(make(), tmp_path, mode="all")
    assert json.loads(real.read_text()) == content


def test_a_percentile_of_too_few_samples_is_not_compared(tmp_path):
    fill(tmp_path)
    verdicts = judge(make(n=100), tmp_path)
    assert outcomes(verdicts) == ["pass", "inconclusive", "pass"]
    assert "needs 130" in verdicts[1].reason
    other = tmp_path / "other"
    fill(other, n=100)
    assert "no stored run has it with enough samples" in judge(make(), other)[1].reason


def test_a_slow_decline_is_caught_by_its_origin(tmp_path):
    rng = np.random.default_rng(0)
    fill(tmp_path)
    for night in range(1, 21):
        speed = 0.99**night

        def once(run=None, speed=speed):
            return make(speed * math.exp(0.01 * rng.standard_normal()))

        checked = check(once(), tmp_path, rerun=once, mode="all")
        failed = [v for v in checked.verdicts if v.verdict == "fail"]
        if failed:
            break
    assert night <= 12
    assert any(v.objective.startswith("drift ") for v in failed)
    assert any("from the origin of 20" in v.reason for v in failed)


def test_metrics_may_be_named(tmp_path):
    (verdict,) = judge(make(), tmp_path, metrics=["ttft.p99"])
    assert verdict.objective == "baseline ttft.p99"
    assert tracked("ttft.p99").floor == 0.10
    assert tracked("user_throughput.p50").better == "higher"
    for wrong in ("send_delay.p99", "concurrency.mean", "tftt.p95"):
        with pytest.raises(ConfigError):
            judge(make(), tmp_path, metrics=[wrong])


def test_a_spoilt_file_is_reported_and_kept(tmp_path):
    fill(tmp_path)
    path = path_of(make(), tmp_path)
    path.write_text("{")
    for mode in ("none", "new", "all"):
        with pytest.raises(ConfigError, match="not valid JSON"):
            check(make(), tmp_path, mode=mode)
    assert path.read_text() == "{"


def test_unused_files_are_found(tmp_path):
    fill(tmp_path, 1)
    fill(tmp_path, 1, test="t.py::test_y")
    fill(tmp_path, 1, test="t.py::test_y", hardware={**HARDWARE, "slug": "nvidia-l4"})
    used = [path_of(make(), tmp_path)]
    other = path_of(make(test="t.py::test_y"), tmp_path)
    assert unused(used, lambda test: True) == (other,)
    assert unused(used, lambda test: test != "t.py::test_y") == ()
    other.with_name("broken.json").write_text("{")
    assert unused(used, lambda test: test.startswith("t.py")) == (other,)
    assert unused([], lambda test: True) == ()


def test_the_command_is_quoted_and_has_the_options_of_the_run():
    said = command(["a.py::t[x y]", "b.py::t"], "new", ["--llmserve-server=tiny"])
    assert (
        said
        == "pytest 'a.py::t[x y]' b.py::t --llmserve-update-baselines=new --llmserve-server=tiny"
    )


def test_points_of_a_curve_are_one_family_each_by_its_own_load(tmp_path):
    for users in (1, 8, 30):
        fill(tmp_path, users=users)
    again = []

    def rerun(run):
        again.append(run.plan.arrivals.users)
        return make(0.88, users=run.plan.arrivals.users)

    curve = [make(users=1), make(users=8), make(0.88, users=30), make(users=50)]
    found = compare(curve, tmp_path, rerun=rerun)
    assert [worst(c.verdicts) for c in found] == ["pass", "pass", "fail", "inconclusive"]
    assert [c.status for c in found] == ["compared", "compared", "compared", "missing"]
    assert again == [30]  # only the point that seemed worse
    assert [c.runs for c in found] == [1, 1, 2, 1]
    alone = judge(make(0.88, users=30), tmp_path, rerun=rerun)
    # Holm: one of nine comparisons is judged more strictly than one of three.
    (together,) = (v for v in found[2].verdicts if v.objective == "baseline output_throughput")
    assert interval(together) > interval(alone[0])


def interval(verdict):
    low, high = re.search(r"between (\S+) and ([\d.]+)", verdict.reason).groups()
    return float(high) - float(low)


def test_many_points_make_no_more_false_alarms_than_one(tmp_path):
    rng = np.random.default_rng(7)
    loads = range(1, 9)
    for users in loads:
        for _ in range(8):
            check(make(math.exp(0.08 * rng.standard_normal()), users=users), tmp_path, mode="all")

    def curve():
        return [make(math.exp(0.08 * rng.standard_normal()), users=users) for users in loads]

    def rerun(run):
        return make(math.exp(0.08 * rng.standard_normal()), users=run.plan.arrivals.users)

    nights = [compare(curve(), tmp_path, rerun=rerun) for _ in range(25)]
    alarms = sum(any(worst(c.verdicts) == "fail" for c in night) for night in nights)
    assert alarms <= 2


def test_auto_repeats_measure_all_points_that_can_be_decided(tmp_path):
    fill(tmp_path, users=1)
    fill(tmp_path, users=30)
    fill(tmp_path, 2, users=50)
    again = []

    def rerun(run):
        again.append(run.plan.arrivals.users)
        slower = 0.7 if run.plan.arrivals.users == 30 else 1.0
        return make(slower * (1 + 0.001 * len(again)), users=run.plan.arrivals.users)

    curve = [make(users=1), make(0.7, users=30), make(users=50)]
    found = compare(curve, tmp_path, rerun=rerun, repeats="auto")
    assert [worst(c.verdicts) for c in found] == ["pass", "fail", "inconclusive"]
    assert set(again) == {1, 30}
    assert found[0].runs == found[1].runs == 8 - found[1].saved
    assert (found[2].runs, found[2].saved) == (1, 0)


def test_store_alone_says_what_it_did(tmp_path):
    assert store(make(), tmp_path, ()).action == "kept"
    assert store(make(), tmp_path, (), mode="new").action == "new"


def record():
    """Two users, three requests each after a warm-up one, four events a request."""
    rows, events = 8, 4
    phase = np.array([0, 0, 1, 1, 1, 1, 1, 1], dtype=np.uint8)
    intended = np.array([0.0, 0, 1, 1, 2, 2, 3, 3])
    first = intended + np.array([9, 9, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2])
    steps = np.arange(events) * 0.05
    times = (first[:, None] + steps).ravel()
    fields = {f.name: np.zeros(rows) for f in dataclasses.fields(Record) if f.name != "info"}
    fields |= {
        "phase": phase,
        "user": np.tile(np.array([0, 1], dtype=np.int32), 4),
        "intended": intended,
        "sent": intended,
        "first": first,
        "last": first + 0.15,
        "end": first + 0.16,
        "error": np.zeros(rows, dtype=np.uint8),
        "output_tokens": np.full(rows, events),
        "events": np.full(rows, events),
        "event_request": np.repeat(np.arange(rows), events),
        "event_time": times,
        "event_lag": np.zeros(times.size),
        "event_tokens": np.ones(times.size),
        "event_coalesced": np.zeros(times.size, dtype=bool),
    }
    info = RecordInfo(0.0, 1.0, 4.0, 0.0, "kernel", "usage", 0.0, 0.0, False, "0")
    return Record(info=info, **fields)


def test_a_stored_run_can_redraw_its_distributions():
    run = dataclasses.replace(make(users=2), record=record())
    entry = entry_of(run)
    assert set(entry.sketch) == {"ttft", "tpot", "itl", "e2e"}
    assert entry.sketch["ttft"][0] == pytest.approx(0.1)
    assert entry.sketch["ttft"][-1] == pytest.approx(0.2)
    assert entry.sketch["itl"][POINTS // 2] == pytest.approx(0.05)
    assert entry.metrics["ttft.p95"] == 0.4
    assert entry.samples == {"ttft": 2000, "tpot": 2000}
    assert entry_of(make()).sketch == {}


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=300), st.floats(1e-4, 1e4))
def test_a_sketch_redraws_the_cdf(values, at):
    points = sketch(values)
    assert len(points) == POINTS
    assert points == sorted(points)
    share = float(cdf(points, at))
    below, above = (
        (np.array(values) < at * (1 - 1e-5)).mean(),
        (np.array(values) <= at * (1 + 1e-5)).mean(),
    )
    slack = 1 / (POINTS - 1) + 1 / max(1, len(values) - 1)
    assert below - slack - 1e-9 <= share <= above + slack + 1e-9


def test_a_jump_of_the_cdf_stays_a_jump():
    points = sketch([1.0, 8157.0, 8157.0])
    assert cdf(points, [0.5, 8156.0, 8157.0, 9000.0]) == pytest.approx(
        [0.0, 0.5, 1.0, 1.0], abs=0.01
    )
    assert cdf(sketch([3.0]), [2.9, 3.0]) == pytest.approx([0.0, 1.0])


def test_a_sketch_of_nothing_is_nothing():
    assert sketch([]) == []
    assert sketch([math.nan]) == []


def test_a_number_of_repeats_is_measured_and_judged_by_welch(tmp_path):
    fill(tmp_path)
    speeds = iter([0.9, 0.905, 0.895])
    verdicts = judge(make(0.9), tmp_path, rerun=lambda run: make(next(speeds)), repeats=4)
    assert worst(verdicts) == "fail"
    assert "the 4 runs are worse" in verdicts[0].reason
    assert next(speeds, None) is None


def test_auto_repeats_stop_when_decided_and_say_so(tmp_path):
    fill(tmp_path)
    calls = []

    def rerun(speed):
        calls.append(speed)
        return make(speed * (1 + 0.001 * len(calls)))

    verdicts = judge(make(0.7), tmp_path, rerun=lambda run: rerun(0.7), repeats="auto")
    assert worst(verdicts) == "fail"
    assert 1 <= len(calls) <= 3
    (calm,) = compare([make()], tmp_path, rerun=lambda run: make(1.001), repeats="auto")
    assert worst(calm.verdicts) == "pass"
    assert calm.runs + calm.saved == 8
    assert f"{len(calls) + 1} of at most 8 runs were needed" in verdicts[0].reason


def test_auto_repeats_end_without_a_way_to_repeat(tmp_path):
    fill(tmp_path)
    assert worst(judge(make(0.7), tmp_path, repeats="auto")) in ("inconclusive", "pass")
    spoilt = make(0.7, checks=[Check("client", False, "busy")])
    verdicts = judge(make(0.7), tmp_path, rerun=lambda run: spoilt, repeats="auto")
    assert "a further run is no measurement (client: busy)" in verdicts[0].reason
