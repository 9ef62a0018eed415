"""Who sends the next request: warm-up, closed loop, open loop."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmserve.load.client import LEAD, Client, Exchange
from pytest_llmserve.load.plan import ClosedLoop
from pytest_llmserve.load.requests import PLANNED, WARMUP
from pytest_llmserve.load.schedule import arrival_times, user_starts

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import LoadPlan

#: A user whose request failed waits so long, so that a dead server is not hammered.
FAILURE_PAUSE = 0.1
#: Without users, so many warm-up requests are in flight at a time.
WARMUP_AT_ONCE = 16


@dataclass(frozen=True)
class Shard:
    """The part of a plan that one process drives: every `count`-th user or arrival."""

    number: int = 0
    count: int = 1

    @property
    def part(self) -> slice:
        """This shard's places in a list of the whole plan."""
        return slice(self.number, None, self.count)


class Warmup:
    """Sends the plan's warm-up requests, at most as many at once as there will be users."""

    def __init__(self, client: Client, plan: LoadPlan, shard: Shard) -> None:
        self._client = client
        self._waiting = deque(range(plan.warmup)[shard.part])
        self._left = len(self._waiting)
        arrivals = plan.arrivals
        at_once = arrivals.users if isinstance(arrivals, ClosedLoop) else WARMUP_AT_ONCE
        self._at_once = len(range(at_once)[shard.part])

    def begin(self) -> None:
        for _ in range(min(self._at_once, len(self._waiting))):
            self._next(time.monotonic())

    def ended(self, exchange: Exchange) -> None:
        self._left -= 1
        if self._waiting:
            failed = exchange.error or exchange.status != 200
            self._next(exchange.end + (FAILURE_PAUSE if failed else 0.0))

    def _next(self, when: float) -> None:
        exchange = Exchange(WARMUP, -1, self._waiting.popleft())
        exchange.intended = when
        self._client.schedule(exchange)

    def going(self) -> bool:
        """Whether warm-up requests are still to be sent or in flight."""
        return self._left > 0


class Closed:
    """Users who each send their next request when the last one has ended."""

    def __init__(self, client: Client, plan: LoadPlan, shard: Shard, start: float) -> None:
        assert isinstance(plan.arrivals, ClosedLoop)
        self._client, self._think = client, plan.arrivals.think_time
        starts = (start + user_starts(plan)).tolist()
        self._starts = list(enumerate(starts))[shard.part]
        self._end = start + plan.lead + plan.duration
        self._next: dict[int, Exchange] = {}

    def begin(self) -> None:
        for user, start in self._starts:
            exchange = Exchange(PLANNED, user, 0)
            exchange.intended = start
            self._client.prepare_in_idle_time(exchange)
            self._client.schedule(exchange)
            self._look_ahead(user, 1)

    def _look_ahead(self, user: int, number: int) -> None:
        exchange = self._next[user] = Exchange(PLANNED, user, number)
        self._client.prepare_in_idle_time(exchange)

    def ended(self, exchange: Exchange) -> None:
        failed = exchange.error or exchange.status != 200
        pause = max(self._think, FAILURE_PAUSE) if failed else self._think
        following = self._next[exchange.user]
        following.intended = exchange.end + pause
        if following.intended < self._end:
            self._client.schedule(following)
            self._look_ahead(exchange.user, following.number + 1)

    def sending(self) -> bool:
        """Whether requests may still have to be sent."""
        return time.monotonic() < self._end


class Open:
    """Arrivals at planned times, whatever becomes of the requests before."""

    def __init__(self, client: Client, plan: LoadPlan, shard: Shard, start: float) -> None:
        self._client = client
        times = (start + arrival_times(plan)).tolist()
        self._times = deque(list(enumerate(times))[shard.part])
        self._end = start + plan.lead + plan.duration
        self._left = len(self._times)

    def begin(self) -> None:
        self._advance()

    def _advance(self) -> None:
        """Hand over what is due within twice the lead; the rest in good time."""
        horizon = time.monotonic() + 2 * LEAD
        while self._times and self._times[0][1] < horizon:
            number, when = self._times.popleft()
            exchange = Exchange(PLANNED, -1, number)
            exchange.intended = when
            self._client.prepare_in_idle_time(exchange)
            self._client.schedule(exchange)
        if self._times:
            self._client.at(max(self._times[0][1] - 2 * LEAD, horizon - 1.5 * LEAD), self._advance)

    def ended(self, exchange: Exchange) -> None:
        self._left -= 1

    def sending(self) -> bool:
        """Whether requests may still have to be sent."""
        return time.monotonic() < self._end
