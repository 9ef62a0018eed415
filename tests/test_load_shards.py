"""Several processes drive one plan; their records make one."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from load_records import make_record
from wire_server import WireServer, steady

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.merge import merge
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop, open_loop
from pytest_llmserve.load.record import Record

POOL = tuple(range(1000, 1200))


def rows(count, shift=0.0):
    return [
        {"intended": 0.3 * i + shift, "user": i, "events": [0.3 * i + shift + 0.1 * e for e in
         range(1, 2 + i % 3)]}
        for i in range(count)
    ]  # fmt: skip


def split(whole: Record, count: int) -> list[Record]:
    parts = []
    for number in range(count):
        mine = np.arange(len(whole.phase)) % count == number
        of_mine = mine[whole.event_request]
        place = np.cumsum(mine) - 1
        columns = {
            f.name: getattr(whole, f.name)[of_mine if f.name.startswith("event_") else mine]
            for f in fields(Record)
            if f.name != "info"
        }
        columns["event_request"] = place[columns["event_request"]].astype(np.int32)
        parts.append(Record(info=whole.info, **columns))
    return parts


@pytest.mark.parametrize("count", [1, 2, 3])
def test_merging_is_exact(count):
    whole = make_record(rows(11))
    found = merge(split(whole, count))
    for one in fields(Record):
        if one.name != "info":
            assert np.array_equal(getattr(found, one.name), getattr(whole, one.name)), one.name
    assert found.info.shards == count
    assert found.info.cpu == pytest.approx(whole.info.cpu * count)


def test_another_machines_clock_is_compared_through_unix_time():
    here = make_record(rows(4), wall_offset=1000.0)
    there = make_record(rows(4, shift=-500.0), wall_offset=1500.0, incomplete=True)
    near = replace(here, info=replace(here.info, wall_offset=1000.0002))
    found = merge([here, there])
    assert found.intended[::2] == pytest.approx(found.intended[1::2])
    assert np.array_equal(merge([here, near]).intended[::2], here.intended)
    assert found.info.incomplete
    assert found.info.start == 0.0


@pytest.mark.parametrize("arrivals", [closed_loop(5, ramp=0.2), open_loop(40, lead_in=0.2)])
def test_shards_together_drive_the_plan(arrivals, tmp_path):
    plan = LoadPlan(arrivals, Workload(16, 3), duration=0.6, warmup=5, seed=4)
    with WireServer(steady(0.02, 0.005)) as server:
        target = Target(server.url, "m", token_ids=POOL)
        found = drive(target, plan, shards=2, record_path=tmp_path / "all.npz")
        prompts = [tuple(body["prompt"]) for _, _, body in server.requests]
    assert found.info.shards == 2
    assert not found.error.any()
    assert (found.phase == 0).sum() == 5
    assert len(set(prompts)) == len(prompts) == len(found.phase)
    assert (np.diff(found.intended) >= 0).all()
    assert np.array_equal(Record.load(tmp_path / "all.npz").event_time, found.event_time)
    planned = found.phase == 1
    if plan.arrivals.kind == "closed":
        assert set(found.user[planned]) == set(range(5))
        starts = np.array([found.intended[found.user == user].min() for user in range(5)])
        assert starts - found.info.start == pytest.approx(np.arange(5) * 0.04, abs=2e-3)
    else:
        alone = drive_alone(plan)
        assert found.intended[planned] - found.info.start == pytest.approx(alone, abs=2e-3)


def drive_alone(plan):
    with WireServer(steady(0.0, 0.0)) as server:
        record = drive(Target(server.url, "m", token_ids=POOL), plan)
    return record.intended[record.phase == 1] - record.info.start


def test_more_shards_than_users_are_not_started():
    plan = LoadPlan(closed_loop(1), Workload(16, 2), duration=0.2)
    with WireServer(steady(0.01, 0.005)) as server:
        record = drive(Target(server.url, "m", token_ids=POOL), plan, shards=3)
    assert record.info.shards == 1


def test_one_shard_that_cannot_ends_all():
    plan = LoadPlan(closed_loop(4), Workload(16, 2), duration=30)
    target = Target("http://no-such-host.invalid", "m", token_ids=POOL)
    with pytest.raises(LoadError, match="cannot be resolved"):
        drive(target, plan, shards=2)
