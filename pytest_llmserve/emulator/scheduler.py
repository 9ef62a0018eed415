"""Iteration-level scheduling, without time and without sockets.

`plan` composes one step out of what is waiting and running; `commit` says that the step is over
and gives the tokens it made. Who drives it decides how long a step takes. The rules are those of
vLLM's scheduler: a token budget a step, running sequences first, prompts in chunks of what is left,
first come first served, and when blocks run out the youngest running sequence is preempted and
computed anew later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from pytest_llmserve.emulator.kv import BlockPool, chain

Batching = Literal["continuous", "static", "serial"]


@dataclass(frozen=True)
class Policy:
    """`max_num_seqs` sequences and `max_num_batched_tokens` tokens a step at most.

    `batching`: `continuous` refills a place as soon as it is free, `static` only when the whole
    batch is done, `serial` serves one request at a time. With `draft_tokens` > 0 each decode step
    checks so many speculated tokens, of which one is accepted with probability `acceptance` if
    all before it were.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    batching: Batching = "continuous"
    draft_tokens: int = 0
    acceptance: float = 0.7

    @property
    def places(self) -> int:
        return 1 if self.batching == "serial" else self.max_num_seqs


@dataclass(eq=False)
class Sequence:
    """One request to the scheduler: `length` tokens are wanted, and `token(i)` makes the i-th."""

    prompt: list[int]
    length: int
    token: Callable[[int], int]
    known: list[int] = field(init=False)  # prompt, then what was made so far
    computed: int = 0  # of them, how many have their KV in the cache
    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)  # of the full blocks of `known`
    registered: int = 0  # full blocks that the prefix cache has been told of
    cached: int = 0  # prompt tokens that the prefix cache gave at the first admission
    admitted: bool = False
    preemptions: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.known = list(self.prompt)

    @property
    def made(self) -> int:
        return len(self.known) - len(self.prompt)

    @property
    def remaining(self) -> int:
        return self.length - self.made


@dataclass(frozen=True, eq=False)
class Work:
    """A sequence's share of a step: `tokens` go through the model after `context` computed ones.

    `makes` output tokens come of it (0: a chunk of a prompt); `drafts` were speculated.
    """

    sequence: Sequence
    context: int
    tokens: int
    makes: int
    drafts: int = 0


@dataclass(frozen=True)
class Emission:
    """Output tokens `first` to `first + count − 1` (from 0) of a sequence."""

    sequence: Sequence
    first: int
    count: int
    done: bool


@dataclass
class Totals:
    """What the scheduler has counted since its start."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)


class Scheduler:
    """Waiting queue, running list and the blocks they live in."""

    def __init__(self, policy: Policy, pool: BlockPool, seed: int = 0) -> None:
        self.policy = policy
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.totals = Totals(accepted_at=[0] * policy.draft_tokens)
        self._forming = False  # static batching: the batch may still be joined
        self._random = Random(seed)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a request. Raises ValueError if it could not run even alone."""
        if not (sequence.prompt and sequence.length >= 1):
            raise ValueError("a sequence needs a prompt and at least one token to make")
        if self._blocks(len(sequence.prompt) + sequence.length) > self.pool.count:
            raise ValueError("the sequence is longer than the whole KV cache")
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a request wherever it is; one that is over already stays so."""
        if sequence.done:
            return
        sequence.done = True
        if sequence in self.running:
            self._finish(sequence)
        else:
            self.waiting.remove(sequence)

    # one step

    def plan(self) -> list[Work]:
        """The next step's work; empty if there is nothing that can run."""
        budget = self.policy.max_num_batched_tokens
        works: list[Work] = []
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            work = self._work(sequence, budget)
            if not self._make_room(sequence, work.context + work.tokens):
                preempted = True
                continue  # the last of the list has gone; it may have been this one
            works.append(work)
            budget -= work.tokens
            index += 1
        if not preempted:
            works.extend(self._admit(budget))
        return works

    def commit(self, works: list[Work]) -> list[Emission]:
        """End the step that `plan` composed: the tokens it made, in the order of its work."""
        emissions: list[Emission] = []
        for work in works:
            sequence = work.sequence
            if sequence.done:
                continue  # aborted while the step ran
            if work.makes == 0:
                sequence.computed = work.context + work.tokens
                self._register(sequence)
                continue
            first = sequence.made
            sequence.computed = work.context + work.tokens - work.drafts + work.makes - 1
            for i in range(first, first + work.makes):
                sequence.known.append(sequence.token(i))
            self._register(sequence)
            sequence.done = sequence.remaining == 0
            if sequence.done:
                self._finish(sequence)
            self._count_drafts(work)
            emissions.append(Emission(sequence, first, work.makes, sequence.done))
        return emissions

    # parts of a step

    def _work(self, sequence: Sequence, budget: int) -> Work:
        pending = len(sequence.known) - sequence.computed
        if pending > budget:
            return Work(sequence, sequence.computed, budget, 0)
        decoding = pending == 1 and sequence.made > 0
        drafts = 0
        if decoding and self.policy.draft_tokens:
            drafts = min(self.policy.draft_tokens, sequence.remaining - 1, budget - 1)
        accepted = 0
        while accepted < drafts and self._random.random() < self.policy.acceptance:
            accepted += 1
        return Work(sequence, sequence.computed, pending + drafts, 1 + accepted, drafts)

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for `tokens` tokens of a running sequence; False if one was preempted instead."""
        missing = self._blocks(tokens) - len(sequence.blocks)
        if missing <= self.pool.free:
            if missing > 0:
                sequence.blocks += self.pool.allocate(missing)
            return True
        victim = self.running.pop()
        self.pool.release(victim.blocks)
        victim.blocks, victim.computed, victim.registered = [], 0, 0
        victim.preemptions += 1
        self.totals.preemptions += 1
        self.waiting.appendleft(victim)
        return False

    def _admit(self, budget: int) -> Iterator[Work]:
        if not self.running:
            self._forming = True
        if self.policy.batching == "static" and not self._forming:
            return
        while self.waiting and budget > 0 and len(self.running) < self.policy.places:
            sequence = self.waiting[0]
            found = self._find(sequence)
            sequence.computed = len(found) * self.pool.size
            work = self._work(sequence, budget)
            needed = self._blocks(work.context + work.tokens) - len(found)
            if needed > self.pool.available(beside=found):
                sequence.computed = 0
                break  # first come, first served: nobody overtakes
            self.waiting.popleft()
            self.pool.hold(found)
            sequence.blocks = found + self.pool.allocate(needed)
            sequence.registered = len(found)
            self.running.append(sequence)
            if not sequence.admitted:
                sequence.admitted = True
                sequence.cached = sequence.computed
                if self.pool.prefix_caching:  # like vLLM, which counts no look-ups without it
                    self.totals.prefix_queries += len(sequence.prompt)
                    self.totals.prefix_hits += sequence.cached
            budget -= work.tokens
            yield work
        # A batch that only the token budget cut short goes on being formed in the next step.
        self._forming = budget == 0

    def _find(self, sequence: Sequence) -> list[int]:
        if not self.pool.prefix_caching:
            return []
        # At least one token must be computed, because the next comes out of its logits.
        usable = (len(sequence.known) - 1) // self.pool.size
        self._hash(sequence, usable)
        return self.pool.match(sequence.hashes[:usable])

    def _hash(self, sequence: Sequence, blocks: int) -> None:
        size, hashes = self.pool.size, sequence.hashes
        for i in range(len(hashes), blocks):
            parent = hashes[-1] if hashes else 0
            hashes.append(chain(parent, sequence.known[i * size : (i + 1) * size]))

    def _register(self, sequence: Sequence) -> None:
        full = sequence.computed // self.pool.size
        if full > sequence.registered and self.pool.prefix_caching:
            self._hash(sequence, full)
            for i in range(sequence.registered, full):
                self.pool.register(sequence.blocks[i], sequence.hashes[i])
            sequence.registered = full

    def _finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _count_drafts(self, work: Work) -> None:
        if work.drafts:
            self.totals.drafts += 1
            self.totals.draft_tokens += work.drafts
            self.totals.accepted_tokens += work.makes - 1
            for position in range(work.makes - 1):
                self.totals.accepted_at[position] += 1

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.pool.size)
