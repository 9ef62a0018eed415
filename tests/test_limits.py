"""Bounds that physics forbids: refused with their arithmetic, and never one that could be met."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmserve import at_least, at_most
from pytest_llmserve.emulator.catalog import (
    hardware_names,
    load_hardware,
    load_model,
    model_names,
)
from pytest_llmserve.emulator.physics import Machine
from pytest_llmserve.emulator.scheduler import Policy
from pytest_llmserve.emulator.simulate import simulate
from pytest_llmserve.metrics.limits import CACHED, forbidden
from pytest_llmserve.metrics.roofline import Precision, kv_capacity, weight_bytes

QWEN = load_model("qwen3-8b")
SPARK = load_hardware("dgx-spark")
BF16 = Precision("bf16", "bf16")
NVFP4 = Precision("nvfp4", "fp8")


def _said(objective, precision=BF16, hardware=SPARK, shape=QWEN, **load):
    wanted = {"users": 30, "prompt_tokens": 128, "output_tokens": 128} | load
    return forbidden(objective, shape, hardware, precision, **wanted)


def test_a_thousand_tokens_a_second_in_bf16_on_a_spark():
    said = _said(at_least("output_throughput", 1000))
    first, *lines = said.splitlines()
    assert first.startswith("output_throughput >= 1,000 tok/s cannot be met: qwen3-8b with bf16")
    assert "NVIDIA DGX Spark (GB10)" in first
    assert any("273 GB/s" in line for line in lines)
    assert lines[-1].strip().startswith("ceiling (bandwidth binds)")
    assert _said(at_least("output_throughput", 1000), NVFP4) is None


@pytest.mark.parametrize(
    ("objective", "word"),
    [
        (at_least("user_throughput.p50", 25), "ceiling (bandwidth binds)"),  # 18 tok/s
        (at_most("tpot.p95", 0.04), "a token takes"),
        (at_most("itl.p99", 0.04), "a token takes"),
        (at_most("ttft.p95", 0.001), "FLOPs of a prompt"),
        (at_most("e2e.max", 5.0), "a request takes"),
    ],
)
def test_each_kind_of_bound_shows_its_own_arithmetic(objective, word):
    assert word in _said(objective)


@pytest.mark.parametrize(
    "objective",
    [
        at_most("output_throughput", 1e9),
        at_least("ttft.p95", 0.0),
        at_least("requests", 10**9),
        at_most("send_delay.p99", 1e-9),
        at_most("concurrency.max", 0),
    ],
)
def test_what_the_machine_does_not_limit_is_not_judged(objective):
    assert _said(objective) is None


def test_a_long_prompt_takes_its_flops():
    said = _said(at_most("ttft.p50", 0.5), prompt_tokens=16384)
    assert "16384 tokens" in said
    assert _said(at_most("ttft.p50", 0.5), prompt_tokens=128) is None


def test_speculation_lifts_the_bound_and_hides_the_gaps():
    assert _said(at_least("user_throughput.p50", 25), made=4.0) is None
    assert _said(at_most("tpot.p50", 0.04), made=4.0) is None
    assert _said(at_most("itl.p50", 1e-4), made=4.0) is None
    assert _said(at_most("itl.mean", 1e-4), made=4.0)


def test_a_model_that_fits_into_caches_is_not_judged():
    small = load_model("qwen3-0.6b")
    assert weight_bytes(small, NVFP4) < CACHED
    assert _said(at_most("tpot.p50", 1e-9), NVFP4, shape=small) is None


def test_a_load_that_cannot_be():
    with pytest.raises(ValueError, match="users=0"):
        _said(at_least("output_throughput", 1), users=0)


LOADS = st.fixed_dictionaries(
    {
        "users": st.integers(1, 512),
        "prompt_tokens": st.integers(0, 8192),
        "output_tokens": st.integers(1, 4096),
        "made": st.floats(1, 8),
    }
)
MACHINES = st.tuples(
    st.sampled_from(model_names()).map(load_model),
    st.sampled_from(hardware_names()).map(load_hardware),
    st.sampled_from([BF16, NVFP4, Precision("fp8", "bf16")]),
)


@given(MACHINES, LOADS, st.floats(1e-6, 1e6))
def test_more_users_or_tokens_a_step_and_a_laxer_bound_never_make_it_impossible(machine, load, x):
    if forbidden(at_least("output_throughput", x), *machine, **load) is None:
        for easier in (
            load | {"users": load["users"] + 1},
            load | {"made": load["made"] * 1.5},
            load | {"prompt_tokens": load["prompt_tokens"] // 2},
        ):
            assert forbidden(at_least("output_throughput", x), *machine, **easier) is None
        assert forbidden(at_least("output_throughput", x / 2), *machine, **load) is None
    for metric in ("ttft.p50", "tpot.mean", "itl.max", "e2e.p99"):
        if forbidden(at_most(metric, x), *machine, **load) is None:
            assert forbidden(at_most(metric, 2 * x), *machine, **load) is None
            shorter = load | {"prompt_tokens": load["prompt_tokens"] // 2}
            assert forbidden(at_most(metric, x), *machine, **shorter) is None


@given(MACHINES, LOADS)
def test_each_limit_lies_between_what_is_forbidden_and_what_is_not(machine, load):
    if weight_bytes(machine[0], machine[2]) < CACHED:
        return
    for metric in ("output_throughput", "user_throughput.p50"):
        assert forbidden(at_least(metric, 1e-9), *machine, **load) is None
        assert forbidden(at_least(metric, 1e12), *machine, **load)
    for metric in ("ttft.p50", "tpot.mean", "itl.max", "e2e.p99"):
        assert forbidden(at_most(metric, 1e9), *machine, **load) is None
        assert forbidden(at_most(metric, 1e-12), *machine, **load)


@settings(max_examples=40, deadline=None)
@given(
    MACHINES,
    st.integers(1, 24),
    st.sampled_from([1, 16, 128, 1024]),
    st.sampled_from([2, 8, 64]),
    st.integers(0, 3),
)
def test_what_the_emulated_machine_reaches_at_full_efficiency_is_never_forbidden(
    machine, users, prompt, output, drafts
):
    from dataclasses import replace

    shape, hardware, precision = machine
    perfect = replace(hardware, bandwidth_efficiency=1.0, compute_efficiency=1.0, overhead=0.0)
    if kv_capacity(shape, perfect, precision) < users * (prompt + output):
        return
    seen = simulate(
        Machine(shape, perfect, precision),
        Policy(users, 2048, draft_tokens=drafts, acceptance=1.0),
        users=users,
        prompt=prompt,
        output=output,
    )
    load = {"users": users, "prompt_tokens": prompt, "output_tokens": output, "made": 1 + drafts}
    for metric in ("output_throughput", "user_throughput.p50", "user_throughput.max"):
        reached = at_least(metric, seen.value(metric) * (1 - 1e-9))
        assert forbidden(reached, shape, hardware, precision, **load) is None
    for metric in ("ttft.p50", "tpot.mean", "ttft.mean"):
        reached = at_most(metric, seen.value(metric) * (1 + 1e-9))
        assert forbidden(reached, shape, hardware, precision, **load) is None
