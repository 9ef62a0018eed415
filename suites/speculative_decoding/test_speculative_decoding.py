"""Lesson 5: guess some tokens and check them in one pass. The answer stays the same; how much
sooner it is there depends on how many guesses are right and on how busy the machine is."""

import json
import math

import pytest

from pytest_llmserve import at_least, at_most, closed_loop, factories
from pytest_llmserve.answers import agreement, greedy, prompts

pytestmark = pytest.mark.speculative_decoding

#: The ways to speculate that a profile may have as variants of its server.
WAYS = ("speculative", "draft_model", "eagle")

speculative_server = factories.llm_server(variant="speculative")
draft_model_server = factories.llm_server(variant="draft_model")
eagle_server = factories.llm_server(variant="eagle")
load_speculative = factories.load("speculative_server")
load_draft_model = factories.load("draft_model_server")
load_eagle = factories.load("eagle_server")
synthetic_server = factories.llm_server(variant="synthetic")
load_synthetic = factories.load("synthetic_server")


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
def guessing_server(request, way):
    """The server that speculates; skips where the profile has none of this kind."""
    return request.getfixturevalue(f"{way}_server")


@pytest.fixture
def load_guessing(request, way):
    return request.getfixturevalue(f"load_{way}")


def texts(count, profile):
    """Prompts that say one sentence again and again, each its own: text that can be guessed."""
    times = max(2, profile.prompt_tokens // 16)
    return [" ".join([sentence] * times) for sentence in prompts(count, 16)]


@pytest.fixture
def guessable(llm_profile, tmp_path):
    """A file of such prompts, as the `dataset` of a load."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts(200, llm_profile)))
    return str(file)


@pytest.fixture
def compare(load, load_guessing, ab, llm_profile, guessable):
    """Pairs of runs without and with speculation for a number of users."""

    def measure(users):
        return ab(
            load,
            load_guessing,
            closed_loop(users=users),
            pairs=3,
            duration=llm_profile.duration / 6,
            dataset=guessable,
            output_tokens=llm_profile.output_tokens,
        )

    return measure


def test_one_user_gains(compare, ab, slo, llm_profile):
    """Alone on the machine: checking five tokens costs hardly more than making one, because both
    wait for the weights. Every guess that is right is a pass saved."""
    pairs = compare(users=1)
    for plain, guessed in pairs:
        slo.check(guessed, at_least("server.accepted_length", llm_profile.bound("accepted_length")))
        length = guessed["server.accepted_length"]
        if math.isfinite(length):  # the server's count must explain what the client saw
            most = 1.1 * length * plain["output_throughput"]
            slo.check(guessed, at_most("output_throughput", most))
    ab.check(pairs, at_least("output_throughput", llm_profile.bound("speculation_gain")))


def test_many_users_may_lose(compare, ab, llm_profile):
    """With everybody there the machine is busy, and wrong guesses take time from others. What is
    left of the gain, or lost, must be no worse than the profile allows."""
    pairs = compare(users=llm_profile.users)
    ab.check(pairs, at_least("output_throughput", llm_profile.bound("speculation_gain_of_many")))


def test_answers_are_the_same(llm_server, guessing_server, llm_profile):
    """A guess only counts where the model itself would have said the same: greedy answers with and
    without speculation are identical."""
    asked = texts(4, llm_profile)
    plain = greedy(llm_server, asked, llm_profile.output_tokens)
    guessed = greedy(guessing_server, asked, llm_profile.output_tokens)
    assert agreement(plain, guessed) >= llm_profile.bound("same_answers")


def test_a_set_rate_of_right_guesses(load_synthetic, slo, llm_profile, guessable):
    """What would guesses be worth that are right so often? The server accepts at a set rate instead
    of by checking, whatever the text; what it counts must be what it was told."""
    told = load_synthetic.server.config.args["speculative-config"]["synthetic_acceptance_length"]
    run = load_synthetic(
        closed_loop(users=1),
        duration=llm_profile.duration / 6,
        dataset=guessable,
        output_tokens=llm_profile.output_tokens,
    )
    slo.check(
        run,
        at_least("server.accepted_length", 0.85 * told),
        at_most("server.accepted_length", 1.15 * told),
    )
