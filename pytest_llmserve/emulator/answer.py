"""One request on its way out: from tokens that the schedule makes to bytes on its connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pytest_llmserve.emulator.dialects import Api, Dialect, Encoder, Usage, error_event, whole
from pytest_llmserve.emulator.faults import Fault, Trouble
from pytest_llmserve.emulator.http import LAST_CHUNK, Connection, chunk, head
from pytest_llmserve.emulator.scheduler import Sequence
from pytest_llmserve.emulator.truth import TruthLog


@dataclass(frozen=True)
class Job:
    """What was asked for, checked. `text(i)` is what the i-th token writes."""

    identity: str
    api: Api
    model: str
    created: int
    arrival: float
    stream: bool
    include_usage: bool
    continuous_usage: bool
    finish: str
    reasoning: int
    text: Callable[[int], str]
    cached_details: bool


class Answer:
    """Prepares events ahead of their time, so that at their time there is only a `send` left.

    `prepare` says how many tokens come next, `emit` lets them go. `alive` ends with the last
    token, with a lost client, or with a fault; whoever schedules it then drops it.
    """

    def __init__(
        self,
        job: Job,
        sequence: Sequence,
        connection: Connection,
        dialect: Dialect,
        trouble: Trouble,
        *,
        clock: Callable[[], float],
        truth: TruthLog | None,
        events_per_write: int,
        after: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self.job = job
        self.sequence = sequence
        self.alive = True
        self.scheduled: float | None = None  # when its first step began
        self.first: float | None = None
        self.last = 0.0
        self.made = 0
        self.coming = 0
        self.on_abort: Callable[[Answer], None] | None = None
        self._connection = connection
        self._dialect = dialect
        self._trouble = trouble
        self._clock = clock
        self._truth = truth
        self._per_write = events_per_write
        self._after = after
        self._encoder = Encoder(
            dialect,
            job.api,
            job.identity,
            job.created,
            job.model,
            include_usage=job.include_usage,
            continuous_usage=job.continuous_usage,
            reasoning=job.reasoning,
        )
        self._events = 0
        self._data = b""
        self._end: Callable[[], None] | None = None
        self._held: list[tuple[bytes, int, float]] = []
        self._stalled = False
        self._texts: list[str] = []
        connection.on_lost = self._lost

    @property
    def congested(self) -> bool:
        return self._connection.congested

    @property
    def complete(self) -> bool:
        """Whether every token has been emitted, as far as the schedule is concerned."""
        return self.made == self.sequence.length

    def prepare(self, count: int) -> None:
        """Make the bytes of the next `count` tokens, which are one event."""
        self.coming = count
        texts = [self.job.text(i) for i in range(self.made, self.made + count)]
        if not self.job.stream:
            self._texts += texts
            return
        made = self.made + count
        last = made == self.sequence.length
        usage = self._usage()
        events: list[bytes] = []
        if self._events == 0:
            events += self._encoder.opening(usage)
        events += self._encoder.event(
            "".join(texts), made, self.job.finish if last else None, usage
        )
        if last:
            events += self._encoder.closing(made + self._trouble.count_error, usage)
        for fault in self._trouble.within.get(self._events, ()):
            events = self._strike(fault, events)
        framed = b"".join(map(chunk, events))
        if self._events == 0:
            framed = head(200, "text/event-stream; charset=utf-8") + framed
        if last and self._end is None:
            framed += LAST_CHUNK
        self._data = framed
        self._events += 1

    def emit(self, due: float) -> None:
        """Send what was prepared. `due` is the time that the schedule says."""
        self.made += self.coming
        if not self.job.stream:
            if self.complete:
                self._answer_whole(due)
            return
        self._held.append((self._data, self.made, due))
        if self._stalled:
            return
        if len(self._held) >= self._per_write or self.complete or self._end is not None:
            self._flush()

    def account(self, now: float) -> float | None:
        """Note the time of the event that just left; gives the gap to the one before."""
        gap = None if self.first is None else now - self.last
        if self.first is None:
            self.first = now
        self.last = now
        return gap

    # what emit does

    def _flush(self) -> None:
        held, self._held = self._held, []
        data = held[0][0] if len(held) == 1 else b"".join(part for part, _, _ in held)
        connection = self._connection
        if self._trouble.fragment:
            middle = len(data) // 2
            connection.send(data[:middle])
            data = data[middle:]
        before = self._clock()
        connection.send(data)
        if self._truth is not None:
            after = self._clock()
            for _, made, due in held:
                self._truth.add((self.job.identity, made, due, before, after))
        if self._end is not None:
            self._stop(self._end)
        elif self.complete:
            self._stop(connection.done)

    def _answer_whole(self, due: float) -> None:
        job = self.job
        split = job.reasoning if job.api == "chat" else 0
        body = whole(
            job.api, job.identity, job.created, job.model,
            "".join(self._texts[split:]), "".join(self._texts[:split]), self._dialect.reasoning,
            self.made + self._trouble.count_error, job.finish, self._usage(),
        )  # fmt: skip
        connection = self._connection
        before = self._clock()
        self._stop(lambda: connection.answer(200, body))
        if self._truth is not None:
            self._truth.add((job.identity, self.made, due, before, self._clock()))

    def _usage(self) -> Usage:
        cached = self.sequence.cached if self.job.cached_details else None
        return Usage(len(self.sequence.prompt), cached)

    # how it ends

    def _stop(self, how: Callable[[], None]) -> None:
        self.alive = False
        self._connection.on_lost = None
        how()

    def _lost(self) -> None:
        """The client went away."""
        self.alive = False
        if self.on_abort is not None:
            self.on_abort(self)

    def _cut(self, how: Callable[[], None]) -> Callable[[], None]:
        """End by a fault: the schedule must let the request go as if the client had left."""

        def end() -> None:
            how()
            if self.on_abort is not None:
                self.on_abort(self)

        return end

    def _strike(self, fault: Fault, events: list[bytes]) -> list[bytes]:
        """What is sent instead of `events` where a fault strikes."""
        connection = self._connection
        match fault.name:
            case "reset":
                self._end = self._cut(lambda: connection.drop(reset=True))
                return []
            case "truncate":
                self._end = self._cut(connection.drop)
                return []
            case "no-done":
                self._end = self._cut(self._end_body)
                return []
            case "error-event":
                self._end = self._cut(self._end_body)
                return error_event("EngineCore died (emulated fault).", self._dialect.blank)
            case "hang":
                self._end = self._cut(lambda: None)
                return []
            case "malformed":
                return [events[0][: len(events[0]) // 2] + b"\n\n", *events[1:]]
            case _:  # stall
                self._stalled = True
                self._after(fault["seconds"], self._resume)
                return events

    def _end_body(self) -> None:
        self._connection.send(LAST_CHUNK)
        self._connection.done()

    def _resume(self) -> None:
        self._stalled = False
        if self._held and self._connection.open:
            self._flush()
