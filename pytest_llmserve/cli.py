"""The `llmserve` command. Each sub-command is two small functions: its arguments, and its work.

Exit status: 0 all right, 1 a regression or a problem was found, 2 something the user gave cannot
be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_llmserve.commands import doctor, plan, report, serve
from pytest_llmserve.errors import ConfigError, LoadError, ServerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process); the exit status."""
    parser = argparse.ArgumentParser(prog="llmserve", description="Language models under load.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_calibrate(commands)
    plan.add_parser(commands)
    serve.add_parser(commands)
    doctor.add_parser(commands)
    report.add_parser(commands)
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        status: int = options.run(options)
    except (ConfigError, ServerError, LoadError) as error:
        print(f"llmserve: {error}", file=sys.stderr)
        return 2
    return status


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="has B become worse than A?",
        description="Compare result files, baselines, or results of vllm bench serve, guidellm and "
        "aiperf (or folders of them). Exit status 1 if B is a regression from A.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="what it was: 5 runs or more")
    parser.add_argument("b", type=Path, metavar="B", help="what it is now")
    parser.add_argument(
        "--format",
        choices=("text", "markdown", "json", "html"),
        default="text",
        help="of the table",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="compare these (may be repeated)",
    )
    parser.add_argument(
        "--across",
        action="append",
        default=[],
        metavar="FIELD",
        help="fingerprint field that is meant to differ, such as engine (may be repeated)",
    )
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from pytest_llmserve.verdict.compare import FORMATS, compare_files

    compared = compare_files(options.a, options.b, metrics=options.metric, across=options.across)
    sys.stdout.write(FORMATS[options.format](compared))
    return 1 if compared.regressed else 0


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="how noisy is a test, and what would its gate see?",
        description="Repeat a test on an unchanged server, or read runs of it, and report the "
        "run-to-run noise of each metric, the false alarms and power of the present floors, and "
        "proposals. What follows -- goes to pytest.",
    )
    parser.add_argument("test", nargs="*", metavar="TEST", help="what pytest shall run")
    parser.add_argument("-n", "--runs", type=int, default=10, help="how often (default: 10)")
    parser.add_argument(
        "--results", type=Path, metavar="PATH", help="read runs from here instead of making them"
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="of these (may be repeated)"
    )
    parser.add_argument(
        "--client",
        action="store_true",
        help="the load client's own error on this machine instead, measured now",
    )
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    if options.client:
        from pytest_llmserve.load import calibration

        print(calibration.as_text(calibration.calibrate()), end="")
        return 0
    import tempfile

    from pytest_llmserve.verdict.baseline import TRACKED, tracked
    from pytest_llmserve.verdict.calibrate import as_text, calibrate
    from pytest_llmserve.verdict.compare import load_side

    if bool(options.test) == bool(options.results):
        raise ConfigError("llmserve calibrate: give tests to run, or --results PATH, and not both")
    with tempfile.TemporaryDirectory(prefix="llmserve-") as folder:
        if options.test:
            _repeat(options.test, options.runs, Path(folder))
        side = load_side(options.results or Path(folder))
    if not side.groups:
        raise ConfigError(f"there is no valid run to calibrate by {'; '.join(side.notes)}".strip())
    wanted = [tracked(metric) for metric in options.metric] or list(TRACKED)
    for name, group in side.groups.items():
        emulated = any(facts.get("emulated") for facts in group.fingerprints)
        print(f"{'EMULATED: ' if emulated else ''}{name}\n")
        found = [calibrate(group.values[t.metric], t) for t in wanted if t.metric in group.values]
        print(as_text(found) if found else "none of the metrics was measured\n")
    for note in side.notes:
        print(note)
    return 0


def _repeat(tests: Sequence[str], runs: int, folder: Path) -> None:
    """Run pytest `runs` times, each leaving a result file in `folder`."""
    import subprocess

    if runs < 3:
        raise ConfigError(f"--runs {runs} says too little about noise: 3 or more, best 10")
    for number in range(runs):
        path = folder / f"{number:03d}.json"
        # Baselines are out of it: a calibration neither judges nor stores.
        own = [f"--llmserve-json={path}", "--llmserve-update-baselines=none"]
        print(f"run {number + 1} of {runs}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests, *own], capture_output=True, text=True
        )
        if done.returncode not in (0, 1) or not path.exists():
            lines = [
                line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
            ]
            last = lines or (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ConfigError(
                f"pytest {' '.join(tests)} measured nothing (exit status {done.returncode}): "
                f"{' '.join(last)}"
            )


if __name__ == "__main__":
    raise SystemExit(main())
