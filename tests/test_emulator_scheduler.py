"""The scheduler and the paged KV cache, driven by hypothesis without time or sockets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmserve.emulator.catalog import load_hardware, load_model
from pytest_llmserve.emulator.kv import BlockPool, chain
from pytest_llmserve.emulator.physics import Machine, Noise
from pytest_llmserve.emulator.scheduler import Policy, Scheduler, Sequence, Work
from pytest_llmserve.emulator.simulate import simulate
from pytest_llmserve.metrics.roofline import Precision


def sequence(prompt: list[int], length: int) -> Sequence:
    start = hash(tuple(prompt)) % 1000
    return Sequence(prompt, length, lambda i: start + i)


def check(scheduler: Scheduler, works: list[Work]) -> None:
    """What must hold after every plan."""
    policy, pool = scheduler.policy, scheduler.pool
    assert sum(work.tokens for work in works) <= policy.max_num_batched_tokens
    assert len(works) <= len(scheduler.running) <= policy.places
    assert len({id(work.sequence) for work in works}) == len(works)
    held = Counter(block for s in scheduler.running for block in s.blocks)
    for s in scheduler.running:
        assert len(s.blocks) == len(set(s.blocks)), "a block twice in one sequence"
    for block in range(pool.count):
        assert pool.references(block) == held[block], "a block lost or owned by nobody"
    assert pool.free == pool.count - len(held)
    shared = [block for block, owners in held.items() if owners > 1]
    for block in shared:  # only full blocks with the same tokens before them may be shared
        places = [
            (s.blocks.index(block), tuple(s.known[: (s.blocks.index(block) + 1) * pool.size]))
            for s in scheduler.running
            if block in s.blocks
        ]
        assert len(set(places)) == 1
    for s in scheduler.waiting:
        assert s.blocks == []
    for work in works:
        covered = len(work.sequence.blocks) * pool.size
        assert work.context + work.tokens <= covered
        assert (work.makes == 0) == (work.context + work.tokens < len(work.sequence.known))
        assert work.makes <= 1 + work.drafts


@dataclass(frozen=True)
class Case:
    policy: Policy
    blocks: int
    size: int
    caching: bool
    requests: list[tuple[list[int], int, int, int | None]]  # prompt, length, step, abort step


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.sampled_from([1, 2, 4, 16]))
    longest = draw(st.integers(2, 40))
    blocks = draw(st.integers(-(-longest // size), 60))
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        # Few different tokens and repeated beginnings, so that prefixes are often shared.
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=longest - 1))
        length = draw(st.integers(1, longest - len(prompt)))
        step = draw(st.integers(0, 15))
        abort = draw(st.one_of(st.none(), st.integers(0, 20)))
        requests.append((prompt, length, step, abort))
    policy = Policy(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 24)),
        batching=draw(st.sampled_from(["continuous", "static", "serial"])),
        draft_tokens=draw(st.integers(0, 3)),
        acceptance=draw(st.floats(0, 1)),
    )
    return Case(policy, blocks, size, draw(st.booleans()), requests)


@settings(max_examples=400, deadline=None)
@given(cases())
def test_invariants_under_any_load(case: Case) -> None:
    pool = BlockPool(case.blocks, case.size, prefix_caching=case.caching)
    scheduler = Scheduler(case.policy, pool, seed=1)
    arriving: dict[int, list[Sequence]] = {}
    leaving: dict[int, list[Sequence]] = {}
    order: list[Sequence] = []
    for prompt, length, step, abort in sorted(case.requests, key=lambda r: r[2]):
        new = sequence(prompt, length)
        order.append(new)
        arriving.setdefault(step, []).append(new)
        if abort is not None:
            leaving.setdefault(max(abort, step), []).append(new)
    made: Counter[Sequence] = Counter()
    finished: list[Sequence] = []
    admitted: list[Sequence] = []
    step = 0
    while step <= 40 or scheduler.busy:
        for new in arriving.get(step, []):
            scheduler.add(new)
        works = scheduler.plan()
        check(scheduler, works)
        ranks = [order.index(s) for s in (*scheduler.running, *scheduler.waiting)]
        assert ranks == sorted(ranks), "someone overtook, or lost his place by preemption"
        admitted += [w.sequence for w in works if w.sequence not in admitted]
        for gone in leaving.get(step, []):
            scheduler.abort(gone)
        # At least the eldest can always go on.
        assert works or not scheduler.busy, "something could have run"
        for emission in scheduler.commit(works):
            assert emission.first == made[emission.sequence], "a token lost or sent twice"
            made[emission.sequence] += emission.count
            if emission.done:
                finished.append(emission.sequence)
        step += 1
        assert step < 5000, "starvation"
    assert pool.free == pool.count
    for done in order:
        if not any(done in gone for gone in leaving.values()):
            assert done in finished
        if done in finished:
            assert made[done] == done.length == done.made
            assert done.known == done.prompt + [done.token(i) for i in range(done.length)]
    # First come, first served: admission is in the order of arrival.
    assert admitted == [s for s in order if s in admitted]


def run(scheduler: Scheduler) -> list[list[Work]]:
    steps = []
    while scheduler.busy:
        works = scheduler.plan()
        assert works, "something could have run"
        steps.append(works)
        scheduler.commit(works)
    return steps


def test_a_long_prompt_goes_in_chunks_beside_decodes() -> None:
    scheduler = Scheduler(Policy(max_num_batched_tokens=10), BlockPool(100, 4))
    short, long = sequence([1], 8), sequence(list(range(25)), 2)
    scheduler.add(short)
    scheduler.add(long)
    steps = run(scheduler)
    assert [[(w.tokens, w.makes) for w in works] for works in steps[:4]] == [
        [(1, 1), (9, 0)],
        [(1, 1), (9, 0)],
        [(1, 1), (7, 1)],
        [(1, 1), (1, 1)],
    ]


def test_static_batching_refills_only_when_all_are_done() -> None:
    lengths = [2, 6, 3, 3]
    steps = {}
    for batching in ("continuous", "static", "serial"):
        scheduler = Scheduler(Policy(max_num_seqs=2, batching=batching), BlockPool(100, 4))
        for length in lengths:
            scheduler.add(sequence([1, 2], length))
        steps[batching] = len(run(scheduler))
    assert steps == {"continuous": 8, "static": 9, "serial": 14}


def test_a_static_batch_is_formed_over_several_steps() -> None:
    policy = Policy(max_num_seqs=3, max_num_batched_tokens=4, batching="static")
    scheduler = Scheduler(policy, BlockPool(100, 4))
    for _ in range(4):
        scheduler.add(sequence([1, 2, 3, 4, 5, 6], 8))
    running = []
    while scheduler.busy and len(running) < 100:
        scheduler.commit(scheduler.plan())
        running.append(len(scheduler.running))
    assert max(running) == 3
    assert running.count(1) >= 8, "the fourth came alone, after the others were done"


def test_the_youngest_is_preempted_and_computed_anew() -> None:
    scheduler = Scheduler(Policy(), BlockPool(8, 1, prefix_caching=False))
    old, young = sequence([1, 2], 6), sequence([3, 4], 4)
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler)
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert scheduler.totals.preemptions == 1
    assert (old.made, young.made) == (6, 4)


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = Scheduler(Policy(), BlockPool(100, 4))
    prefix = list(range(16))
    scheduler.add(sequence([*prefix, 100], 2))
    run(scheduler)
    scheduler.add(sequence([*prefix, 200], 2))
    (work,) = scheduler.plan()
    assert (work.context, work.tokens, work.sequence.cached) == (16, 1, 16)
    assert (scheduler.totals.prefix_queries, scheduler.totals.prefix_hits) == (34, 16)


def test_a_conversation_finds_its_own_answer_in_the_cache() -> None:
    scheduler = Scheduler(Policy(), BlockPool(100, 4))
    first = sequence(list(range(8)), 9)
    scheduler.add(first)
    run(scheduler)
    scheduler.add(sequence([*first.known, 7, 7, 7], 1))
    (work,) = scheduler.plan()
    assert work.sequence.cached == 16  # 8 of the prompt and the 8 of the answer that had KV


def test_the_whole_prompt_is_never_taken_from_the_cache() -> None:
    scheduler = Scheduler(Policy(), BlockPool(100, 4))
    for _ in range(2):
        scheduler.add(sequence(list(range(8)), 1))
        steps = run(scheduler)
    assert steps[0][0].tokens == 4


def test_what_was_used_last_is_evicted_last() -> None:
    pool = BlockPool(4, 2)
    old, new = pool.allocate(2), pool.allocate(2)
    a = chain(0, [1, 1])
    b = chain(a, [2, 2])
    c = chain(0, [3, 3])
    for block, value in zip((*old, new[0]), (a, b, c), strict=True):
        pool.register(block, value)
    pool.release(old)
    pool.release(new)
    assert pool.match([a, b]) == old
    pool.allocate(1)  # takes the block freed first, which is the last of the older sequence
    assert pool.match([a, b]) == [old[0]]
    pool.hold(pool.match([a]))
    assert pool.available(beside=pool.match([c])) == 1
    with pytest.raises(ValueError, match="3 blocks asked for, 2 are free"):
        pool.allocate(3)


def test_lost_blocks_never_come_back() -> None:
    pool = BlockPool(4, 2)
    assert pool.lose(3) == 3
    assert pool.lose(3) == 1
    assert (pool.free, pool.usage) == (0, 1.0)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 1.0])
def test_speculation_makes_the_tokens_that_its_acceptance_promises(acceptance: float) -> None:
    policy = Policy(draft_tokens=3, acceptance=acceptance)
    scheduler = Scheduler(policy, BlockPool(400, 16), seed=5)
    one = sequence([1], 4000)
    scheduler.add(one)
    steps = run(scheduler)
    expected = sum(acceptance**i for i in range(4))
    assert (4000 - 1) / (len(steps) - 1) == pytest.approx(expected, rel=0.05)
    totals = scheduler.totals
    assert totals.accepted_tokens == sum(totals.accepted_at) == sum(w[0].makes - 1 for w in steps)
    assert one.made == 4000


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(Policy(), BlockPool(4, 4))
    with pytest.raises(ValueError, match="longer than the whole KV cache"):
        scheduler.add(sequence([1] * 10, 7))
    with pytest.raises(ValueError, match="needs a prompt"):
        scheduler.add(sequence([], 7))


def spark(weights: str, kv: str) -> Machine:
    return Machine(load_model("qwen3-8b"), load_hardware("dgx-spark"), Precision(weights, kv))


def output_rate(users: int, weights: str, kv: str) -> float:
    figures = simulate(spark(weights, kv), Policy(), users=users, prompt=128, output=128)
    return figures.output_throughput


def test_thirty_users_on_a_spark_are_at_the_border_of_a_thousand_tokens() -> None:
    assert output_rate(30, "nvfp4", "fp8") == pytest.approx(1015, rel=0.01)
    assert output_rate(30, "bf16", "bf16") < 400
    assert output_rate(30, "fp8", "fp8") < 700
    assert output_rate(1, "nvfp4", "fp8") < 40


def test_a_closed_loop_in_its_own_time() -> None:
    machine = spark("nvfp4", "fp8")
    alone = simulate(machine, Policy(), users=1, prompt=128, output=64)
    assert alone.concurrency == pytest.approx(1)
    assert alone.ttft_p50 < 2 * alone.tpot_p50
    # 64 tokens in 64 steps, prefill among them; and two thirds of all tokens are the prompts'.
    assert alone.output_throughput == pytest.approx(1 / alone.tpot_p50, rel=0.05)
    assert alone.total_throughput == pytest.approx(3 * alone.output_throughput, rel=0.05)
    queued = simulate(machine, Policy(batching="serial"), users=8, prompt=128, output=64)
    assert queued.output_throughput == pytest.approx(alone.output_throughput, rel=0.05)
    assert queued.ttft_p50 > 6 * 64 * alone.tpot_p50
    batched = simulate(machine, Policy(), users=8, prompt=128, output=64)
    assert batched.output_throughput > 6 * alone.output_throughput
    guessing = Policy(draft_tokens=3, acceptance=0.8)
    quicker = simulate(machine, guessing, users=8, prompt=128, output=64)
    assert quicker.output_throughput > 2 * batched.output_throughput


def test_noise_has_mean_one_and_its_sigma() -> None:
    import numpy as np

    quiet = Noise(0.0, 0.0, seed=1)
    assert quiet.factor() == 1.0
    noisy = Noise(0.1, 0.0, seed=1)
    factors = np.array([noisy.factor() for _ in range(20_000)])
    assert factors.mean() == pytest.approx(1.0, abs=0.005)
    assert factors.std() == pytest.approx(0.1, abs=0.005)
    runs = np.array([Noise(0.0, 0.05, seed=s).factor() for s in range(2000)])
    assert runs.std() == pytest.approx(0.05, abs=0.005)
    fixed = Noise(0.0, 0.05, seed=3)
    assert fixed.factor() == fixed.factor() != 1.0
