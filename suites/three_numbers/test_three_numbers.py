"""Lesson 2: tokens per second, time to first token, and latency against throughput."""

from itertools import pairwise

import pytest

from pytest_llmserve import at_least, at_most, closed_loop

pytestmark = [pytest.mark.three_numbers, pytest.mark.nightly]


def test_time_to_first_token_grows_with_the_prompt(load, slo, llm_profile):
    """Before the first token the whole prompt is computed: a longer prompt means a longer wait,
    at the speed with which the machine reads."""
    short, middle, long = (
        load(
            closed_loop(users=1),
            duration=llm_profile.duration / 10,
            prompt_tokens=llm_profile.prompt_tokens * factor,
            output_tokens=4,
        )
        for factor in (1, 4, 15)
    )
    # What a prompt costs shows only beside the cost of any step: the middle one may be equal.
    slo.check(middle, at_least("ttft.mean", 0.9 * short["ttft.mean"]))
    slo.check(
        long,
        at_least("ttft.mean", llm_profile.bound("ttft_growth") * short["ttft.mean"]),
        at_most(
            "ttft.mean", 15 * llm_profile.prompt_tokens / llm_profile.bound("prompt_throughput")
        ),
    )


def test_tokens_come_as_fast_in_long_answers(load, slo, llm_profile):
    """Tokens per second belong to the machine, not to the answer: in one eight times as long the
    tokens come as fast, and only its end is later."""
    short, long = (
        load(
            closed_loop(users=1),
            duration=llm_profile.duration / 5,
            prompt_tokens=llm_profile.prompt_tokens,
            output_tokens=max(8, int(llm_profile.output_tokens * factor)),
        )
        for factor in (0.25, 2)
    )
    slo.check(
        long,
        at_least(
            "user_throughput.mean",
            llm_profile.bound("long_answer_keeps") * short["user_throughput.mean"],
        ),
        at_least("e2e.mean", 2 * short["e2e.mean"]),
    )


def test_faster_than_one_reads(load, slo, llm_profile):
    """With everybody there, 95 of 100 users still get their tokens faster than people read."""
    run = load(
        closed_loop(users=llm_profile.users),
        duration=llm_profile.duration * 2 / 3,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=llm_profile.output_tokens,
    )
    reading = llm_profile.bound("reading_speed")
    slo.check(
        run,
        at_most("tpot.p95", 1 / reading),
        at_least("user_throughput.mean", reading),
    )


def test_throughput_is_paid_for_with_latency(load, slo, llm_profile):
    """The third number is a curve: with more users the machine gives more tokens in all, and each
    user gets them more slowly. Both only up to a point."""
    points = [n for n in (1, 4, 16, 64) if n < llm_profile.users] + [llm_profile.users]
    curve = [
        load(
            closed_loop(users=n),
            duration=llm_profile.duration / 8,
            prompt_tokens=llm_profile.prompt_tokens,
            output_tokens=llm_profile.output_tokens // 2,
        )
        for n in points
    ]
    for fewer, more in pairwise(curve):
        slo.check(more, at_least("output_throughput", fewer["output_throughput"]))
    alone, full = curve[0], curve[-1]
    slo.check(
        full,
        at_least(
            "output_throughput", llm_profile.bound("batching_gain") * alone["output_throughput"]
        ),
        at_least("tpot.mean", alone["tpot.mean"]),
        at_most("tpot.mean", llm_profile.bound("tpot_growth") * alone["tpot.mean"]),
    )
