"""What `llmserve plan` says of 30 users on each machine: a markdown table. All computed.

    python benchmarks/emulator/plan_table.py [--model qwen3-8b] [--prompt-tokens 128] \
        [--output-tokens 128] [--users 30] [--hardware NAME …]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pytest_llmserve.emulator.catalog import hardware_names, load_hardware, load_model
from pytest_llmserve.metrics.roofline import Precision
from pytest_llmserve.plan import Case, UserRange, arithmetic, binding, parse_objective, user_range
from pytest_llmserve.report.units import show

PRECISIONS = (("bf16", "bf16"), ("fp8", "fp8"), ("nvfp4", "fp8"))
THOUSAND = parse_objective("output_throughput>=1000")
HEADS = (
    "hardware", "weights / KV", "users", "ceiling", "expected", "a user's", "TTFT p95", "binds",
    "users that fit", "1,000 tok/s from",
)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="qwen3-8b")
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--output-tokens", type=int, default=128)
    options.add_argument("--users", type=int, nargs="+", default=[30])
    options.add_argument("--hardware", nargs="+", default=hardware_names())
    given = options.parse_args()
    shape = load_model(given.model)
    print(
        f"{shape.name}, {given.prompt_tokens} tokens in, {given.output_tokens} out, closed loop. "
        "Computed, not measured.\n"
    )
    print("| " + " | ".join(HEADS) + " |")
    print("|" + "---|" * len(HEADS))
    names = sorted(given.hardware, key=lambda name: (name != "dgx-spark", name))
    for name in names:
        for weights, kv in PRECISIONS:
            case = Case(
                shape,
                load_hardware(name),
                Precision(weights, kv),
                given.prompt_tokens,
                given.output_tokens,
            )
            for row in rows(case, given.users):
                print("| " + " | ".join(row) + " |", flush=True)


def rows(case: Case, users: list[int]) -> Iterator[tuple[str, ...]]:
    what = case.hardware.title, f"{case.precision.weights} / {case.precision.kv}"
    if case.users_that_fit < 1:
        yield (*what, "–", "–", "–", "–", "–", "memory", "0", "–")
        return
    enough = user_range(case, [THOUSAND])
    for count in users:
        seen = case.expect(count)
        lines = {line.name: line.value for line in arithmetic(case, count)}
        yield (
            *what,
            str(count),
            show("output_throughput", lines["ceiling"]),
            show("output_throughput", seen.output_throughput),
            show("user_throughput", seen.value("user_throughput.p50")),
            show("ttft.p95", seen.ttft_p95),
            binding(case, count).what,
            f"{case.users_that_fit:,}",
            _from(enough),
        )


def _from(found: UserRange) -> str:
    return "none" if found.least is None else f"{found.least:,} users"


if __name__ == "__main__":
    main()
