"""Lesson 1: inference answers one user; serving makes the same chip answer many at once."""

import pytest

from pytest_llmserve import at_least, at_most, closed_loop, factories

pytestmark = pytest.mark.inference_vs_serving

serial_server = factories.llm_server(variant="serial")
load_serial = factories.load("serial_server")


def answers(profile):
    """Short ones, so that even a server that takes users one at a time gets round to all of them
    within the load: it must be found slow, not unmeasurable."""
    return {
        "prompt_tokens": profile.prompt_tokens,
        "output_tokens": max(4, profile.output_tokens // 4),
    }


def test_one_user_leaves_the_chip_idle(load, slo, llm_profile):
    """Each token of one user makes the chip read all weights once, and its arithmetic waits for
    them. Three more users ride along in the same pass: the machine gives several times as much,
    and the first user hardly notices."""
    alone, four = (
        load(closed_loop(users=n), duration=llm_profile.duration / 5, **answers(llm_profile))
        for n in (1, 4)
    )
    if "roofline_of_one" in llm_profile.bounds:  # only where the machine is known
        slo.check(alone, at_least("roofline", llm_profile.bound("roofline_of_one")))
    slo.check(
        four,
        at_least(
            "output_throughput", llm_profile.bound("gain_of_four") * alone["output_throughput"]
        ),
        at_least(
            "user_throughput.mean",
            llm_profile.bound("user_keeps_of_four") * alone["user_throughput.mean"],
        ),
    )


def test_many_users_share_the_machine(load, slo, llm_profile):
    """All users at once: what the machine gains, and what each of them loses of the speed that
    one user has alone."""
    alone = load(closed_loop(users=1), duration=llm_profile.duration / 5, **answers(llm_profile))
    together = load(
        closed_loop(users=llm_profile.users),
        duration=llm_profile.duration / 2,
        **answers(llm_profile),
    )
    slo.check(
        together,
        at_least(
            "output_throughput", llm_profile.bound("batching_gain") * alone["output_throughput"]
        ),
        at_least(
            "user_throughput.mean",
            llm_profile.bound("user_keeps") * alone["user_throughput.mean"],
        ),
    )


def test_against_one_at_a_time(load, load_serial, ab, llm_profile):
    """The same users on the same model, served one at a time (as Ollama does unless told
    otherwise) and batched, in turns: batching gives more tokens, and nobody waits for a turn."""
    users = min(8, llm_profile.users)
    pairs = ab(
        load_serial,
        load,
        closed_loop(users=users),
        pairs=3,
        duration=llm_profile.duration / 5,
        **answers(llm_profile),
    )
    ab.check(
        pairs,
        at_least("output_throughput", llm_profile.bound("gain_over_serial")),
        at_most("ttft.mean", llm_profile.bound("wait_beside_serial")),
    )
