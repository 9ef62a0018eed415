"""The result file (`--llmserve-json`): one document a pytest run, one entry a measured load.

Valid against `schemas/result.schema.json`; the per-request and per-event arrays of each load lie
beside it as `.npz` files (`load/record.py` says what is in them).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.metrics.definitions import METRICS_VERSION
from pytest_llmserve.report.files import write_whole

if TYPE_CHECKING:
    from pytest_llmserve.load.calibration import Calibration
    from pytest_llmserve.outcome import Measured

SCHEMA = "llmserve-result/1"


def run_to_dict(measured: Measured) -> dict[str, Any]:
    """One run as plain data: what reports, the result file and pytest-xdist carry."""
    from pytest_llmserve.measurement import plan_facts

    run = measured.run
    return {
        "test": run.test,
        "label": measured.label,
        "server": run.server.config.name,
        "engine": run.server.engine,
        "engine_version": run.server.version,
        "model": run.server.model,
        "emulated": run.server.emulated,
        "load": dict(plan_facts(run.plan)),
        "metrics": dict(run.metrics),
        "server_metrics": dict(run.server_metrics),
        "telemetry": dict(run.telemetry),
        "roofline": dict(run.roofline),
        "validity": [asdict(check) for check in run.validity],
        "verdicts": [asdict(verdict) for verdict in measured.verdicts],
        "verdict": measured.verdict,
        "fingerprint": dict(run.fingerprint),
        "events": measured.events,
    }


def document(
    tests: Mapping[str, Mapping[str, Any]],
    client: Calibration | str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """The result file's content for tests that measured something, by the `command` typed.

    `fingerprint` at the top holds the fields in which all runs agree, `calibration` the client's
    own error on this machine (null if it could not be measured: `client` is then the reason).
    """
    runs = [run for test in tests.values() for run in test["runs"]]
    prints = [run["fingerprint"] for run in runs]
    common = {k: v for k, v in prints[0].items() if all(p.get(k) == v for p in prints)}
    return {
        "schema": SCHEMA,
        "metrics_version": METRICS_VERSION,
        "emulated": any(run["emulated"] for run in runs),
        "command": command,
        "fingerprint": common,
        "calibration": None if client is None or isinstance(client, str) else client.as_dict(),
        "runs": runs,
    }


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document whole or not at all, its arrays into `<name>.events/` beside it.

    The runs' `events` then name those copies, relative to the file.
    """
    folder = path.with_name(path.name.removesuffix(".json") + ".events")
    for number, run in enumerate(content["runs"]):
        source = Path(run["events"])
        if source.exists():
            folder.mkdir(exist_ok=True)
            target = folder / f"{number:04d}.npz"
            shutil.copyfile(source, target)
            run["events"] = target.relative_to(path.parent).as_posix()
        else:
            run["events"] = None
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
