"""The emulator's benchmarks run by one command and print tables; their figures are not judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("command", "columns", "rows"),
    [
        (["schedule_error.py", "--users", "3", "--rate", "100", "--seconds", "0.3"], 8, 2),
        (["fidelity.py"], 9, 17),
    ],
)
def test_a_benchmark_prints_its_table(command: list[str], columns: int, rows: int) -> None:
    script, *flags = command
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "emulator" / script), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + rows
    assert {line.count("|") for line in table} == {columns + 1}
