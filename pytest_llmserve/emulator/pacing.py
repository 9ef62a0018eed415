"""Who says when a token leaves: the emulated machine, a fixed schedule, or the socket alone.

All three have the same four members. `due` is the monotonic time at which `fire` wants to be
called next, None if nothing is scheduled.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Protocol

from pytest_llmserve.emulator.answer import Answer
from pytest_llmserve.emulator.faults import Faults
from pytest_llmserve.emulator.physics import Machine, Noise
from pytest_llmserve.emulator.scheduler import Scheduler, Sequence, Work
from pytest_llmserve.emulator.stats import Stats

# A schedule that has fallen behind by more than this (the process was stopped, the machine was
# taken away) is given up and starts anew from the present, instead of being caught up in a burst.
_SLIP = 0.05


class Pacer(Protocol):
    """What the server's loop needs of a schedule."""

    @property
    def due(self) -> float | None: ...
    def submit(self, answer: Answer) -> None: ...
    def abort(self, answer: Answer) -> None: ...
    def fire(self) -> None: ...
    def load(self) -> tuple[int, int]: ...


class Batched:
    """Steps of continuous batching, as long as the emulated machine would take for each."""

    def __init__(
        self,
        scheduler: Scheduler,
        machine: Machine,
        noise: Noise,
        faults: Faults,
        stats: Stats,
        clock: Callable[[], float],
        ready_at: float,
    ) -> None:
        self.due: float | None = None
        self._scheduler = scheduler
        self._machine = machine
        self._noise = noise
        self._faults = faults
        self._leak = faults.get("kv-leak")
        self._stats = stats
        self._clock = clock
        self._ready_at = ready_at
        self._answers: dict[Sequence, Answer] = {}
        self._works: list[Work] = []
        self._emitting: list[Answer] = []

    def submit(self, answer: Answer) -> None:
        self._answers[answer.sequence] = answer
        self._scheduler.add(answer.sequence)
        if self.due is None:
            self._start(self._clock())

    def abort(self, answer: Answer) -> None:
        if self._answers.pop(answer.sequence, None) is not None:
            self._scheduler.abort(answer.sequence)
            self._stats.finished["abort"] += 1

    def fire(self) -> None:
        """End the step that is due: send its tokens, do the books, start the next."""
        due = self.due
        assert due is not None
        emitting = [answer for answer in self._emitting if answer.alive]
        for answer in emitting:
            answer.emit(due)
        now = self._clock()
        self._stats.schedule_error.observe(now - due)
        for answer in emitting:
            _account(answer, due, self._stats)
        for emission in self._scheduler.commit(self._works):
            if emission.done:
                answer = self._answers.pop(emission.sequence)
                _finish(answer, due, self._stats)
                if self._leak is not None:
                    self._scheduler.pool.lose(int(self._leak["blocks"]))
        if now - due > _SLIP:
            self._stats.slips += 1
            due = now
        self._start(due)

    def load(self) -> tuple[int, int]:
        return len(self._scheduler.running), len(self._scheduler.waiting)

    def _start(self, begin: float) -> None:
        works = self._scheduler.plan()
        self._works = works
        self._emitting = []
        if not works:
            self.due = None
            return
        slowdown = self._faults.slowdown(begin - self._ready_at)
        duration = self._machine.duration(works) * self._noise.factor() * slowdown
        self.due = begin + duration
        self._stats.step_tokens.observe(sum(work.tokens for work in works))
        for work in works:
            answer = self._answers[work.sequence]
            if answer.scheduled is None:
                answer.scheduled = begin
            if work.makes:
                answer.prepare(work.makes)
                self._emitting.append(answer)


class Exact:
    """First token `ttft` after the arrival, then one every `tpot`, whatever the load."""

    def __init__(self, ttft: float, tpot: float, stats: Stats, clock: Callable[[], float]) -> None:
        self._ttft = ttft
        self._tpot = tpot
        self._stats = stats
        self._clock = clock
        self._queue: list[tuple[float, int, Answer, float]] = []
        self._order = count()
        self._running: set[Answer] = set()

    @property
    def due(self) -> float | None:
        return self._queue[0][0] if self._queue else None

    def submit(self, answer: Answer) -> None:
        answer.prepare(1)
        answer.scheduled = answer.job.arrival
        self._running.add(answer)
        first = answer.job.arrival + self._ttft
        heapq.heappush(self._queue, (first, next(self._order), answer, first))

    def abort(self, answer: Answer) -> None:
        if answer in self._running:
            self._running.remove(answer)  # its entry is dropped when it comes up
            self._stats.finished["abort"] += 1

    def fire(self) -> None:
        queue = self._queue
        while queue and queue[0][0] <= self._clock():
            due, order, answer, first = heapq.heappop(queue)
            if not answer.alive:
                continue
            answer.emit(due)
            self._stats.schedule_error.observe(self._clock() - due)
            _account(answer, due, self._stats)
            if answer not in self._running:
                continue  # a fault has ended it
            if answer.complete:
                self._running.remove(answer)
                _finish(answer, due, self._stats)
            else:
                answer.prepare(1)
                heapq.heappush(queue, (first + answer.made * self._tpot, order, answer, first))

    def load(self) -> tuple[int, int]:
        return len(self._running), 0


class MaxRate:
    """As many tokens as the sockets take, in turns, with no schedule at all."""

    _TURN = 32

    def __init__(self, stats: Stats, clock: Callable[[], float]) -> None:
        self._stats = stats
        self._clock = clock
        self._answers: list[Answer] = []

    @property
    def due(self) -> float | None:
        if any(not answer.congested for answer in self._answers):
            return self._clock()
        return None

    def submit(self, answer: Answer) -> None:
        answer.scheduled = answer.job.arrival
        self._answers.append(answer)

    def abort(self, answer: Answer) -> None:
        if answer in self._answers:
            self._answers.remove(answer)
            self._stats.finished["abort"] += 1

    def fire(self) -> None:
        for answer in list(self._answers):
            turn = self._TURN
            while turn and answer.alive and not (answer.complete or answer.congested):
                now = self._clock()
                answer.prepare(1)
                answer.emit(now)
                _account(answer, now, self._stats)
                turn -= 1
                if answer.complete and answer in self._answers:
                    self._answers.remove(answer)
                    _finish(answer, now, self._stats)
                    break

    def load(self) -> tuple[int, int]:
        return len(self._answers), 0


def _account(answer: Answer, now: float, stats: Stats) -> None:
    stats.generation_tokens += answer.coming
    gap = answer.account(now)
    if gap is not None:
        stats.itl.observe(gap)
        return
    job, sequence = answer.job, answer.sequence
    begun = job.arrival if answer.scheduled is None else answer.scheduled
    stats.ttft.observe(now - job.arrival)
    stats.queue_time.observe(begun - job.arrival)
    stats.prefill_time.observe(now - begun)
    stats.prompt_tokens += len(sequence.prompt)
    stats.cached_tokens += sequence.cached


def _finish(answer: Answer, now: float, stats: Stats) -> None:
    job, sequence = answer.job, answer.sequence
    first = now if answer.first is None else answer.first
    stats.finished[job.finish] += 1
    stats.e2e.observe(now - job.arrival)
    stats.decode_time.observe(now - first)
    if sequence.length > 1:
        stats.tpot.observe((now - first) / (sequence.length - 1))
    stats.prompt_length.observe(len(sequence.prompt))
    stats.output_length.observe(sequence.length)
