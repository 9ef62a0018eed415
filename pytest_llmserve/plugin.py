"""pytest hooks, nothing else.

Loaded into every pytest run of its users: it imports little, and does nothing in a run in which
no test uses the fixtures or the `llmserve` marker.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmserve.comparing import ab, baseline
from pytest_llmserve.config import Settings, add_options, read_settings
from pytest_llmserve.errors import ConfigError, UnavailableError
from pytest_llmserve.fixtures import (
    MARKER,
    calibration_runs,
    check_capstone,
    llm_profile,
    llm_server,
    load,
    marker_arguments,
    slo,
)
from pytest_llmserve.outcome import decide, forget, one_sentence, store_baselines

if TYPE_CHECKING:
    from pytest_llmserve.load.calibration import Calibration
    from pytest_llmserve.session import Session

__all__ = ["ab", "baseline", "llm_profile", "llm_server", "load", "slo"]

_SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()
_SESSION: pytest.StashKey[Session] = pytest.StashKey()
_RUN_DIR: pytest.StashKey[Path] = pytest.StashKey()
_SERVERS: pytest.StashKey[list[str]] = pytest.StashKey()
_BAD_ITEM: pytest.StashKey[str] = pytest.StashKey()
_DESELECTED: pytest.StashKey[bool] = pytest.StashKey()

#: A test is ours if it uses one of these; what they are called nobody else's fixtures are.
_FIXTURES = frozenset(("llm_server", "llm_profile"))

_MARKERS = (
    "llmserve(server=…, engine=…, model=…, args={…} or variant=…): the server this test measures",
    "llmserve_calibrate(runs=10): measure each load so often, report its noise, judge no baseline",
    "inference_vs_serving: one user against many: what serving makes of the idle rest of the chip",
    "three_numbers: tokens/s, time to first token, latency against throughput",
    "continuous_batching: late requests join what runs; more users cost queueing only at the limit",
    "paged_attention: KV cache follows the tokens in flight; prefixes are shared; overload is safe",
    "speculative_decoding: the same answers in fewer steps, and when that pays",
    "tensorrt_llm: TensorRT-LLM against vLLM, alternated",
    "capstone: 30 users, 1,000 tokens/s, TTFT p95, latency under load",
    "robustness: no request, however odd, brings the server down",
    "soak: ten minutes under load without drift or leak",
    "nightly: what a nightly gate runs",
)


def session_of(config: pytest.Config) -> Session:
    """The session of this process, made when first asked for."""
    if _SESSION not in config.stash:
        from pytest_llmserve.session import Session

        owner = _worker_input(config).get("llmserve_owner", os.getpid())
        config.stash[_SESSION] = Session(config.stash[_SETTINGS], _run_dir(config), owner)
    return config.stash[_SESSION]


def _worker_input(config: pytest.Config) -> Mapping[str, Any]:
    """What the pytest-xdist controller told this worker; empty in any other process."""
    return getattr(config, "workerinput", {})


def _run_dir(config: pytest.Config) -> Path:
    if _RUN_DIR not in config.stash:
        from pytest_llmserve.session import new_run_dir

        told = _worker_input(config).get("llmserve_run_dir")
        config.stash[_RUN_DIR] = Path(told) if told else new_run_dir()
    return config.stash[_RUN_DIR]


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    for line in _MARKERS:
        config.addinivalue_line("markers", line)
    try:
        settings = config.stash[_SETTINGS] = read_settings(config)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from None
    if not _worker_input(config):
        config.pluginmanager.register(Results(settings), "llmserve-results")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist: tell a worker whose run it belongs to."""
    node.workerinput["llmserve_owner"] = os.getpid()
    node.workerinput["llmserve_run_dir"] = str(_run_dir(node.config))
    if not node.config.pluginmanager.has_plugin("llmserve-notes"):
        node.config.pluginmanager.register(Notes(node.config), "llmserve-notes")


def _is_ours(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARKER) is not None or not _FIXTURES.isdisjoint(
        getattr(item, "fixturenames", ())
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check every marker before anything starts, and put tests of one server together."""
    ours = [item for item in items if _is_ours(item)]
    if not ours:
        return
    from pytest_llmserve.report.terminal import server_line
    from pytest_llmserve.resolve import resolve

    settings = config.stash[_SETTINGS]
    order: dict[str, int] = {}
    keys: dict[pytest.Item, int] = {}
    lines: dict[str, None] = {}
    for item in ours:
        try:
            check_capstone(item)
            calibration_runs(item)
            where = f"{item.nodeid}: @pytest.mark.llmserve"
            found = resolve(settings, marker_arguments(item), where)
        except UnavailableError:
            keys[item] = len(order)  # its own fixture skips it
            continue
        except ConfigError as error:
            if not _worker_input(config):
                raise pytest.UsageError(str(error)) from None
            # A usage error would kill an xdist worker without a word: let the test say it.
            item.stash[_BAD_ITEM] = str(error)
            keys[item] = len(order)
            continue
        keys[item] = order.setdefault(found.config.key, len(order))
        lines[server_line(found, settings)] = None
    config.stash[_SERVERS] = list(lines)
    if _worker_input(config):
        from pytest_llmserve.report.progress import tell_servers

        tell_servers(_run_dir(config), list(lines))
    grouped = iter(sorted(ours, key=keys.__getitem__))
    items[:] = [next(grouped) if item in keys else item for item in items]


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if not items:  # pytest tells of it when --last-failed leaves nothing out
        return
    config = items[0].config
    if _worker_input(config):
        config.workeroutput["llmserve_deselected"] = True  # type: ignore[attr-defined]
    else:
        config.stash[_DESELECTED] = True


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """pytest-xdist: a worker has ended, and says what it left out."""
    if getattr(node, "workeroutput", {}).get("llmserve_deselected"):
        node.config.stash[_DESELECTED] = True


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call = getattr(report, "call", None)
    sentence = one_sentence(call.excinfo) if call and report.failed else None
    if sentence:
        report.longrepr = sentence
    return report


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    return config.stash.get(_SERVERS, [])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    forget(item)
    if _BAD_ITEM in item.stash:
        pytest.fail(item.stash[_BAD_ITEM], pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    settings = item.config.stash[_SETTINGS]
    sentence = one_sentence(call.excinfo)
    if sentence and report.failed:
        report.longrepr = sentence
    if call.when == "call":
        decide(item, report, strict=settings.strict)
    elif call.when == "teardown":
        store_baselines(item, report, settings)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(
    report: pytest.TestReport,
) -> tuple[str, str, tuple[str, Mapping[str, bool]]] | None:
    verdict = getattr(report, "llmserve", {}).get("verdict")
    if verdict == "inconclusive" and report.passed:
        return "inconclusive", "I", ("INCONCLUSIVE", {"yellow": True})
    if verdict == "invalid" and report.failed:
        return "error", "E", ("INVALID", {"red": True})
    return None


def pytest_unconfigure(config: pytest.Config) -> None:
    if _RUN_DIR in config.stash and not _worker_input(config):
        session_of(config).close()


class Notes:
    """Shows what pytest-xdist's workers are at; registered in the controller only."""

    def __init__(self, config: pytest.Config) -> None:
        from pytest_llmserve.report.progress import Board, note_on

        self._reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        self._board = Board(_run_dir(config), note_on(config))
        self._begun = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logstart(self) -> Generator[None, object, object]:
        if not self._begun and self._reporter:
            self._begun = True
            for line in self._board.begin():
                self._reporter.write_line(line)
        with self._board.paused():
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self) -> Generator[None, object, object]:
        with self._board.paused():
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logfinish(self) -> Generator[None, object, object]:
        with self._board.paused():
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self._board.close()


class Results:
    """Gathers what the tests measured, in the one process that reports; registered there only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tests: dict[str, dict[str, Any]] = {}
        self._skipped: set[str] = set()
        self._unused: tuple[Path, ...] = ()
        self._problems: list[str] = []
        self._client: Calibration | str | None = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skipped.add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._skipped.add(report.nodeid)
        found = getattr(report, "llmserve", None)
        if found is None:
            return
        if report.when == "call":
            self._tests[report.nodeid] = dict(found)
        else:  # the teardown of the same test says what was stored
            self._tests[report.nodeid].update(found)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self._tests:
            return
        from pytest_llmserve.load.calibration import of_run
        from pytest_llmserve.report.write import write_all

        self._client = of_run(_run_dir(session.config))
        self._problems = write_all(self._settings, self._tests, self._client)
        if self._problems and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        self._unused = self._find_unused(session.config, exitstatus)

    def _find_unused(self, config: pytest.Config, exitstatus: int) -> tuple[Path, ...]:
        from pytest_llmserve.selection import narrowed, selected

        used = {Path(b["path"]) for test in self._tests.values() for b in test["baselines"]}
        incomplete = exitstatus != pytest.ExitCode.OK or narrowed(config)
        if not used or incomplete or config.stash.get(_DESELECTED, False):
            return ()
        from pytest_llmserve.verdict.baseline import unused

        return unused(used, selected(config, self._skipped))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._tests:
            from pytest_llmserve.report.terminal import write_summary

            write_summary(terminalreporter, self._tests, self._settings, self._unused, self._client)
        for problem in self._problems:
            terminalreporter.write_line(f"llmserve: {problem}", red=True)
