"""The emulator's benchmarks run by one command and print tables; their figures are not judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llmserve.metrics.roofline import ModelShape

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("command", "columns", "rows"),
    [
        (["schedule_error.py", "--users", "3", "--rate", "100", "--seconds", "0.3"], 8, 3),
        (["fidelity.py"], 9, 22),
        (
            [
                "plan_table.py",
                "--hardware",
                "l4",
                "dgx-spark",
                "--users",
                "3",
                "5",
                "--model",
                "qwen3-32b",
                "--output-tokens",
                "8",
            ],
            10,
            10,
        ),
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


def test_the_fit_finds_the_constants_that_made_the_figures(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/emulator"))
    import fidelity_vllm_cpu as fidelity

    shape = ModelShape("tiny", 2, 128, 4, 2, 32, 256, 2048, True, 2048)
    made = fidelity.Constants(step=0.006, token=0.0004)
    rates = {n: fidelity.predict(shape, made, n).output_throughput for n in fidelity.FITTED}
    found = fidelity.fit(shape, rates)
    assert found.step == pytest.approx(made.step, rel=0.01)
    assert found.token == pytest.approx(made.token, rel=0.01)
    assert not set(fidelity.FITTED) & set(fidelity.VALIDATED)
