"""What one test measured and how it was judged, and how that becomes the outcome pytest shows.

pass → passed. fail → failed. inconclusive → passed with its own letter and summary, failed under
strict. invalid → error: a test with an invalid run never passes, even if it never asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmserve.errors import ConfigError, LoadError, ServerError
from pytest_llmserve.run import Outcome, Run, Verdict, worst

if TYPE_CHECKING:
    from pytest_llmserve.config import Settings
    from pytest_llmserve.measurement import Validate
    from pytest_llmserve.verdict.baseline import Compared, Stored, Tracked

_RECORD: pytest.StashKey[TestRecord] = pytest.StashKey()


@dataclass
class Measured:
    """One run of a test with its verdicts and the file of its arrays.

    `validate` checks the run's validity again for bounds on latencies, which are gathered in
    `bounds` as verdicts ask for them. `label` tells the sides of a comparison apart ("A", "B").
    `compared` is what its baseline says, `stored` what became of it at the end of the test.
    """

    run: Run
    events: str
    validate: Validate
    allow_errors: float = 0.0
    label: str = ""
    bounds: dict[str, float] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    compared: Compared | None = None
    stored: Stored | None = None

    @property
    def verdict(self) -> Outcome | None:
        """The worst verdict; invalid for an invalid run; None if nothing was asked of it."""
        if not self.run.valid:
            return "invalid"
        return worst(v.verdict for v in self.verdicts)


@dataclass
class TestRecord:
    """All runs of one test, in order.

    `calibrated` are the metrics that a test which calibrates asks its baselines for; None in any
    other test. `passed` says at the end whether the test's call did: one that only
    `--llmserve-strict` failed did pass, or there would never be a baseline under it.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    nodeid: str
    measured: list[Measured] = field(default_factory=list)
    calibrated: dict[str, Tracked] | None = None
    passed: Callable[[], bool] = lambda: False

    def of(self, run: Run) -> Measured:
        """What is known of a run of this test."""
        for measured in self.measured:
            if measured.run.record is run.record:
                return measured
        raise ConfigError(f"{self.nodeid}: a run can only be judged in the test that measured it")

    def bind(self, run: Run, bounds: Mapping[str, float]) -> Run:
        """The run with its validity checked for these bounds too (the tightest of each counts)."""
        measured = self.of(run)
        for name, bound in bounds.items():
            measured.bounds[name] = min(bound, measured.bounds.get(name, bound))
        measured.run = replace(measured.run, validity=measured.validate(measured.bounds))
        return measured.run

    def stop_if_bad(self, verdicts: Iterable[Verdict]) -> None:
        """End the test if a verdict is fail or invalid, with all bad verdicts explained."""
        bad = [v for v in verdicts if v.verdict in ("fail", "invalid")]
        if bad:
            pytest.fail(explain(bad), pytrace=False)

    @property
    def verdict(self) -> Outcome | None:
        """The worst verdict of all runs."""
        return worst(m.verdict for m in self.measured if m.verdict)


def test_record(item: pytest.Item) -> TestRecord:
    """The record of a test, made on first use."""
    return item.stash.setdefault(_RECORD, TestRecord(item.nodeid))


def forget(item: pytest.Item) -> None:
    """Drop the record of an earlier attempt: a test that is run again starts anew."""
    if _RECORD in item.stash:
        del item.stash[_RECORD]


test_record.__test__ = False  # type: ignore[attr-defined]


def explain(verdicts: Iterable[Verdict]) -> str:
    """One line for each verdict: its objective and the reason; equal reasons once."""
    lines = dict.fromkeys(
        f"{v.verdict}: {v.reason}"
        if v.verdict == "invalid"
        else f"{v.verdict}: {v.objective}: {v.reason}"
        for v in verdicts
    )
    return "\n".join(lines)


def one_sentence(excinfo: pytest.ExceptionInfo[BaseException] | None) -> str | None:
    """The sentence of an error that says all there is to say, after the line of the user's that it
    is about; None for any other."""
    if excinfo is None or not isinstance(excinfo.value, (ConfigError, ServerError, LoadError)):
        return None
    ours = Path(__file__).parent
    lines = [
        f"{entry.path}:{entry.lineno + 1}: "
        for entry in excinfo.traceback
        if isinstance(entry.path, Path) and entry.path.is_file() and ours not in entry.path.parents
    ]
    return f"{lines[-1] if lines else ''}{excinfo.value}"


def decide(item: pytest.Item, report: pytest.TestReport, *, strict: bool) -> None:
    """Put the test's verdict on the report of its call, and make the outcome agree with it."""
    record = item.stash.get(_RECORD, None)
    if record is None or not record.measured:
        return
    verdict, only_strict = record.verdict, False
    verdicts = [v for m in record.measured for v in m.verdicts]
    if report.passed and verdict == "invalid":
        bad = [c for m in record.measured for c in m.run.validity if not c.ok]
        report.outcome = "failed"
        report.longrepr = "\n".join(f"invalid: {c.check}: {c.detail}" for c in bad)
    elif report.passed and verdict == "inconclusive" and strict:
        report.outcome = "failed"
        report.longrepr = explain(v for v in verdicts if v.verdict == "inconclusive")
        only_strict = True
    elif report.failed and verdict in ("pass", "inconclusive"):
        verdict = "fail"  # by an assertion of the test's own
    # Other plugins may still change the report (xfail does); it is final at the test's teardown.
    record.passed = lambda: (report.passed or only_strict) and not hasattr(report, "wasxfail")
    from pytest_llmserve.report.result import run_to_dict

    runs: list[dict[str, Any]] = [run_to_dict(m) for m in record.measured]
    report.llmserve = {  # type: ignore[attr-defined]
        "verdict": verdict,
        "runs": runs,
        "baselines": _baselines(record),
        "calibrations": _calibrations(record),
    }
    item.user_properties.extend(_properties(runs))
    report.user_properties = list(item.user_properties)


def store_baselines(item: pytest.Item, report: pytest.TestReport, settings: Settings) -> None:
    """At the teardown of a test: store its runs if it is asked for and the test passed.

    What became of them is put on the report of the teardown.
    """
    record = item.stash.get(_RECORD, None)
    compared = [m for m in record.measured if m.compared] if record else []
    if record is None or not compared or settings.update_baselines == "none":
        return
    from pytest_llmserve.verdict.baseline import Stored, store

    passed = record.passed() and report.passed
    for measured in compared:
        assert measured.compared is not None
        if not passed:
            why = "not stored: the test did not pass"
            measured.stored = Stored("kept", measured.compared.path, why)
            continue
        others = [v for v in measured.verdicts if v not in measured.compared.verdicts]
        try:
            measured.stored = store(
                measured.run,
                settings.baselines,
                (*measured.compared.found, *others),
                mode=settings.update_baselines,
                reason=settings.reason,
                options=settings.given,
            )
        except ConfigError as error:
            report.outcome = "failed"
            report.longrepr = str(error)
            measured.stored = Stored("kept", measured.compared.path, f"not stored: {error}")
    report.llmserve = {"baselines": _baselines(record)}  # type: ignore[attr-defined]


def _baselines(record: TestRecord) -> list[dict[str, Any]]:
    """What the summary says of comparisons with baselines."""
    found = []
    for measured in record.measured:
        compared, stored = measured.compared, measured.stored
        if compared is not None:
            found.append(
                {
                    "status": compared.after(stored) if stored else compared.status,
                    "path": str(compared.path),
                    "runs": compared.runs,
                    "saved": compared.saved,
                    "message": stored.message if stored else "",
                }
            )
    return found


def _calibrations(record: TestRecord) -> list[dict[str, str]]:
    """For each server and load of a test that calibrates: what it is, and the table."""
    if record.calibrated is None:
        return []
    from pytest_llmserve.verdict.baseline import TRACKED
    from pytest_llmserve.verdict.calibrate import calibrate_runs

    groups: dict[tuple[str, str], list[Run]] = {}
    for measured in record.measured:
        run = measured.run
        groups.setdefault((run.server.config.key, str(run.fingerprint["load"])), []).append(run)
    wanted = list(record.calibrated.values()) or list(TRACKED)
    return [
        {"load": load, "server": runs[0].server.config.name, "table": calibrate_runs(runs, wanted)}
        for (_, load), runs in groups.items()
    ]


def _properties(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """JUnit properties: every scalar metric, verdict and objective of every run."""
    found: list[tuple[str, str]] = []
    for number, run in enumerate(runs):
        prefix = "llmserve." if len(runs) == 1 else f"llmserve.{number}."
        found.append((prefix + "emulated", str(run["emulated"]).lower()))
        found.append((prefix + "verdict", str(run["verdict"])))
        for check in run["validity"]:
            if not check["ok"]:
                found.append((prefix + "invalid." + check["check"], check["detail"]))
        for verdict in run["verdicts"]:
            found.append((f"{prefix}{verdict['objective']}", verdict["verdict"]))
        for name, value in run["metrics"].items():
            if isinstance(value, dict):
                inner = {f"{name}.{k}": v for k, v in value.items()}
            else:
                inner = {name: value}
            found += [
                (prefix + k, repr(v))
                for k, v in inner.items()
                if isinstance(v, (int, float)) and not isinstance(v, bool)
            ]
    return found
