"""The capstone's limits: how many users fit, and what random arrivals do to those who come."""

import pytest

from pytest_llmserve import at_least, at_most, closed_loop, most_users, open_loop

pytestmark = [pytest.mark.capstone, pytest.mark.nightly]

#: Part of what the server can do that a service should be given to do.
LOAD = 0.8


def test_users_within_slo(load, llm_profile):
    """The most users of whom each still sees the first token in time and gets text faster than it
    is read: doubled until it is too many, then halved in between, each point a measured load."""
    found = most_users(
        load,
        at_most("ttft.p95", llm_profile.bound("ttft.p95")),
        at_least("user_throughput.mean", llm_profile.bound("reading_speed")),
        upto=int(llm_profile.bound("most_users")),
        start=llm_profile.users,
        duration=llm_profile.bound("search_duration"),
        budget=llm_profile.bound("search_budget"),
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=llm_profile.output_tokens,
    )
    found.check(at_least=int(llm_profile.bound("users_within_slo")))


def test_poisson_arrivals(load, slo, llm_profile):
    """People do not wait for each other. At four fifths of what the server does for users that
    take turns, requests that come at random find it free often enough: nearly all of them get
    their first token in time and their text faster than it is read."""
    work = {
        "duration": llm_profile.duration / 3,
        "prompt_tokens": llm_profile.prompt_tokens,
        "output_tokens": llm_profile.output_tokens,
    }
    full = load(closed_loop(users=llm_profile.users), **work)
    slo.check(full, at_least("concurrency.max", llm_profile.users))
    run = load(
        open_loop(rate=LOAD * full["request_throughput"]),
        goodput={
            "ttft": llm_profile.bound("ttft.p95"),
            "tpot": 1 / llm_profile.bound("reading_speed"),
        },
        **work,
    )
    slo.check(run, at_least("goodput.fraction", llm_profile.bound("goodput.fraction")))
