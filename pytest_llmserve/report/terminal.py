"""The terminal's part: one line on the server before the tests, one section of verdicts after."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_llmserve.report.units import show, show_margin, show_time

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from pytest_llmserve.config import Settings
    from pytest_llmserve.load.calibration import Calibration
    from pytest_llmserve.resolve import Resolved

Row = Sequence[str]
_COLOURS: Mapping[str | None, Mapping[str, bool]] = {
    "pass": {"green": True},
    "fail": {"red": True},
    "inconclusive": {"yellow": True},
    "invalid": {"red": True, "bold": True},
}


def server_line(found: Resolved, settings: Settings) -> str:
    """Engine, model, hardware and baseline folder of one server, in one line."""
    from pytest_llmserve.verdict.hardware import describe

    config = found.config
    where = config.runner.image if hasattr(config.runner, "image") else config.endpoint
    if config.engine == "emulator" and config.emulation:
        engine = "EMULATED engine"
        shape = config.emulation
        model = f"{config.model} {shape.weights}, {shape.kv} KV"
        hardware = f"emulated {shape.hardware}"
    else:
        engine = f"{config.engine} {where}" if where else config.engine
        model = config.model or "the model it serves"
        hardware = str(describe()["slug"])
    baselines = settings.baselines
    if baselines.is_relative_to(settings.rootdir):
        baselines = baselines.relative_to(settings.rootdir)
    line = f"llmserve: {config.name}: {engine}, {model}, {hardware}, baselines {baselines}"
    return f"{line}. {found.notice}" if found.notice else line


def write_summary(
    reporter: pytest.TerminalReporter,
    tests: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    unused: Sequence[Path] = (),
    client: Calibration | str | None = None,
) -> None:
    """The section of verdicts: for each test its runs, objectives, margins and reasons; then counts
    and what to do about them. `unused` are baseline files that no test asks for, `client` is the
    client's own error on this machine."""
    reporter.section("llmserve", sep="=")
    runs = [run for test in tests.values() for run in test["runs"]]
    if any(run["emulated"] for run in runs):
        which = "Every number" if all(run["emulated"] for run in runs) else "Each run so marked"
        reporter.write_line(
            f"EMULATED: {which} below comes from the emulated engine, not from real hardware.",
            yellow=True,
            bold=True,
        )
    for nodeid, test in tests.items():
        reporter.write_line("")
        reporter.write_line(nodeid, bold=True)
        if len(test["runs"]) > 1:
            _write_curve(reporter, test["runs"])
        for run in test["runs"]:
            _write_run(reporter, run, alone=len(test["runs"]) == 1)
        for calibration in test["calibrations"]:
            _write_calibration(reporter, calibration)
    _write_calls(reporter, tests, settings, unused)
    if client is not None:
        from pytest_llmserve.load.calibration import in_words

        reporter.write_line(in_words(client))


def _write_run(reporter: pytest.TerminalReporter, run: Mapping[str, Any], *, alone: bool) -> None:
    bad = [check for check in run["validity"] if not check["ok"]]
    if alone or bad or run["verdicts"]:
        reporter.write_line("  " + run_line(run))
    for check in bad:
        _write_reason(reporter, f"invalid: {check['check']}: {check['detail']}", "invalid")
    verdicts = [v for v in run["verdicts"] if not (bad and v["verdict"] == "invalid")]
    rows = [_verdict_row(verdict) for verdict in verdicts]
    if rows:
        lines = align([("objective", "measured", "bound", "margin", "verdict"), *rows], "<>>><")
        reporter.write_line("    " + lines[0])
        for line, verdict in zip(lines[1:], verdicts, strict=True):
            reporter.write_line("    " + line, **_COLOURS[verdict["verdict"]])
    # Several metrics often have one reason, such as a baseline that is not there yet.
    reasons: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict["verdict"] != "pass":
            shared = reasons.setdefault((verdict["reason"], verdict["verdict"]), [])
            shared.append(verdict["objective"])
    for (reason, outcome), objectives in reasons.items():
        _write_reason(reporter, f"{', '.join(objectives)}: {reason}", outcome)


def run_line(run: Mapping[str, Any]) -> str:
    """What was run, in one line: load, lengths, window, requests, server, client's own delay."""
    load, metrics = run["load"], run["metrics"]
    users = load.get("users")
    who = f"{users} user{'s' * (users > 1)}" if users else f"{load['rate']:g} requests/s"
    work = load["workload"]
    lag = metrics["client_lag"]["p99"]
    parts = [
        f"{who}, {work['prompt_tokens']} tokens in, {work['output_tokens']} out",
        f"window {show_time(metrics['window']['duration'])}",
        f"{metrics['requests']} requests",
        f"{run['server']} ({run['engine']}{', EMULATED' if run['emulated'] else ''})",
        f"send delay p99 {show('send_delay', metrics['send_delay']['p99'])}",
    ]
    if lag is not None:
        parts.append(f"client lag p99 {show('client_lag', lag)}")
    return " · ".join(parts)


def _verdict_row(verdict: Mapping[str, Any]) -> Row:
    objective, bound = verdict["objective"], verdict["bound"]
    metric, relation = split_objective(objective)
    # A comparison's bound is the worst value that its rule would have let pass.
    side = relation or (_good_side(metric) if bound is not None else "")
    return (
        metric if relation else objective,
        show(metric, verdict["measured"]),
        f"{ {'>=': '≥', '<=': '≤'}.get(side, '') } {show(metric, bound)}".strip(),
        show_margin(side, verdict["measured"], bound) if side else "–",
        verdict["verdict"],
    )


def _good_side(metric: str) -> str:
    from pytest_llmserve.verdict.baseline import tracked

    return ">=" if tracked(metric).better == "higher" else "<="


def split_objective(objective: str) -> tuple[str, str]:
    """The metric and the relation ("" if it has none) of an objective's text. The metric of a
    ratio is "B/A …", which has no unit."""
    words = objective.split(" ")
    relation = words[-2] if len(words) >= 3 and words[-2] in (">=", "<=") else ""
    words = words[:-2] if relation else words
    return " ".join(words) if words[0] == "B/A" else words[-1], relation


def _write_curve(reporter: pytest.TerminalReporter, runs: Sequence[Mapping[str, Any]]) -> None:
    marked = False
    rows: list[Row] = []
    for run in runs:
        load, metrics = run["load"], run["metrics"]

        def p95(name: str, metrics: Mapping[str, Any] = metrics) -> str:
            nonlocal marked
            certified = "p95" in metrics[name].get("certified", ())
            marked = marked or not certified
            return show(name, metrics[name]["p95"]) + ("" if certified else "~")

        rows.append(
            (
                run.get("label", ""),
                f"{load['users']}" if load["kind"] == "closed" else f"{load['rate']:g}/s",
                show("output_throughput", metrics["output_throughput"]),
                show("user_throughput", metrics["user_throughput"]["p50"]),
                show("ttft", metrics["ttft"]["p50"]),
                p95("ttft"),
                show("tpot", metrics["tpot"]["p50"]),
                p95("tpot"),
                show("e2e", metrics["e2e"]["p50"]),
                p95("e2e"),
                str(metrics["requests"]),
                run["verdict"] or "",
            )
        )
    head = (
        "",
        "users",
        "aggregate",
        "a user",
        "TTFT p50",
        "p95",
        "TPOT p50",
        "p95",
        "e2e p50",
        "p95",
    )
    several = len({run["fingerprint"]["load"] for run in runs}) > 1
    title = "latency under load" if several else "runs of one load"
    reporter.write_line(f"  {title}" + (" (EMULATED)" if runs[0]["emulated"] else ""))
    first = 0 if any(row[0] for row in rows) else 1  # the label's column, where there are any
    lines = [(*head, "requests", ""), *rows]
    for line in align([row[first:] for row in lines], "<>>>>>>>>>><"[first:]):
        reporter.write_line("    " + line)
    if marked:
        reporter.write_line("    ~ too few requests to certify this percentile (p95 needs 130)")


def align(rows: Sequence[Row], sides: str) -> list[str]:
    """Rows as lines with columns of equal width, each flushed to the side in `sides` (< or >)."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _write_reason(reporter: pytest.TerminalReporter, text: str, verdict: str) -> None:
    import shutil

    width = max(shutil.get_terminal_size().columns, 60)
    lines = textwrap.wrap(
        text,
        width - 1,
        initial_indent="      ",
        subsequent_indent="        ",
        break_long_words=False,  # commands and paths can be copied whole
        break_on_hyphens=False,
    )
    for line in lines:
        reporter.write_line(line, **_COLOURS[verdict])


def _write_calibration(reporter: pytest.TerminalReporter, calibration: Mapping[str, str]) -> None:
    reporter.write_line(f"  calibration of {calibration['load']} on {calibration['server']}")
    for line in calibration["table"].splitlines():
        reporter.write_line("    " + line)


def _write_calls(
    reporter: pytest.TerminalReporter,
    tests: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    unused: Sequence[Path],
) -> None:
    counts = dict.fromkeys(("pass", "fail", "inconclusive", "invalid"), 0)
    for test in tests.values():
        if test["verdict"]:
            counts[test["verdict"]] += 1
    reporter.write_line("")
    reporter.write_line(f"verdicts: {_counted(counts) or 'none asked for'}")
    _write_baselines(reporter, tests, settings, unused)
    for path in (settings.json, settings.benchmark_json, settings.report, settings.markdown):
        if path and path.exists():
            reporter.write_line(f"results: {path}")


def _write_baselines(
    reporter: pytest.TerminalReporter,
    tests: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    unused: Sequence[Path],
) -> None:
    """How many comparisons came out how, and the command for those that need one."""
    compared = [(nodeid, b) for nodeid, test in tests.items() for b in test["baselines"]]
    if not compared:
        return
    counts = dict.fromkeys(("compared", "new", "missing", "mismatched", "invalid"), 0)
    for _, baseline in compared:
        counts[baseline["status"]] += 1
    reporter.write_line(f"baselines: {_counted(counts | {'unused': len(unused)})}")
    from pytest_llmserve.verdict.baseline import command

    for status in ("missing", "mismatched"):
        which = dict.fromkeys(nodeid for nodeid, b in compared if b["status"] == status)
        if which:
            reporter.write_line(f"  {status}: {command(which, 'new', settings.given)}")
    if unused:
        reporter.write_line(f"  unused: rm {shlex.join(map(str, unused))}")
    if settings.repeats != 1:
        made, saved = (sum(b[key] for _, b in compared) for key in ("runs", "saved"))
        said = f", {saved} saved" if settings.repeats == "auto" else ""
        reporter.write_line(f"  repeats {settings.repeats}: {made} runs were needed{said}")
    for nodeid, baseline in compared:
        if baseline["message"]:
            reporter.write_line(f"  {nodeid}: {baseline['message']}")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
