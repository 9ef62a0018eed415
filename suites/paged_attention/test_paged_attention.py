"""Lesson 4: the KV cache in pages. Memory follows the tokens in flight, beginnings are shared, and
when there are more tokens than pages, requests wait and nothing is lost."""

import math
import re
from pathlib import Path

import pytest

from pytest_llmserve import at_least, at_most, closed_loop, factories
from pytest_llmserve.answers import agreement, greedy, prompts
from pytest_llmserve.emulator.catalog import load_hardware, load_model
from pytest_llmserve.metrics.roofline import Precision, kv_capacity

pytestmark = pytest.mark.paged_attention

uncached_server = factories.llm_server(variant="no_prefix_cache")
load_uncached = factories.load("uncached_server")
small_server = factories.llm_server(variant="small_kv")
load_small = factories.load("small_server")

#: A shared beginning is so many times as long as what is each request's own.
PREFIX = 12
#: Turns of a conversation.
TURNS = 6


def blocks_of(server):
    """Number of KV blocks and tokens of each, as the engine itself says; None if it does not."""
    blocks, size = (server.effective.get(name) for name in ("num_gpu_blocks", "block_size"))
    return (int(blocks), int(size)) if blocks and size else None


def test_kv_use_follows_the_tokens_in_flight(load, slo, llm_profile):
    """Pages are taken as tokens come and given back when a request ends: four times the users hold
    four times the pages, as many as their tokens need, and afterwards none is held."""
    # Long answers: the engine is asked only now and then, and should not be met between two.
    prompt, output = llm_profile.prompt_tokens, max(128, llm_profile.output_tokens)
    points = max(1, llm_profile.users // 4), llm_profile.users
    few, many = (
        load(
            closed_loop(users=users),
            duration=llm_profile.duration / 3,
            prompt_tokens=prompt,
            output_tokens=output,
        )
        for users in points
    )
    tolerance = llm_profile.bound("kv_tolerance")
    growth = (1 - tolerance) * points[1] / points[0]
    slo.check(many, at_least("server.kv_usage.max", growth * few["server.kv_usage.max"]))
    known = blocks_of(load.server)
    for run, users in zip((few, many), points, strict=True):
        # Half of what one request holds: a single page that stays behind each of them is more.
        slo.check(run, at_most("server.kv_usage.last", run["server.kv_usage.max"] / users / 2))
        if known:
            blocks, size = known
            # The largest of a few readings: between all prompts and all whole answers.
            begun, whole = (math.ceil(n / size) for n in (prompt + 1, prompt + output))
            slo.check(
                run,
                at_least("server.kv_usage.max", (1 - tolerance) * users * begun / blocks),
                at_most("server.kv_usage.max", (1 + tolerance) * users * whole / blocks),
            )


def test_capacity_is_what_the_memory_allows(llm_server, llm_profile):
    """How many requests fit at once is arithmetic: (memory − weights) / KV bytes of a token, over
    the tokens of a request. The engine's own figure must be near ours."""
    known, longest = blocks_of(llm_server), llm_server.effective.get("max_model_len")
    if not known or not longest or not llm_server.log:
        pytest.skip(f"{llm_server.engine} does not say here how many KV blocks it has")
    blocks, size = known
    log = Path(llm_server.log).read_text(errors="replace")
    said = re.findall(r"[Mm]aximum concurrency for ([\d,]+) tokens per request: ([\d.,]+)x", log)
    tolerance = llm_profile.bound("kv_tolerance")
    for tokens, times in said:
        ours = blocks / math.ceil(int(tokens.replace(",", "")) / size)
        assert float(times.replace(",", "")) == pytest.approx(ours, rel=0.02, abs=0.01)
    if llm_profile.hardware and llm_profile.model:
        shape, hardware = load_model(llm_profile.model), load_hardware(llm_profile.hardware)
        planned = kv_capacity(shape, hardware, Precision(llm_profile.weights, llm_profile.kv))
        assert blocks * size == pytest.approx(planned, rel=tolerance), (
            f"{blocks * size:,} tokens of KV cache fit, {planned:,} should"
        )
    elif not said:
        pytest.skip("neither the engine's log nor the profile says what to compare with")


def test_a_shared_beginning_is_computed_once(load, load_uncached, ab, slo, llm_profile):
    """A long system prompt before every question: with the prefix cache only the question itself
    is computed, so the first token comes sooner. Prompts that have nothing in common gain
    nothing."""
    own = llm_profile.prompt_tokens
    work = {
        "duration": llm_profile.duration / 8,
        "prompt_tokens": own * (PREFIX + 1),
        "output_tokens": 4,
    }
    shared = {**work, "shared_prefix": own * PREFIX}
    pairs = ab(load_uncached, load, closed_loop(users=1), pairs=3, **shared)
    fresh = load(closed_loop(users=1), **work)
    for _, cached in pairs:
        share = PREFIX / (PREFIX + 1)
        slo.check(cached, at_least("server.prefix_hit_rate", 0.6 * share))
    ab.check(pairs, at_most("ttft.mean", llm_profile.bound("prefix_ttft")))
    without = sum(run["ttft.mean"] for run, _ in pairs) / len(pairs)
    slo.check(fresh, at_least("ttft.mean", 0.7 * without))


def test_a_conversation_is_not_read_again(load, slo, llm_profile):
    """Each turn of a chat sends all that was said before. What the server has read already comes
    from its pages: of the tokens that are sent, most are never computed."""
    prompt, output = llm_profile.prompt_tokens, 8
    run = load(
        closed_loop(users=min(4, llm_profile.users)),
        duration=llm_profile.duration / 6,
        prompt_tokens=prompt,
        output_tokens=output,
        turns=TURNS,
    )
    size = load.server.effective.get("block_size", 16)
    sent = [prompt * (turn + 1) + output * turn for turn in range(TURNS)]
    # The prompt of the turn before, as far as it filled whole pages.
    known = [0, *(tokens // size * size for tokens in sent[:-1])]
    slo.check(run, at_least("server.prefix_hit_rate", 0.6 * sum(known) / sum(sent)))


def test_more_than_fits_waits_and_comes_whole(load_small, slo, llm_profile):
    """A KV cache too small for all users: some wait, some are put back and computed anew, and
    every answer still has all its tokens (a run with a lost or short one is invalid)."""
    run = load_small(
        closed_loop(users=llm_profile.users),
        duration=llm_profile.duration / 4,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=llm_profile.output_tokens,
    )
    preempts = run["server.preemptions"] > 0
    slo.check(
        run,
        at_least("server.preemptions" if preempts else "server.waiting.max", 1),
        at_least("server.kv_usage.max", 0.7),
        at_most("server.kv_usage.last", 0.5 / llm_profile.users),
        at_least("requests", llm_profile.users),
    )


def test_answers_are_the_same_when_memory_is_short(small_server, llm_profile):
    """Greedy answers given alone, and again with all users at once on a KV cache too small for
    them: who was put back and computed anew goes on where it was."""
    asked = prompts(llm_profile.users, llm_profile.prompt_tokens)
    length = llm_profile.output_tokens
    alone = greedy(small_server, asked[:4], length)
    pressed = greedy(small_server, asked, length, at_once=len(asked))
    assert agreement(alone, pressed[:4]) >= llm_profile.bound("same_answers")
