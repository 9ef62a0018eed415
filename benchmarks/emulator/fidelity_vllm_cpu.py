"""The emulator's model beside real vLLM on this machine's CPU: a markdown table.

    python benchmarks/emulator/fidelity_vllm_cpu.py --vllm-python PYTHON [--seconds 10]

PYTHON is an interpreter with vLLM's CPU build. A tiny model with dummy weights is served and
measured with our own load. Two constants of the machine, the seconds a step takes whatever is in
it and the seconds each token adds, are fitted to the throughput of some numbers of users; the
others are predicted with them and are the validation.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from pytest_llmserve.emulator.catalog import load_hardware, load_model
from pytest_llmserve.emulator.physics import Machine
from pytest_llmserve.emulator.scheduler import Policy
from pytest_llmserve.emulator.simulate import Simulated, simulate
from pytest_llmserve.metrics.roofline import ModelShape, Precision

ROOT = Path(__file__).parents[2]
FITTED = (1, 4, 16)
VALIDATED = (2, 8, 30)
PROMPT, OUTPUT = 16, 64
FIGURES = ("output_throughput", "tpot.p50", "ttft.p50")


@dataclass(frozen=True)
class Constants:
    """Seconds a step takes beside its tokens, and seconds each decoded token adds."""

    step: float
    token: float


def machine(shape: ModelShape, constants: Constants) -> Machine:
    """The emulated machine with these constants: overhead a step, and compute by the token."""
    decoded = 2.0 * (shape.linear_params + shape.head_params)  # FLOPs, but for attention
    hardware = replace(
        load_hardware("cpu"),
        overhead=constants.step,
        flops={"bf16": decoded / constants.token},
        compute_efficiency=1.0,
    )
    return Machine(shape, hardware, Precision("bf16", "bf16"))


def predict(shape: ModelShape, constants: Constants, users: int) -> Simulated:
    return simulate(machine(shape, constants), Policy(), users=users, prompt=PROMPT, output=OUTPUT)


def fit(shape: ModelShape, throughput: Mapping[int, float]) -> Constants:
    """The constants whose predicted throughput is nearest, by least squares of logarithms."""

    def errors(logs: np.ndarray) -> list[float]:
        constants = Constants(*np.exp(logs))
        return [
            float(np.log(predict(shape, constants, users).output_throughput / rate))
            for users, rate in throughput.items()
        ]

    # A start from a straight line: a step of n users lasts step + n * token.
    users = np.array(list(throughput))
    line = np.polyfit(users, users / np.array(list(throughput.values())), 1)
    start = np.log(np.maximum([line[1], line[0]], 1e-6))
    return Constants(*map(float, np.exp(least_squares(errors, start, diff_step=0.01).x)))


def measure(python: str, seconds: float) -> tuple[ModelShape, str, dict[int, dict[str, float]]]:
    """Shape of the model, version of vLLM, and the figures of each number of users."""
    from pytest_llmserve.engines import get_engine
    from pytest_llmserve.launch.manager import ServerManager
    from pytest_llmserve.load.plan import LoadPlan, Workload, closed_loop
    from pytest_llmserve.measurement import fresh_seed, take
    from pytest_llmserve.server_files import load_server_config

    figures: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "tiny"
        subprocess.run([python, str(ROOT / "tests/tiny_model.py"), str(model)], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        os.environ |= {"LLMSERVE_TINY_MODEL": str(model), "LLMSERVE_VLLM_PYTHON": python}
        config = load_server_config(ROOT / "suites/servers/vllm-tiny-cpu.yaml")
        manager = ServerManager(folder, os.getpid())
        try:
            server = manager.get(
                config, get_engine("vllm"), lambda stage: print(stage, file=sys.stderr)
            )
            for users in sorted({*FITTED, *VALIDATED}):
                plan = LoadPlan(
                    closed_loop(users=users),
                    Workload(prompt_tokens=PROMPT, output_tokens=OUTPUT),
                    duration=seconds,
                    warmup=2,
                    seed=fresh_seed(),
                )
                run, _ = take(
                    server, plan, test="fidelity", record_path=folder / f"{users}.npz",
                    alive=lambda: manager.alive(server),
                )  # fmt: skip
                for check in run.validity:
                    if not check.ok:
                        print(f"{users} users: {check.check}: {check.detail}", file=sys.stderr)
                figures[users] = {figure: run[figure] for figure in FIGURES}
        finally:
            manager.stop_all()
        return load_model(str(model)), server.version, figures


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--vllm-python", required=True, metavar="PYTHON")
    options.add_argument("--seconds", type=float, default=10.0)
    given = options.parse_args()
    before = os.getloadavg()[0]
    shape, version, figures = measure(given.vllm_python, given.seconds)
    constants = fit(shape, {n: figures[n]["output_throughput"] for n in FITTED})
    print(
        f"vLLM {version}, tiny Qwen3, {PROMPT} tokens in and {OUTPUT} out, {given.seconds:g} s "
        f"each; {os.cpu_count()} cores, Linux {platform.release()}, load average before "
        f"{before:.1f}.\nFitted to the throughput of {', '.join(map(str, FITTED))} users: "
        f"{1e3 * constants.step:.2f} ms a step and {1e3 * constants.token:.3f} ms a token.\n"
    )
    print("| users | | figure | measured | emulated | error |")
    print("|---|---|---|---|---|---|")
    errors = []
    for users, measured in figures.items():
        seen = predict(shape, constants, users)
        for figure in FIGURES:
            error = seen.value(figure) / measured[figure] - 1
            role = "validation"
            if users in FITTED:
                role = "fitted" if figure == "output_throughput" else "constants fitted here"
            else:
                errors.append(abs(error))
            print(f"| {users} | {role} | {figure} | {shown(figure, measured[figure])} | "
                  f"{shown(figure, seen.value(figure))} | {error:+.0%} |")  # fmt: skip
    print(f"\nMedian size of the error, rows of validation: {statistics.median(errors):.0%}")


def shown(figure: str, value: float) -> str:
    return f"{value:.0f} tok/s" if figure == "output_throughput" else f"{1e3 * value:.1f} ms"


if __name__ == "__main__":
    main()
