"""`llmserve doctor`: is all here that serving and loading need, and what to do where it is not."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmserve.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_llmserve.launch.preflight import Finding
    from pytest_llmserve.servers import ServerConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
    Groups = Mapping[str, Sequence[Finding]]

_WORDS = {"ok": "ok", "warn": "warning", "fail": "problem"}


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command; its work is in the namespace as `run`."""
    parser = subparsers.add_parser(
        "doctor",
        help="is all here that a server needs?",
        description="Look at this machine, and with --server at what that server config needs: "
        "program or container, model, GPUs, driver and CUDA, memory, disk, port. Nothing is "
        "started or changed. Exit status 1 if there is a problem; a warning is none.",
    )
    parser.add_argument("--server", metavar="NAME|FILE", help="a server config")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the findings; 1 if there is a problem among them.

    Raises ConfigError if there is no such server config.
    """
    from pytest_llmserve.launch.machine import machine

    groups: dict[str, Sequence[Finding]] = {"this machine": machine()}
    imitated = False
    if options.server:
        config = _config(options.server)
        groups[f"server {config.name} ({config.source})"] = _of_server(config)
        imitated = config.emulation is not None and config.engine != "emulator"
    problems = sum(f.level == "fail" for findings in groups.values() for f in findings)
    if options.format == "json":
        sys.stdout.write(_json(groups, problems))
    else:
        sys.stdout.write(_text(groups, problems, imitated=imitated))
    return 1 if problems else 0


def _config(name: str) -> ServerConfig:
    from pytest_llmserve.engines import normalise_model
    from pytest_llmserve.server_files import find_server_config

    config = find_server_config(name, (Path("suites/servers"), Path("servers")))
    model, notice = normalise_model(config.model)
    if notice:
        print(f"llmserve doctor: {notice}", file=sys.stderr)
    return replace(config, model=model)


def _of_server(config: ServerConfig) -> Sequence[Finding]:
    from pytest_llmserve.engines import get_engine
    from pytest_llmserve.launch.attach import attach
    from pytest_llmserve.launch.preflight import Finding, examine

    if config.engine != "attach":
        return examine(config, get_engine(config.engine))
    try:
        found = attach(config)
    except ServerError as error:
        return [Finding("fail", f"endpoint: {error}".rstrip("."))]
    named = f"{'EMULATED ' * found.emulated}{found.engine} {found.version}".rstrip()
    return [Finding("ok", f"endpoint: {found.endpoint} serves {found.model} ({named})")]


def _text(groups: Groups, problems: int, *, imitated: bool) -> str:
    lines = []
    for title, findings in groups.items():
        lines.append(title)
        for finding in findings:
            lines.append(f"  {_WORDS[finding.level]:<8} {finding.what}")
            if finding.mend:
                lines.append(f"{'':>11}→ {finding.mend}")
    counted = f"{problems} problem{'s' * (problems != 1)}" if problems else "no problem"
    lines.append(counted)
    if problems and imitated:
        lines.append(
            "Where its engine or GPU is missing, tests run the emulated engine in its place and "
            "say EMULATED (--llmserve-engine auto)."
        )
    return "\n".join(lines) + "\n"


def _json(groups: Groups, problems: int) -> str:
    found = [
        {"about": about, **asdict(finding)}
        for about, findings in groups.items()
        for finding in findings
    ]
    content = {"schema": "llmserve-doctor/1", "problems": problems, "findings": found}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
