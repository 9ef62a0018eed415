"""Lesson 3: requests join and leave the batch at every step, so none waits for another's end."""

import json

import pytest

from pytest_llmserve import Lengths, at_least, at_most, closed_loop, factories, trace

pytestmark = pytest.mark.continuous_batching

serial_server = factories.llm_server(variant="serial")
load_serial = factories.load("serial_server")
few_seats = factories.llm_server(variant="few_seats")
load_few_seats = factories.load("few_seats")

#: `max_num_seqs`, or what the engine calls it, of the variant `few_seats`.
SEATS = 4


def mixed(profile):
    """Many short answers and some four times as long, as users want them."""
    middle = max(4, profile.output_tokens // 4)
    return Lengths("lognormal", low=middle // 2, high=middle * 4, middle=middle, spread=0.8)


def test_a_late_request_joins_what_runs(load, slo, llm_profile, tmp_path):
    """Long requests are under way when a short one comes: it gets its first token in a fraction
    of the time that they still take."""
    work = {
        "prompt_tokens": llm_profile.prompt_tokens,
        "output_tokens": llm_profile.output_tokens * 2,
    }
    alone = load(
        closed_loop(users=1),
        duration=llm_profile.duration / 20,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=max(4, llm_profile.output_tokens // 8),
    )
    length = work["output_tokens"] * alone["tpot.mean"]
    late = length / 4
    rows = [{"at": 0.0, **work}] * min(7, llm_profile.users - 1)
    rows.append({"at": late, "prompt_tokens": llm_profile.prompt_tokens, "output_tokens": 4})
    file = tmp_path / "late.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load(trace(file), duration=length, **work)
    left = work["output_tokens"] * run["tpot.mean"] - late
    # The longest wait of all: the long ones must not have waited for each other either.
    slo.check(run, at_most("ttft.max", llm_profile.bound("wait_of_late") * left))


def test_short_answers_do_not_wait_for_long_ones(load, slo, llm_profile):
    """Lengths as different as in life: a place is free as soon as its own answer ends, not when
    the longest of a batch does, so the next request starts at once."""
    lengths = mixed(llm_profile)
    run = load(
        closed_loop(users=min(8, llm_profile.users)),
        duration=llm_profile.duration / 5,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=lengths,
    )
    longest = lengths.high * run["tpot.mean"]
    slo.check(run, at_most("ttft.mean", llm_profile.bound("wait_of_mixed") * longest))


def test_beyond_the_seats_requests_queue(load_few_seats, slo, llm_profile):
    """A server with four seats: up to four users each adds throughput. Once somebody waits for
    every seat, twice as many users get no more out of it; they wait longer in the queue, and who
    has a seat decodes as fast as before."""
    work = {
        "prompt_tokens": llm_profile.prompt_tokens,
        "output_tokens": max(8, llm_profile.output_tokens // 4),
    }
    alone, seated, queued, crowded = (
        load_few_seats(closed_loop(users=n), duration=llm_profile.duration / 5, **work)
        for n in (1, SEATS, 2 * SEATS, 4 * SEATS)
    )
    slo.check(
        seated,
        at_least(
            "output_throughput", llm_profile.bound("gain_of_four") * alone["output_throughput"]
        ),
    )
    same = llm_profile.bound("crowd_costs")
    slo.check(
        crowded,
        at_most("output_throughput", same * queued["output_throughput"]),
        at_most("tpot.mean", same * queued["tpot.mean"]),
        # Three turns to wait instead of one.
        at_least("ttft.mean", 1.5 * queued["ttft.mean"]),
        at_least("server.queue_time.mean", 0.5 * crowded["ttft.mean"]),
        at_most("server.running.max", SEATS),
    )


def test_against_one_at_a_time(load, load_serial, ab, llm_profile):
    """Mixed requests of several users, one at a time and batched continuously, in turns."""
    pairs = ab(
        load_serial,
        load,
        closed_loop(users=4),
        pairs=3,
        duration=llm_profile.duration / 5,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=mixed(llm_profile),
    )
    ab.check(
        pairs,
        at_least("output_throughput", llm_profile.bound("gain_over_serial")),
        at_most("ttft.mean", llm_profile.bound("wait_beside_serial")),
    )
