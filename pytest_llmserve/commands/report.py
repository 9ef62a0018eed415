"""`llmserve report RESULT.json… -o FILE.html`: the report of stored results, made later."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command; its `run` is in the namespace as `run`."""
    parser = subparsers.add_parser(
        "report",
        help="make the HTML or Markdown report of stored results",
        description="Make the report of results stored with --llmserve-json; of several files, "
        "comparable runs become a history and others stand side by side.",
    )
    parser.add_argument("results", nargs="+", metavar="RESULT.json", type=Path)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", type=Path,
        help="file to write: FILE.html, or FILE.md for Markdown",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", metavar="DIR", type=Path, help="folder of baselines to draw runs against"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the report; 0. Raises ConfigError for input that cannot be used."""
    documents = [read_result(path) for path in args.results]
    kind = args.output.suffix.lower()
    if kind in (".md", ".markdown"):
        from pytest_llmserve.report.markdown import write_markdown

        write_markdown(args.output, documents)
    elif kind in (".html", ".htm"):
        from pytest_llmserve.report.html import write_report

        if args.baselines is not None and not args.baselines.is_dir():
            raise ConfigError(f"--baselines {args.baselines}: there is no such folder; name one")
        bases = [path.parent for path in args.results]
        write_report(args.output, documents, base=bases, baselines=args.baselines)
    else:
        raise ConfigError(f"-o {args.output}: name a file that ends in .html or .md")
    print(args.output)
    return 0


def read_result(path: Path) -> dict[str, Any]:
    """The result document in a file, checked. Raises ConfigError in one sentence."""
    from importlib.resources import files

    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    mend = "name a file written by --llmserve-json"

    def refuse(constant: str) -> float:
        raise ValueError(f"it holds {constant}, which is no number")

    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise ConfigError(f"result file {path} cannot be read ({error.strerror}): {mend}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"result file {path} is not valid JSON ({str(error)[:100]}): {mend}"
        ) from None
    schema = json.loads(files("pytest_llmserve").joinpath("schemas/result.schema.json").read_text())
    problem = best_match(Draft202012Validator(schema).iter_errors(document))
    if problem is not None:
        where = ".".join(str(part) for part in problem.absolute_path)
        said = problem.message if len(problem.message) <= 120 else problem.message[:119] + "…"
        raise ConfigError(f"result file {path}: {f'at {where}, ' if where else ''}{said}: {mend}")
    assert isinstance(document, dict)
    return document
