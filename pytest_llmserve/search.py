"""How many users a server holds within its objectives, found by search on noisy measurements.

`next_users` and `bracket` decide over what was measured and know nothing of servers; `most_users`
measures. The answer is a number of users that was measured to hold, never one between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import ConfigError

if TYPE_CHECKING:
    from pytest_llmserve.fixtures import Load
    from pytest_llmserve.outcome import TestRecord
    from pytest_llmserve.run import Outcome, Run, Verdict
    from pytest_llmserve.verdict.slo import Objective

#: Measurements of one number of users that is near its bound; the majority decides.
MOST_TRIALS = 3
#: Attempts at one point whose load was no measurement.
MOST_ATTEMPTS = 3
#: Validity checks that a server fails by being too slow for the load, not the client.
_TOO_SLOW = ("window", "drained")


@dataclass(frozen=True)
class Trial:
    """One measurement. `margin` is how far it was from the objective that it met least well, as a
    share of the bound: positive or 0 if all were met, −∞ if requests failed."""

    users: int
    margin: float


def holds(margins: Sequence[float], near: float) -> bool | None:
    """Whether a number of users holds, by the margins measured there; None while that is open.

    One measurement that is farther than `near` from its bound decides. One that is nearer is
    repeated, and two of three decide.
    """
    if not margins:
        return None
    if abs(margins[0]) > near:
        return margins[0] >= 0
    held = sum(margin >= 0 for margin in margins)
    for votes, outcome in ((held, True), (len(margins) - held, False)):
        if votes > MOST_TRIALS // 2:
            return outcome
    return None


def bracket(trials: Sequence[Trial], near: float) -> tuple[int, int | None]:
    """The most users that hold (0: none was seen to) and the fewest that do not (None likewise)."""
    margins: dict[int, list[float]] = {}
    for trial in trials:
        margins.setdefault(trial.users, []).append(trial.margin)
    decided = {users: holds(found, near) for users, found in margins.items()}
    low = max((users for users, held in decided.items() if held), default=0)
    high = min((users for users, held in decided.items() if held is False), default=None)
    return low, high


def next_users(
    trials: Sequence[Trial], *, start: int, upto: int, precision: float, near: float
) -> int | None:
    """The number of users to measure next; None when the answer is known.

    From `start` upwards by doubling (downwards by halving) until one number holds and another does
    not, then the middle of the two, until they are 1 or `precision` (a share) apart. What is near
    its bound comes again.
    """
    if not trials:
        return min(start, upto)
    last = [trial.margin for trial in trials if trial.users == trials[-1].users]
    if holds(last, near) is None:
        return trials[-1].users
    low, high = bracket(trials, near)
    if high is None:
        return None if low >= upto else min(2 * low, upto)
    if low == 0:
        return None if high == 1 else high // 2
    return None if high - low <= max(1.0, precision * low) else (low + high) // 2


def run_search(
    measure: Callable[[int], float],
    *,
    start: int,
    upto: int,
    precision: float,
    near: float,
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[tuple[Trial, ...], bool]:
    """All trials, and whether they settle the answer or the `budget` (seconds) ended before.

    `measure` gives a margin (`Trial`). A measurement is begun only if one that takes as long as the
    longest so far still fits; the first always is.
    """
    trials: list[Trial] = []
    began, longest = clock(), 0.0
    while True:
        users = next_users(trials, start=start, upto=upto, precision=precision, near=near)
        if users is None:
            return tuple(trials), True
        at = clock()
        if trials and at - began + longest > budget:
            return tuple(trials), False
        trials.append(Trial(users, measure(users)))
        longest = max(longest, clock() - at)


@dataclass(frozen=True)
class Found:
    """What a search found.

    `users` were measured to hold all objectives (0: not even one did), `beyond` is the fewest that
    were measured not to (None: the search never saw one). `settled` is false if the budget ended
    before the two were close enough, `bounded` true if `upto`, the most it was to try, still held.
    `run` is the measurement that `users` rests on (with 0 users: the one of fewest users), `runs`
    are all of them in order. `repeated` loads were no measurement and were driven again.
    """

    users: int
    beyond: int | None
    settled: bool
    bounded: bool
    run: Run
    runs: tuple[Run, ...]
    objectives: tuple[Objective, ...]
    repeated: int = 0
    _record: TestRecord | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        said = f"{self.users} users held {' and '.join(map(str, self.objectives))}"
        if self.beyond is not None:
            said += f", {self.beyond} did not"
        elif self.bounded:
            said += ", and more were not tried"
        if not self.settled:
            said += "; the search's budget ended before it was settled"
        if self.repeated:
            said += f"; {self.repeated} loads were no measurement and were driven again"
        return said

    def check(self, *, at_least: int) -> Verdict:
        """Judge the answer: the server must hold `at_least` users.

        Fails the test if it was measured not to. Inconclusive if the budget ended before that was
        known, or if the percentile that the answer rests on has too few samples.
        """
        from pytest_llmserve.run import Verdict

        outcome, reason = self._judge(at_least)
        objective = f"users_within_slo >= {at_least}"
        verdict = Verdict(objective, float(self.users), float(at_least), outcome, reason)
        if self._record is not None:
            if self.run.valid:
                self._record.of(self.run).verdicts.append(verdict)
            self._record.stop_if_bad([verdict])
        return verdict

    def _judge(self, least: int) -> tuple[Outcome, str]:
        from pytest_llmserve.verdict.slo import symptoms, uncertified

        if self.users >= least:
            lacking = [uncertified(self.run.metrics, o.metric) for o in self.objectives]
            first = next(filter(None, lacking), None)
            return ("inconclusive", f"{self}, but {first}") if first else ("pass", str(self))
        if not self.settled and (self.beyond is None or self.beyond > least):
            return "inconclusive", f"{self}: give it more time, or start it nearer"
        if self.bounded:
            return "inconclusive", f"{self}: raise upto to {least}"
        worst = min((run for run in self.runs if _users(run) == self.beyond), key=self._margin)
        return "fail", "; ".join([str(self), *symptoms(worst)])

    def _margin(self, run: Run) -> float:
        return margin_of(run, self.objectives)


def most_users(
    load: Load,
    *objectives: Objective,
    upto: int,
    duration: float = 30.0,
    budget: float = 600.0,
    start: int = 1,
    precision: float = 0.05,
    near: float = 0.05,
    **arguments: Any,
) -> Found:
    """The most users, up to `upto`, with which all objectives hold: `Found`.

    `duration` (seconds) is the measured time of each load, `budget` the time of the whole search,
    `start` the first number of users. The answer is exact to `precision` (a share of it);
    measurements within `near` (a share) of a bound are repeated. `arguments` go to the `load`
    fixture. A load whose requests fail does not hold, and a load that is no measurement is driven
    again; if it still is none, the test is an error, as everywhere.
    """
    from pytest_llmserve.fixtures import stop_test

    try:
        _check(objectives, upto=upto, start=start, precision=precision, near=near, budget=budget)
    except ConfigError as error:
        stop_test(error)
    measuring = _Measuring(replace(load, runs=1), objectives, {"duration": duration, **arguments})
    try:
        trials, settled = run_search(
            measuring, start=start, upto=upto, precision=precision, near=near, budget=budget
        )
    except ConfigError as error:
        stop_test(error)
    users, beyond = bracket(trials, near)
    wanted = users or min(trial.users for trial in trials)
    held = [run for run in measuring.runs if _users(run) == wanted]
    return Found(
        users=users,
        beyond=beyond,
        settled=settled,
        bounded=users >= upto,
        run=max(held, key=lambda run: margin_of(run, objectives)),
        runs=tuple(measuring.runs),
        objectives=objectives,
        repeated=measuring.repeated,
        _record=load.record,
    )


@dataclass
class _Measuring:
    """Called with a number of users: drives them and gives the margin. Keeps the runs."""

    load: Load
    objectives: tuple[Objective, ...]
    arguments: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    repeated: int = 0

    def __call__(self, users: int) -> float:
        from pytest_llmserve.load.plan import closed_loop

        bounds = {o.metric: o.bound for o in self.objectives if o.relation == "<="}
        for attempt in range(1, MOST_ATTEMPTS + 1):
            # What fails is the server's answer to so many users, not a fault of the measurement.
            driven = self.load(closed_loop(users=users), allow_errors=1.0, **self.arguments)
            run = self.load.record.bind(driven, bounds)
            wrong = [check.check for check in run.validity if not check.ok]
            if not wrong:
                break
            if attempt == MOST_ATTEMPTS and not _too_slow(wrong):
                from pytest_llmserve.fixtures import stop_test
                from pytest_llmserve.verdict.slo import invalid_reason

                stop_test(ConfigError(f"invalid: {invalid_reason(run)}"))
            # No figure of it is shown, and one that says no more than "too slow" is an answer.
            self.load.record.measured.remove(self.load.record.of(run))
            if _too_slow(wrong):
                break
            self.repeated += 1
        self.runs.append(run)
        return margin_of(run, self.objectives)


def _too_slow(wrong: Sequence[str]) -> bool:
    return all(check in _TOO_SLOW for check in wrong)


def margin_of(run: Run, objectives: Sequence[Objective]) -> float:
    """How far a run is from the objective that it meets least well (`Trial.margin`).

    Raises ConfigError for an objective that could not be measured.
    """
    if not run.valid or run.metrics["errors"]:
        return -math.inf
    return min(_margin(run, objective) for objective in objectives)


def _margin(run: Run, objective: Objective) -> float:
    try:
        value = run[objective.metric]
    except KeyError:
        value = math.nan
    if math.isnan(value):
        raise ConfigError(
            f"most_users(…, {objective}): {objective.metric} could not be measured with "
            f"{_users(run)} users: lengthen duration, or take another metric"
        )
    away = value - objective.bound if objective.relation == ">=" else objective.bound - value
    return away / abs(objective.bound) if objective.bound else math.copysign(math.inf, away)


def _users(run: Run) -> int:
    from pytest_llmserve.load.plan import ClosedLoop

    assert isinstance(run.plan.arrivals, ClosedLoop)
    return run.plan.arrivals.users


def _check(objectives: Sequence[Objective], **numbers: float) -> None:
    if not objectives:
        raise ConfigError("most_users(load) without an objective has no end: add one")
    for name in ("upto", "start"):
        if not (isinstance(numbers[name], int) and numbers[name] >= 1):
            raise ConfigError(
                f"most_users({name}={numbers[name]!r}): {name} must be a whole number from 1 up"
            )
    for name in ("precision", "near", "budget"):
        if not numbers[name] >= 0:
            raise ConfigError(f"most_users({name}={numbers[name]!r}): {name} must not be negative")
