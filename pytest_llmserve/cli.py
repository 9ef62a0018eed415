"""The `llmserve` command. Each sub-command is two small functions: its arguments, and its work.

Exit status: 0 all right, 1 a regression was found, 2 something the user gave cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_llmserve.errors import ConfigError, LoadError, ServerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process); the exit status."""
    parser = argparse.ArgumentParser(prog="llmserve", description="Language models under load.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    options = parser.parse_args(arguments)
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


if __name__ == "__main__":
    raise SystemExit(main())
