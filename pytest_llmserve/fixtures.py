"""The fixtures `llm_server`, `load` and `slo`; to make more of them: `factories`. The fixtures that
compare runs are in `comparing`.

Each is a small callable object over the session and the test's own list of runs; nothing here
imports more than pytest until it is used.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import pytest

from pytest_llmserve.errors import ConfigError, LoadError, ServerError, UnavailableError
from pytest_llmserve.outcome import Measured, TestRecord, test_record
from pytest_llmserve.run import Run, Verdict

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import Arrivals, Lengths, LoadPlan
    from pytest_llmserve.profiles import Profile
    from pytest_llmserve.servers import Server, ServerConfig
    from pytest_llmserve.session import Session
    from pytest_llmserve.verdict.slo import Objective

MARKER = "llmserve"
CALIBRATE = "llmserve_calibrate"
#: Runs of each load in a test that calibrates, unless its marker says otherwise.
CALIBRATION_RUNS = 10


def stop_test(error: Exception) -> NoReturn:
    """Fail the test with the error's one sentence: no traceback, and not a word of its context."""
    raise pytest.fail.Exception(str(error), pytrace=False) from None


def serve(request: pytest.FixtureRequest, arguments: Mapping[str, Any], where: str) -> Server:
    """The server for these marker or factory arguments; ends the test if it cannot be had."""
    from pytest_llmserve.plugin import session_of
    from pytest_llmserve.resolve import resolve

    session = session_of(request.config)
    try:
        found = resolve(session.settings, arguments, where)
    except UnavailableError as error:
        pytest.skip(str(error))
    except ConfigError as error:
        stop_test(error)
    return _running(session, found.config, request.config)


def machine(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    """This machine without another load on it; says so while there is one."""
    from pytest_llmserve.plugin import session_of

    def waiting() -> AbstractContextManager[Any]:
        from pytest_llmserve.report.progress import live

        return live(request.config, "waiting for another load on this machine to end")

    return session_of(request.config).alone(waiting)


def _running(session: Session, config: ServerConfig, pytest_config: pytest.Config) -> Server:
    """The server for a config, started if it does not run; ends the test if it cannot be had."""
    from pytest_llmserve.report.progress import live

    try:
        with live(pytest_config, f"starting {config.name}") as stage:
            return session.serve(config, stage)
    except ServerError as error:
        session.kept = True
        stop_test(error)
    except ConfigError as error:
        stop_test(error)


def marker_arguments(item: pytest.Item) -> Mapping[str, Any]:
    """The arguments of the test's `llmserve` marker; the closest one counts."""
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return {}
    if marker.args:
        raise ConfigError(
            f"{item.nodeid}: @pytest.mark.llmserve takes keywords only, "
            f"such as server={marker.args[0]!r}"
        )
    return marker.kwargs


def check_capstone(item: pytest.Item) -> None:
    """ConfigError if the test's `capstone` marker has arguments: it takes none."""
    marker = item.get_closest_marker("capstone")
    if marker is not None and (marker.args or marker.kwargs):
        raise ConfigError(
            f"{item.nodeid}: @pytest.mark.capstone takes no arguments: name the server with "
            "@pytest.mark.llmserve(server=…)"
        )


def calibration_runs(item: pytest.Item) -> int | None:
    """How often the test's `llmserve_calibrate` marker has each load measured; None without one.

    Raises ConfigError for arguments that cannot be right.
    """
    marker = item.get_closest_marker(CALIBRATE)
    if marker is None:
        return None
    where = f"{item.nodeid}: @pytest.mark.{CALIBRATE}"
    if marker.args or set(marker.kwargs) - {"runs"}:
        raise ConfigError(f"{where} takes runs= and nothing else, such as runs={CALIBRATION_RUNS}")
    runs = marker.kwargs.get("runs", CALIBRATION_RUNS)
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 3:
        raise ConfigError(f"{where}: runs={runs!r} must be a whole number from 3 up, best 10")
    return runs


@pytest.fixture
def llm_server(request: pytest.FixtureRequest) -> Generator[Server, None, None]:
    """The server that the options and the test's `llmserve` marker name: started once per effective
    config, shared by all tests, ended with the run. No other test loads this machine meanwhile."""
    with machine(request):
        try:
            arguments = marker_arguments(request.node)
        except ConfigError as error:
            stop_test(error)
        yield serve(request, arguments, f"{request.node.nodeid}: @pytest.mark.llmserve")


@dataclass(frozen=True)
class Load:
    """`load(arrivals, duration=…)`: drive a load against the server and measure it, `runs` times
    in a test that calibrates."""

    server: Server
    session: Session
    record: TestRecord
    config: pytest.Config
    runs: int = 1

    def __call__(
        self,
        arrivals: Arrivals,
        *,
        duration: float = 30.0,
        prompt_tokens: int | Lengths = 128,
        output_tokens: int | Lengths = 128,
        api: Literal["completions", "chat"] = "completions",
        stream: bool = True,
        shared_prefix: int = 0,
        prefixes: int = 1,
        turns: int = 1,
        dataset: str | None = None,
        warmup: int | None = None,
        drain: float = 60.0,
        timeout: float = 600.0,
        seed: int | None = None,
        allow_errors: float = 0.0,
        goodput: Mapping[str, float] | None = None,
    ) -> Run:
        """Measure one load; all lengths in tokens, all times in seconds.

        What a request asks for is a `Workload` (`load.plan`); `Lengths` in place of a number of
        tokens draws each request's length from a distribution.
        `warmup` requests go ahead unmeasured (None: one for each user). `allow_errors` is the
        share of requests that may fail in a valid run. `seed` repeats an earlier run's requests;
        without one the prompts are new. `goodput` is what a request must meet to count for the
        metric of that name: `{"ttft": 0.5, "tpot": 0.05}` (also `e2e`, and `user_throughput` as
        the least). A run that is no measurement (`Run.valid` is false) makes the test an error,
        whatever it asserts. A test that calibrates gets the first of the runs.
        """
        from pytest_llmserve.load.plan import ClosedLoop, LoadPlan, Workload
        from pytest_llmserve.measurement import fresh_seed

        try:
            workload = Workload(
                prompt_tokens=_middle(prompt_tokens),
                output_tokens=_middle(output_tokens),
                shared_prefix=shared_prefix,
                api=api,
                stream=stream,
                prefixes=prefixes,
                prompt_lengths=None if isinstance(prompt_tokens, int) else prompt_tokens,
                output_lengths=None if isinstance(output_tokens, int) else output_tokens,
                turns=turns,
                dataset=dataset,
            )
            users = arrivals.users if isinstance(arrivals, ClosedLoop) else 8
            plan = LoadPlan(
                arrivals=arrivals,
                workload=workload,
                duration=duration,
                warmup=users if warmup is None else warmup,
                drain=drain,
                timeout=timeout,
                seed=fresh_seed() if seed is None else seed,
            )
            _check_goodput(goodput)
        except ConfigError as error:
            stop_test(error)
        run = self.again(plan, allow_errors=allow_errors, goodput=goodput)
        for _ in range(1, self.runs):
            anew = replace(plan, seed=fresh_seed())
            self.again(anew, allow_errors=allow_errors, goodput=goodput)
        return run

    def again(
        self,
        plan: LoadPlan,
        *,
        allow_errors: float = 0.0,
        goodput: Mapping[str, float] | None = None,
    ) -> Run:
        """Measure a plan as it stands; with another seed it is an independent repeat."""
        from pytest_llmserve.load.calibration import for_run
        from pytest_llmserve.measurement import record_name, take
        from pytest_llmserve.report.progress import live_load

        path = record_name(self.session.run_dir)
        try:
            with live_load(self.config, self.server, plan) as progress:
                run, validate = take(
                    self.server,
                    plan,
                    test=self.record.nodeid,
                    record_path=path,
                    alive=lambda: self.session.manager.alive(self.server),
                    ended=self._ended,
                    progress=progress,
                    allow_errors=allow_errors,
                    calibration=for_run(self.session.run_dir),
                    goodput=goodput,
                )
        except LoadError as error:
            reason = self._ended()
            stop_test(LoadError(f"{error} {reason}") if reason else error)
        self.record.measured.append(Measured(run, str(path), validate, allow_errors))
        return run

    def _ended(self) -> str | None:
        """Why the server is not there any more; None while it is. Its log is kept then."""
        reason = self.session.manager.exit_reason(self.server)
        if reason:
            self.session.kept = True
        return reason

    def present(self) -> Load:
        """The same load on a server that runs: one that had to make room on the GPU for another
        is started again."""
        return replace(self, server=_running(self.session, self.server.config, self.config))


def _check_goodput(bounds: Mapping[str, float] | None) -> None:
    """ConfigError for a bound that no request has."""
    known = ("ttft", "tpot", "e2e", "user_throughput")
    for name, bound in (bounds or {}).items():
        if name not in known:
            raise ConfigError(f"load(goodput=…): no bound {name!r}: use {', '.join(known)}")
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
            raise ConfigError(f"load(goodput={{{name!r}: {bound!r}}}): write a positive number")


def _middle(length: int | Lengths) -> int:
    """The number that stands for a length in tables where it is drawn from a distribution."""
    return length if isinstance(length, int) else (length.low + length.high) // 2


@pytest.fixture
def load(request: pytest.FixtureRequest, llm_server: Server) -> Load:
    """Callable that drives a load against `llm_server` and measures it (see `Load.__call__`)."""
    return make_load(request, llm_server)


def make_load(request: pytest.FixtureRequest, server: Server) -> Load:
    from pytest_llmserve.plugin import session_of

    record = test_record(request.node)
    try:
        runs = calibration_runs(request.node)
    except ConfigError as error:
        stop_test(error)
    if runs is not None and record.calibrated is None:
        record.calibrated = {}
    return Load(server, session_of(request.config), record, request.config, runs or 1)


@pytest.fixture
def llm_profile(request: pytest.FixtureRequest) -> Profile:
    """What is expected of this machine, by `--llmserve-profile` (see `profiles.Profile`)."""
    from pytest_llmserve.plugin import session_of
    from pytest_llmserve.resolve import profile_of

    try:
        found = profile_of(session_of(request.config).settings)
    except ConfigError as error:
        stop_test(error)
    if found is None:
        stop_test(
            ConfigError(
                "the fixture llm_profile has none to give: add --llmserve-profile NAME|FILE, or "
                "llmserve_profile to the ini file"
            )
        )
    return found


@dataclass(frozen=True)
class SLO:
    """`slo.check(run, at_least("output_throughput", 1000), …)`."""

    record: TestRecord

    def check(self, run: Run, *objectives: Objective) -> tuple[Verdict, ...]:
        """Judge a run by objectives. Fails the test if one is missed, ends it in error if the run
        is invalid; an inconclusive objective shows in the summary (and fails under
        `--llmserve-strict`)."""
        from pytest_llmserve.verdict.slo import judge

        if not objectives:
            stop_test(ConfigError("slo.check(run) without an objective proves nothing: add one"))
        bounds = {o.metric: o.bound for o in objectives if o.relation == "<="}
        try:
            verdicts = judge(self.record.bind(run, bounds), objectives)
        except ConfigError as error:
            stop_test(error)
        self.record.of(run).verdicts.extend(verdicts)
        self.record.stop_if_bad(verdicts)
        return verdicts


@pytest.fixture
def slo(request: pytest.FixtureRequest) -> SLO:
    """Judges runs by service level objectives."""
    return SLO(test_record(request.node))
