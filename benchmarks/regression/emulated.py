"""The whole way, on the emulated engine: is a slow-down caught, a trifle let pass, a drift seen?

    python benchmarks/regression/emulated.py

Each night is a pytest run of its own with `--llmserve-update-baselines`, on a server of its own
whose speed differs by 0.5 % from start to start (`run-noise`). Slow-downs are injected faults
(`throttle`), which the baseline is not told of. Exit status 0 if a slow-down of 10 % fails, one of
1 % does not, and a decline of 1 % a night fails by night 12. About two minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TEST = """
import os
import pytest
from pytest_llmserve import closed_loop

OPTIONS = {"seed": int(os.environ["NIGHT"]), "run-noise": 0.005}
if os.environ["SLOWER"] != "0":
    factor = 1 + float(os.environ["SLOWER"])
    OPTIONS["fault"] = [f"throttle=factor:{factor},after:0"]

@pytest.mark.llmserve(
    engine="emulator", model="Qwen3-0.6B",
    emulation={"hardware": "dgx-spark", "model": "qwen3-0.6b", "weights": "bf16", "kv": "bf16",
               "options": OPTIONS})
def test_speed(load, baseline):
    run = load(closed_loop(users=4), duration=2, prompt_tokens=32, output_tokens=32)
    baseline.check(run, metrics=["output_throughput", "tpot.p50"])
"""


@dataclass(frozen=True)
class Night:
    """What one pytest run said: the verdict, the throughput, and the reasons."""

    verdict: str
    throughput: float
    reasons: tuple[str, ...]


def night(folder: Path, number: int, slower: float, mode: str) -> Night:
    """Run the test once on a server that is slower by this share."""
    result = folder / f"result-{number}.json"
    environment = {**os.environ, "NIGHT": str(number), "SLOWER": f"{slower:g}"}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_speed.py",
            f"--llmserve-json={result}", f"--llmserve-update-baselines={mode}",
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )  # fmt: skip
    if not result.exists():
        raise SystemExit(f"night {number} measured nothing:\n{done.stdout}\n{done.stderr}")
    runs = json.loads(result.read_text())["runs"]
    verdicts = [v for run in runs for v in run["verdicts"]]
    return Night(
        verdict="fail" if done.returncode else runs[0]["verdict"],
        throughput=runs[0]["metrics"]["output_throughput"],
        reasons=tuple(v["reason"] for v in verdicts if v["verdict"] != "pass"),
    )


def show(what: str, found: Night) -> None:
    print(f"{what:28} {found.throughput:8.1f} tok/s (EMULATED)  {found.verdict}", flush=True)
    for reason in found.reasons:
        print(f"{'':28} {reason}")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="llmserve-") as name:
        folder = Path(name)
        (folder / "test_speed.py").write_text(TEST)
        (folder / "pytest.ini").write_text("[pytest]\n")
        for number in range(1, 6):
            show(f"night {number}, unchanged", night(folder, number, 0.0, "new"))
        trifle = night(folder, 6, 0.01, "none")
        show("1 % slower", trifle)
        slow = night(folder, 7, 0.10, "none")
        show("10 % slower", slow)
        caught = 0
        for number in range(1, 21):
            found = night(folder, 10 + number, 1.01**number - 1, "all")
            show(f"drifting, night {number}", found)
            if found.verdict == "fail":
                caught = number
                break
    good = trifle.verdict == "pass" and slow.verdict == "fail" and 0 < caught <= 12
    print(f"1 %: {trifle.verdict}; 10 %: {slow.verdict}; drift caught in night {caught or '–'}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
