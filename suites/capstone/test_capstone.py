"""The capstone: one machine serves Qwen3-8B to 30 users at 1,000 tokens/s, and answers at once."""

import pytest

from pytest_llmserve import at_least, at_most, closed_loop

pytestmark = pytest.mark.capstone

USERS = 30


def test_thirty_users(load, slo, baseline):
    """30 users, each with a request in flight all the time: 1,000 output tokens/s between them, and
    95 of 100 requests see their first token within half a second."""
    run = load(closed_loop(users=USERS), duration=60)
    slo.check(
        run,
        at_least("output_throughput", 1000),
        at_most("ttft.p95", 0.5),
        at_least("concurrency.max", USERS),
    )
    baseline.check(run)


def test_latency_under_load(load, slo):
    """What more users cost each of them: throughput rises, and so does everyone's waiting."""
    curve = [load(closed_loop(users=users), duration=12) for users in (1, 2, 4, 8, 16, USERS)]
    alone, full = curve[0], curve[-1]
    # Serving turns the idle rest of the chip into users: that is the whole point of batching.
    slo.check(full, at_least("output_throughput", 5 * alone["output_throughput"]))
