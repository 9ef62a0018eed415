"""The fixtures that compare runs: `baseline` with stored ones, `ab` with those of another server.

As light as `fixtures`: nothing more than pytest is imported until they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.fixtures import Load, make_load, stop_test
from pytest_llmserve.outcome import TestRecord, test_record
from pytest_llmserve.run import Run, Verdict

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import Arrivals
    from pytest_llmserve.session import Session
    from pytest_llmserve.verdict.baseline import Tracked
    from pytest_llmserve.verdict.slo import Objective


@dataclass(frozen=True)
class Baseline:
    """`baseline.check(run)`: compare with the stored runs of this test on this hardware."""

    session: Session
    record: TestRecord
    request: pytest.FixtureRequest

    def check(
        self, *runs: Run, metrics: Sequence[str | Tracked] | None = None
    ) -> tuple[Verdict, ...]:
        """Judge runs by their baselines; a test that passes then stores them if
        `--llmserve-update-baselines` asks for it.

        `metrics` are dotted names (None: throughput, TTFT p95 and TPOT p50). Several runs, such as
        the points of a latency-under-load curve, are judged as one family, each by the stored runs
        of its own load. What seems to have become worse is measured once more before it counts,
        or as `--llmserve-repeats` says. Outcomes as for `SLO.check`. In a test that calibrates
        nothing is judged.
        """
        from pytest_llmserve.verdict.baseline import TRACKED, compare, path_of, tracked

        settings = self.session.settings
        try:
            wanted = TRACKED if metrics is None else [tracked(m) for m in _several(metrics)]
            found = [self.record.of(run) for run in _runs(runs, "baseline.check(run, …)")]
            if self.record.calibrated is not None:
                self.record.calibrated.update({t.metric: t for t in wanted})
                return ()
            storing = settings.update_baselines != "none"
            compared = compare(
                [
                    # With nothing to compare with, nothing depends on how late the client was.
                    _bind(self.record, run, wanted)
                    if storing or path_of(run, settings.baselines).exists()
                    else run
                    for run in runs
                ],
                settings.baselines,
                metrics=wanted,
                rerun=lambda run: self._rerun(run, wanted),
                repeats=settings.repeats,
                mode=settings.update_baselines,
                reason=settings.reason,
                options=settings.given,
            )
        except ConfigError as error:
            stop_test(error)
        for measured, result in zip(found, compared, strict=True):
            measured.verdicts.extend(result.verdicts)
            before = measured.compared
            measured.compared = result if before is None else before.merged(result)
        verdicts = tuple(verdict for result in compared for verdict in result.verdicts)
        self.record.stop_if_bad(verdicts)
        return verdicts

    def _rerun(self, run: Run, metrics: Sequence[Tracked]) -> Run:
        from pytest_llmserve.measurement import fresh_seed

        load = make_load(self.request, run.server).present()
        again = load.again(
            replace(run.plan, seed=fresh_seed()), allow_errors=self.record.of(run).allow_errors
        )
        return _bind(self.record, again, metrics)


@dataclass(frozen=True)
class AB:
    """`pairs = ab(load_a, load_b, closed_loop(30))`, then `ab.check(pairs, at_least(…))`: has B
    become better than A by so much, or, without objectives, is it no worse?"""

    record: TestRecord

    def __call__(
        self, a: Load, b: Load, arrivals: Arrivals, *, pairs: int = 4, **load: Any
    ) -> list[tuple[Run, Run]]:
        """Measure the load on two servers in turn, A B B A A B …, and give the pairs (A, B).

        `load` are arguments of the `load` fixture. Both runs of a pair have the same requests.
        Where one GPU holds one of the servers only, each is ended to make room for the other and
        started again: once for every two runs, because of the order.
        """
        from pytest_llmserve.measurement import fresh_seed
        from pytest_llmserve.verdict.ab import alternate

        for side in (a, b):
            if not isinstance(side, Load):
                stop_test(ConfigError(f"ab(a, b, arrivals): {side!r} is no load fixture"))
        if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
            stop_test(ConfigError(f"ab(pairs={pairs!r}): pairs must be a whole number from 1 up"))
        if "seed" in load:
            stop_test(ConfigError("ab(seed=…): each pair has a seed of its own; leave seed= out"))
        seeds = [fresh_seed() for _ in range(pairs)]
        # The same prompts twice on one server would be answered from its prefix cache.
        same = a.server.config.key == b.server.config.key
        remaining = iter(seeds), iter([fresh_seed() for _ in seeds] if same else seeds)

        def once(label: str, side: Load, number: int) -> Run:
            ready = replace(side.present(), runs=1)
            run = ready(arrivals, seed=next(remaining[number]), **load)
            self.record.of(run).label = label
            return run

        return alternate(lambda: once("A", a, 0), lambda: once("B", b, 1), pairs)

    def check(
        self,
        pairs: Sequence[tuple[Run, Run]],
        *objectives: Objective,
        metrics: Sequence[str | Tracked] | None = None,
    ) -> tuple[Verdict, ...]:
        """Judge B by A. An objective is on the ratio B / A: `at_least("output_throughput", 1.2)`.
        Without objectives B must be no worse than A in each of `metrics` (None: those that
        baselines track). Outcomes as for `SLO.check`."""
        from pytest_llmserve.verdict.ab import judge_ab
        from pytest_llmserve.verdict.baseline import TRACKED, tracked

        try:
            runs = _runs([run for pair in pairs for run in pair], "ab.check(pairs, …)")
            wanted = TRACKED if metrics is None else [tracked(m) for m in _several(metrics)]
            asserted = [tracked(o.metric) for o in objectives] or wanted
            bound = [_bind(self.record, run, asserted) for run in runs]
            verdicts = judge_ab(
                list(zip(bound[::2], bound[1::2], strict=True)), objectives, metrics=wanted
            )
        except ConfigError as error:
            stop_test(error)
        self.record.of(runs[-1]).verdicts.extend(verdicts)
        self.record.stop_if_bad(verdicts)
        return verdicts


def _several(metrics: Sequence[str | Tracked]) -> Sequence[str | Tracked]:
    if isinstance(metrics, str):
        raise ConfigError(f"metrics={metrics!r}: write a list of names, metrics=[{metrics!r}]")
    return metrics


def _runs(runs: Sequence[Any], where: str) -> Sequence[Run]:
    for run in runs:
        if not isinstance(run, Run):
            raise ConfigError(
                f"{where}: {run!r} is no run that `load` gave (metrics=[…] for names)"
            )
    if not runs:
        raise ConfigError(f"{where} without a run proves nothing: add one")
    return runs


def _bind(record: TestRecord, run: Run, metrics: Sequence[Tracked]) -> Run:
    """The run, checked for what a comparison asserts: no more than changes as large as a floor,
    so being late by half of that is what the client may do."""
    from pytest_llmserve.verdict.slo import number
    from pytest_llmserve.verdict.validity import DELAY_SHARE

    bounds = {
        t.metric: value * t.floor / 2 / DELAY_SHARE
        for t in metrics
        if t.better == "lower" and (value := number(run.metrics, t.metric)) is not None
    }
    return record.bind(run, bounds)


@pytest.fixture
def baseline(request: pytest.FixtureRequest) -> Baseline:
    """Compares runs with stored baselines (see `Baseline.check`)."""
    from pytest_llmserve.plugin import session_of

    return Baseline(session_of(request.config), test_record(request.node), request)


@pytest.fixture
def ab(request: pytest.FixtureRequest) -> AB:
    """Measures two servers in turn and compares them (see `AB`)."""
    return AB(test_record(request.node))
