"""The capstone: one machine serves Qwen3-8B to 30 users at 1,000 tokens/s, and answers at once."""

import pytest

from pytest_llmserve import at_least, at_most, closed_loop

pytestmark = [pytest.mark.capstone, pytest.mark.nightly]


def test_thirty_users(load, slo, baseline, llm_profile):
    """Every user has a request in flight all the time: 1,000 output tokens/s between 30 of them,
    and 95 of 100 requests see their first token within half a second."""
    run = load(
        closed_loop(users=llm_profile.users),
        duration=llm_profile.duration,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=llm_profile.output_tokens,
    )
    slo.check(
        run,
        at_least("output_throughput", llm_profile.bound("output_throughput")),
        at_most("ttft.p95", llm_profile.bound("ttft.p95")),
        at_least("concurrency.max", llm_profile.users),
    )
    baseline.check(run)


def test_latency_under_load(load, slo, llm_profile):
    """What more users cost each of them: throughput rises, and so does everyone's waiting."""
    most = int(llm_profile.bound("curve_users"))
    points = {2**n for n in range(10) if 2**n < most} | {llm_profile.users, most}
    curve = {
        users: load(
            closed_loop(users=users),
            duration=llm_profile.duration / 5,
            prompt_tokens=llm_profile.prompt_tokens,
            output_tokens=llm_profile.output_tokens,
        )
        for users in sorted(points)
    }
    alone, full = curve[1], curve[llm_profile.users]
    # Serving turns the idle rest of the chip into users: that is the whole point of batching.
    gain = llm_profile.bound("batching_gain")
    slo.check(full, at_least("output_throughput", gain * alone["output_throughput"]))
