"""Planning: the arithmetic, numbers of users within objectives, what binds and what lifts it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmserve.emulator.catalog import hardware_names, load_hardware, load_model
from pytest_llmserve.emulator.physics import batch_of
from pytest_llmserve.emulator.scheduler import Sequence, Work
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.metrics.roofline import Batch, Precision, decode_ceiling, step_time
from pytest_llmserve.plan import (
    MOST_USERS,
    Case,
    _last,
    arithmetic,
    binding,
    lifts,
    parse_objective,
    plan,
    user_range,
)

QWEN = load_model("qwen3-8b")
SPARK = load_hardware("dgx-spark")
SHORT = Case(QWEN, SPARK, Precision("nvfp4", "fp8"))
QUICK = dataclasses.replace(SHORT, output=16)  # the same with less to simulate


def values(case: Case, users: int) -> dict[str, float]:
    return {line.name: line.value for line in arithmetic(case, users)}


def test_the_arithmetic_of_the_headline() -> None:
    found = values(SHORT, 30)
    assert found["weight_bytes"] == pytest.approx(5.15e9, rel=0.001)
    assert found["kv_bytes"] == 72 * 1024
    assert found["kv_user"] == 256 * 72 * 1024
    assert found["memory_usable"] == pytest.approx(108.8e9)
    assert found["memory_left"] == pytest.approx(108.8e9 - 5.1518e9 - 1.2447e9, rel=1e-4)
    assert found["users_that_fit"] == found["memory_left"] // found["kv_user"] == 5425
    assert found["step_bytes"] == pytest.approx(5.1518e9 + 30 * 192 * 73_728, rel=1e-4)
    assert found["bandwidth_time"] == found["step_bytes"] / 273e9
    assert found["compute_time"] == found["step_flops"] / 500e12
    assert found["ceiling"] == pytest.approx(decode_ceiling(QWEN, SPARK, SHORT.precision, 30, 192))
    assert found["step"] == pytest.approx(found["bandwidth_time"] / 0.7 + 0.0002)
    assert found["decode"] == pytest.approx(30 / found["step"])


def test_the_ceiling_at_a_context_of_512_is_that_of_the_facts() -> None:
    case = dataclasses.replace(SHORT, prompt=448, output=128)
    found = values(case, 30)
    assert found["ceiling"] == pytest.approx(1303, abs=1)
    assert 0.7 * found["ceiling"] == pytest.approx(912, abs=1)


def test_each_line_is_what_its_numbers_make() -> None:
    """What a reader can check: the last line of the step is tokens by time, as shown."""
    lines = {line.name: line for line in arithmetic(SHORT, 30)}
    assert str(lines["kv_bytes"]) == (
        "KV cache of a token: 2 × 36 layers × 8 KV heads × 128 × 1 B = 73.7 kB"
    )
    assert lines["ceiling"].how == "30 / 20.4 ms"
    assert lines["step"].how == "max(20.4 ms / 0.7, 915 µs / 0.5) + 200 µs"


@given(
    users=st.integers(1, 300),
    prompt=st.integers(1, 2000),
    output=st.integers(1, 500),
    weights=st.sampled_from(["bf16", "fp8", "nvfp4", "int4"]),
    drafts=st.integers(0, 4),
    hardware=st.sampled_from(hardware_names()),
)
def test_expected_rates_stay_below_the_ceiling(
    users: int, prompt: int, output: int, weights: str, drafts: int, hardware: str
) -> None:
    case = Case(QWEN, load_hardware(hardware), Precision(weights, "fp8"), prompt, output,
                draft_tokens=drafts)  # fmt: skip
    found = values(case, users)
    assert found["decode"] < found["ceiling"]
    assert found["mean_step"] >= found["step"]
    assert all(math.isfinite(value) for value in found.values())


@settings(max_examples=40, deadline=None)
@given(users=st.integers(1, 12), prompt=st.integers(1, 40), output=st.integers(8, 30))
def test_the_simulation_agrees_with_the_mean_step(users: int, prompt: int, output: int) -> None:
    """Where bandwidth binds, each user gets a token in each mean step but the one that has begun
    when its next request comes."""
    case = dataclasses.replace(SHORT, prompt=prompt, output=output)
    mean = case.step(case.mean_batch(users))
    assert mean.bound == "bandwidth"
    seen = case.expect(users)
    steps = output + (users > 1)
    assert seen.output_throughput == pytest.approx(users * output / steps / mean.total, rel=0.1)
    assert seen.output_throughput <= values(case, users)["ceiling"]
    assert seen.request_throughput == pytest.approx(seen.output_throughput / output, rel=0.2)


def test_a_decode_batch_is_what_the_scheduler_makes_of_it() -> None:
    works = [Work(Sequence([1] * 8, 8, abs), 19, 1 + 2, 1, 2) for _ in range(4)]
    ours, theirs = Batch.decode(4, 20, 2), batch_of(works)
    assert (ours.tokens, ours.sampled) == (theirs.tokens, theirs.sampled)
    assert ours.kv_read == pytest.approx(theirs.kv_read, rel=0.1)
    assert ours.attended == pytest.approx(theirs.attended, rel=0.1)


def test_what_binds() -> None:
    few = binding(SHORT, 30)
    assert few.what == "bandwidth"
    assert "compute binds from about" in few.why
    assert binding(SHORT, 2000).what == "compute"
    small = dataclasses.replace(
        SHORT, hardware=load_hardware("rtx-4090"), precision=Precision("fp8", "bf16"), prompt=6000
    )
    assert 0 < small.users_that_fit < 30
    full = binding(small, 30)
    assert (full.what, f"{small.users_that_fit} do" in full.why) == ("memory", True)
    assert small.expect(2 * small.users_that_fit).concurrency < 2 * small.users_that_fit


def test_users_within_objectives_are_those_that_meet_them() -> None:
    objectives = [parse_objective("tpot.p95<=0.03"), parse_objective("output_throughput>=200")]
    found = user_range(QUICK, objectives)
    assert found.least is not None
    assert found.most is not None
    assert 1 < found.least < found.most < 512
    for users in (found.least, found.most):
        seen = QUICK.expect(users)
        assert all(objective.met(seen.value(objective.metric)) for objective in objectives)
    assert QUICK.expect(found.least - 1).output_throughput < 200
    assert QUICK.expect(found.most + 1 + found.most // 50).value("tpot.p95") > 0.03
    assert "tpot.p95" in found.why


@pytest.mark.parametrize(
    ("objectives", "why"),
    [
        (["ttft.p95<=0.001"], "one user alone has ttft.p95"),
        (["tpot.p50<=0.03", "output_throughput>=9e6"], "where >= 9,000,000 tok/s is asked"),
        (["user_throughput.p50>=1000"], "one user alone has user_throughput.p50"),
    ],
)
def test_where_no_number_of_users_will_do(objectives: list[str], why: str) -> None:
    found = user_range(QUICK, [parse_objective(text) for text in objectives])
    assert (found.least, found.most) == (None, None)
    assert why in found.why


def test_without_objectives_memory_ends_the_range() -> None:
    found = user_range(SHORT)
    assert (found.least, found.most) == (1, 5425)
    tight = dataclasses.replace(QUICK, hardware=load_hardware("rtx-4090"),
                                precision=Precision("bf16", "bf16"), prompt=3000)  # fmt: skip
    assert user_range(tight, [parse_objective("ttft.p95<=1000")]).why.startswith("memory holds")


@given(top=st.integers(1, 5000), limit=st.integers(0, 6000), near=st.integers(1, 6000))
def test_the_search_finds_where_a_property_ends(top: int, limit: int, near: int) -> None:
    asked: list[int] = []

    def holds(n: int) -> bool:
        assert 1 <= n <= top
        asked.append(n)
        return n <= limit

    last, first = _last(top, holds, near)
    assert last <= min(limit, top) < first or (limit >= top and (last, first) == (top, top + 1))
    assert first - last <= max(1, last // 50)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(top) + 4


def test_what_would_lift_it() -> None:
    case = dataclasses.replace(QUICK, precision=Precision("bf16", "bf16"))
    now = case.expect(8)
    found = {lift.change: lift for lift in lifts(case, 8, (), now, 8)}
    names = list(found)
    assert names[:3] == ["fp8 weights", "nvfp4 weights", "fp8 KV cache"]
    assert names[3].startswith("speculation: 3 tokens, 70 % accepted")
    assert names[4].startswith("a second NVIDIA DGX Spark")
    factors = [lift.factor for lift in found.values()]
    assert 1 < factors[0] < factors[1]
    assert all(factor > 1 for factor in factors)
    assert factors[4] < 2, "the link costs something"
    assert found["fp8 KV cache"].users_that_fit == pytest.approx(2 * case.users_that_fit, rel=0.01)
    narrow = dataclasses.replace(QUICK, draft_tokens=2, hardware=load_hardware("cpu"))
    assert list(lifts(narrow, 8, (), now, 8)) == []


def test_two_machines_share_the_work_and_pay_for_the_link() -> None:
    two = SPARK.joined(2)
    assert (two.devices, two.memory, two.title) == (2, 256e9, "2 × NVIDIA DGX Spark (GB10)")
    batch, precision = Batch.decode(30, 192), Precision("nvfp4", "fp8")
    one_step = step_time(QWEN, SPARK, precision, batch)
    step = step_time(QWEN, two, precision, batch)
    assert step.memory == pytest.approx(one_step.memory / 2)
    # 72 all-reduces of 30 hidden states of 4,096 BF16 values, at 25 GB/s and 20 µs.
    link = 72 * (20e-6 + 30 * 4096 * 2 / 25e9)
    assert step.overhead == pytest.approx(one_step.overhead + link)
    assert SPARK.joined(1) == SPARK
    for hardware in (two, load_hardware("cpu")):
        with pytest.raises(ValueError, match="cannot be joined"):
            hardware.joined(2)


def test_a_whole_plan() -> None:
    objectives = [parse_objective("ttft.p95 <= 0.5")]
    found = plan(QUICK, 30, objectives)
    assert found.seen == QUICK.expect(30)
    assert 30 in [point.users for point in found.curve]
    rates = [point.seen.output_throughput for point in found.curve]
    assert rates == sorted(rates)
    assert all(point.seen.output_throughput < point.ceiling for point in found.curve)
    assert all(lift.range is not None for lift in found.lifts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hardware": load_hardware("l4"), "precision": Precision()}, "larger --hardware"),
        ({"prompt": 10_000_000}, "shorter requests"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: dict, said: str) -> None:
    case = dataclasses.replace(SHORT, shape=load_model("qwen3-32b"), **change)
    with pytest.raises(ConfigError, match=said):
        plan(case, 1)


@pytest.mark.parametrize("users", [0, MOST_USERS + 1])
def test_numbers_of_users_out_of_range(users: int) -> None:
    with pytest.raises(ConfigError, match=f"--users {users}"):
        plan(SHORT, users)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft.p95", "write METRIC<=NUMBER"),
        ("ttft.p95<=fast", "write METRIC<=NUMBER"),
        ("ttft.p95<=1e", "write METRIC<=NUMBER"),
        ("tftt.p95<=1", "did you mean"),
        ("ttft.p95>=1", "a plan can look for"),
        ("output_throughput<=5", "a plan can look for"),
        ("client_lag.p99<=1", "a plan can look for"),
    ],
)
def test_an_objective_that_cannot_be_planned_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_objective(text)
