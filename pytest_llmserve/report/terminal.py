"""The terminal's part: one line on the server before the tests, one section of verdicts after.

The section follows pytest's verbosity: `-q` gives a line a test and what is wrong with it, `-v`
adds all validity checks and what the server and its GPUs said.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_llmserve.report.console import Console, align, fold
from pytest_llmserve.report.digest import (
    ORDER,
    Json,
    amount,
    certified,
    label_of,
    objectives,
    server_figures,
    show_load,
    show_run,
    value_of,
)
from pytest_llmserve.report.text import clean
from pytest_llmserve.report.units import several, show, show_time

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from pytest_llmserve.config import Settings
    from pytest_llmserve.load.calibration import Calibration
    from pytest_llmserve.resolve import Resolved

_COLOURS: Mapping[str | None, Mapping[str, bool]] = {
    "pass": {"green": True},
    "fail": {"red": True},
    "inconclusive": {"yellow": True},
    "invalid": {"red": True, "bold": True},
    None: {},
}
#: Columns and rows of a plot of latency under load, and columns between two of them.
_PLOT, _PLOT_ROWS, _BETWEEN = 46, 6, 3
#: What the curve's table says of each load, after its name.
_CURVE = (
    ("aggregate", "output_throughput"), ("a user", "user_throughput.p50"),
    ("TTFT p50", "ttft.p50"), ("TTFT p95", "ttft.p95"),
    ("TPOT p50", "tpot.p50"), ("TPOT p95", "tpot.p95"),
    ("e2e p50", "e2e.p50"), ("e2e p95", "e2e.p95"),
)  # fmt: skip


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
    console = Console.of(reporter)
    verbosity = reporter.config.get_verbosity()
    reporter.section("llmserve", sep="=")
    runs = [run for test in tests.values() for run in test["runs"]]
    if any(run["emulated"] for run in runs):
        which = "Every number" if all(run["emulated"] for run in runs) else "Each run so marked"
        said = f"EMULATED: {which} below comes from the emulated engine, not from real hardware."
        console.wrapped(said, yellow=True, bold=True)
    for nodeid, test in tests.items():
        if verbosity < 0:
            _write_briefly(console, nodeid, test)
        else:
            _write_test(console, nodeid, test, checks=verbosity > 0)
    _write_calls(console, tests, settings, unused, files=verbosity >= 0)
    if client is not None and verbosity >= 0:
        from pytest_llmserve.load.calibration import in_words

        console.wrapped(in_words(client))


def _write_briefly(console: Console, nodeid: str, test: Mapping[str, Any]) -> None:
    """One line on a test that passed; its reasons too if it did not."""
    run = max(test["runs"], key=amount)
    figures = [
        f"{test['verdict'] or 'measured'} {clean(nodeid)}",
        show_run(run),
        show("output_throughput", value_of(run, "output_throughput")),
        f"TTFT p95 {_certain(run, 'ttft.p95')}",
    ]
    console.facts(figures + ["EMULATED"] * run["emulated"], hang=4, **_COLOURS[test["verdict"]])
    for run in test["runs"]:
        _write_reasons(console, run, indent=4)


def _write_test(console: Console, nodeid: str, test: Mapping[str, Any], *, checks: bool) -> None:
    console.line()
    console.line(nodeid, bold=True)
    runs = test["runs"]
    if len(runs) > 1:
        _write_curve(console, runs)
    for run in runs:
        bad = any(not check["ok"] for check in run["validity"])
        if len(runs) == 1 or bad or run["verdicts"] or checks:
            console.facts(run_facts(run), indent=2)
        _write_objectives(console, run)
        _write_reasons(console, run, indent=6)
        if checks:
            _write_checks(console, run)
    for calibration in test["calibrations"]:
        console.wrapped(
            f"calibration of {calibration['load']} on {calibration['server']}", indent=2
        )
        for line in calibration["table"].splitlines():
            console.line("    " + line)


def run_facts(run: Json) -> list[str]:
    """What was run, in short: load, lengths, window, requests, server, client's own delay."""
    metrics, work = run["metrics"], run["load"]["workload"]
    lag = metrics["client_lag"]["p99"]
    facts = [
        f"{show_run(run)}, {work['prompt_tokens']} tokens in, {work['output_tokens']} out",
        f"window {show_time(metrics['window']['duration'])}",
        several(metrics["requests"], "request"),
        clean(f"{run['server']} ({run['engine']}{', EMULATED' if run['emulated'] else ''})"),
        f"send delay p99 {show('send_delay', metrics['send_delay']['p99'])}",
    ]
    return facts if lag is None else [*facts, f"client lag p99 {show('client_lag', lag)}"]


def _write_objectives(console: Console, run: Json) -> None:
    """The objectives as a table with margins, or, where that is too wide, in two lines each."""
    found = [o for o in objectives(run) if not (o.verdict == "invalid" and _bad(run))]
    if not found:
        return
    head = ("objective", "measured", "bound", "margin", "", "verdict")
    rows = console.rows(
        [
            (o.name, o.measured, o.bound, o.margin, console.margin_bar(o.margin_share), o.verdict)
            for o in found
        ]
    )
    for columns in ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 5)):
        picked = [[row[i] for i in columns] for row in (head, *rows)]
        lines = align(picked, "".join("<>>><<"[i] for i in columns))
        if max(map(len, lines)) + 4 <= console.width:
            console.line("    " + lines[0])
            for line, o in zip(lines[1:], found, strict=True):
                console.line("    " + line, **_COLOURS[o.verdict])
            return
    for o in found:
        console.wrapped(f"{o.name}: {o.verdict}", indent=4, **_COLOURS[o.verdict])
        console.facts([o.measured, o.bound, o.margin], indent=6, hang=0, **_COLOURS[o.verdict])


def _write_reasons(console: Console, run: Json, indent: int) -> None:
    """Why a run is no measurement and why its objectives are not met, equal reasons once."""
    for check in run["validity"]:
        if not check["ok"]:
            said = f"invalid: {check['check']}: {check['detail']}"
            console.wrapped(said, indent=indent, **_COLOURS["invalid"])
    # Several metrics often have one reason, such as a baseline that is not there yet.
    reasons: dict[tuple[str, str], list[str]] = {}
    for verdict in run["verdicts"]:
        if verdict["verdict"] != "pass" and not (verdict["verdict"] == "invalid" and _bad(run)):
            shared = reasons.setdefault((verdict["reason"], verdict["verdict"]), [])
            shared.append(verdict["objective"])
    for (reason, outcome), which in reasons.items():
        console.wrapped(f"{', '.join(which)}: {reason}", indent=indent, **_COLOURS[outcome])


def _bad(run: Json) -> bool:
    return any(not check["ok"] for check in run["validity"])


def _write_checks(console: Console, run: Json) -> None:
    """All validity checks of a run, and what the server and its GPUs said."""
    for check in run["validity"]:
        if check["ok"]:
            console.wrapped(f"ok: {check['check']}: {check['detail']}", indent=6)
    figures = [f"{name} {text}" for name, _, text in server_figures(run)]
    if figures:
        console.facts(figures, indent=6)


def _certain(run: Json, metric: str) -> str:
    """A percentile, marked if too few requests stand behind it."""
    return show(metric, value_of(run, metric)) + ("" if certified(run, metric) else "~")


def _write_curve(console: Console, runs: Sequence[Json]) -> None:
    """Several runs as a table, and latency against the amount of load as plots."""
    head = ["", "load", "", "requests", *(name for name, _ in _CURVE)]
    rows = [
        [label_of(run), show_load(run), run["verdict"] or "", f"{run['metrics']['requests']:,}",
         *(_certain(run, metric) for _, metric in _CURVE)]
        for run in runs
    ]  # fmt: skip
    amounts = {amount(run) for run in runs}
    title = "latency under load" if len(amounts) > 1 else "runs of one load"
    console.line(f"  {title}" + (" (EMULATED)" if any(run["emulated"] for run in runs) else ""))
    # Not every test compares sides or asks something of each load.
    kept = [i for i in range(len(head)) if head[i] or any(row[i] for row in rows)]
    cells = console.rows([[row[i] for i in kept] for row in (head, *rows)])
    sides = "".join(("<<<" + ">" * (len(_CURVE) + 1))[i] for i in kept)
    for block in fold(cells, sides, console.width - 5, keys=kept.index(1) + 1):
        for line in block:
            console.line("    " + line)
    if any("~" in cell for row in cells for cell in row):
        console.wrapped("~ too few requests to certify this percentile (p95 needs 130)", indent=4)
    if len(amounts) > 1 and len({run["load"]["kind"] for run in runs}) == 1:
        _write_plots(console, runs)


def _write_plots(console: Console, runs: Sequence[Json]) -> None:
    """TTFT and TPOT against the amount of load, side by side where there is room."""
    from pytest_llmserve.report.plot import plot

    emulated = ", EMULATED" if any(run["emulated"] for run in runs) else ""
    axis = "users" if runs[0]["load"]["kind"] == "closed" else "requests/s"
    room = console.width - 5
    width = min(_PLOT, (room - _BETWEEN) // 2) if room >= 72 else min(_PLOT, room)
    pictures: list[list[str]] = []
    for name in ("ttft", "tpot"):
        lines: dict[str, list[tuple[float, float]]] = {}
        for statistic in ("p50", "p95"):
            for run in runs:
                value = value_of(run, f"{name}.{statistic}")
                if value is not None:
                    which = f"{label_of(run)} {statistic}".strip()
                    lines.setdefault(which, []).append((amount(run), value))
        if lines:
            shown = partial(_tick, console, name)
            picture = plot(
                lines, width=width, height=_PLOT_ROWS, show=shown, drawing=console.drawing
            )
            pictures.append([f"{name.upper()} against {axis}{emulated}", *picture])
    if room >= 72 and len(pictures) == 2:
        left, right = pictures
        both = zip(left, right, strict=True)
        pictures = [[f"{a:{width + _BETWEEN}}{b}".rstrip() for a, b in both]]
    for picture in pictures:
        for line in picture:
            console.line("    " + line)


def _tick(console: Console, name: str, value: float) -> str:
    return console.fitting(show(name, value)) if value else "0"


def _write_calls(
    console: Console,
    tests: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    unused: Sequence[Path],
    *,
    files: bool,
) -> None:
    counts = dict.fromkeys(reversed([v for v in ORDER if v]), 0)
    for test in tests.values():
        if test["verdict"]:
            counts[test["verdict"]] += 1
    console.line()
    console.line(f"verdicts: {_counted(counts) or 'none asked for'}")
    _write_baselines(console, tests, settings, unused)
    for path in (settings.json, settings.benchmark_json, settings.report, settings.markdown):
        if files and path and path.exists():
            console.line(f"results: {path}")


def _write_baselines(
    console: Console,
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
    console.line(f"baselines: {_counted(counts | {'unused': len(unused)})}")
    from pytest_llmserve.verdict.baseline import command

    for status in ("missing", "mismatched"):
        which = dict.fromkeys(nodeid for nodeid, b in compared if b["status"] == status)
        if which:
            console.line(f"  {status}: {command(which, 'new', settings.given)}")
    if unused:
        console.line(f"  unused: rm {shlex.join(map(str, unused))}")
    if settings.repeats != 1:
        made, saved = (sum(b[key] for _, b in compared) for key in ("runs", "saved"))
        be = "was" if made == 1 else "were"
        said = f", {saved} saved" if settings.repeats == "auto" else ""
        console.line(f"  repeats {settings.repeats}: {several(made, 'run')} {be} needed{said}")
    for nodeid, baseline in compared:
        if baseline["message"]:
            console.line(f"  {nodeid}: {baseline['message']}")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
