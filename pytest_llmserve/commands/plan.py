"""`llmserve plan`: how many users a machine can serve, before it is bought or run."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmserve.errors import ConfigError

if TYPE_CHECKING:
    from pytest_llmserve.plan import Case

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command; its work is in the namespace as `run`."""
    parser = subparsers.add_parser(
        "plan",
        help="compute how many users a machine can serve",
        description="The arithmetic from a model's sizes to tokens a second and users, what binds, "
        "and what would lift it. Everything is computed, nothing measured.",
    )
    add = parser.add_argument
    add("--hardware", default="dgx-spark", metavar="NAME|FILE.yaml", help="default: dgx-spark")
    add("--model", default="qwen3-8b", metavar="NAME|PATH", help="default: qwen3-8b")
    add("--weights", default="nvfp4", help="bf16, fp8, nvfp4 or int4 (default: nvfp4)")
    add("--kv", default="fp8", help="KV cache: bf16, fp8, nvfp4 or int4 (default: fp8)")
    add("--users", type=int, default=30, metavar="N", help="default: 30")
    add("--prompt-tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--output-tokens", type=int, default=128, metavar="N", help="default: 128")
    add(
        "--slo", nargs="+", action="extend", default=[], metavar="METRIC<=NUMBER",
        help="objectives to find numbers of users for, such as 'ttft.p95<=0.5' or "
        "'output_throughput>=1000'",
    )  # fmt: skip
    add("--devices", type=int, default=1, metavar="N", help="joined by tensor parallelism")
    add("--max-num-seqs", type=int, metavar="N", help="sequences at once (default: all users)")
    add("--max-num-batched-tokens", type=int, default=2048, metavar="N", help="default: 2048")
    add("--num-speculative-tokens", type=int, default=0, metavar="N", help="guessed a step")
    add("--acceptance", type=float, default=0.7, help="of one guessed token (default: 0.7)")
    add("--draft-cost", type=float, default=0.0, help="of guessing one, in passes of the model")
    add("--bandwidth-efficiency", type=float, metavar="SHARE", help="of the bandwidth reached")
    add("--compute-efficiency", type=float, metavar="SHARE", help="of the peak reached")
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help="of memory that may be used")
    add("--format", choices=("text", "markdown", "json"), default="text")
    add("--plot", type=Path, metavar="FILE.svg|png", help="draw it (needs the extra `report`)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan. Raises ConfigError in one sentence for what cannot be planned."""
    from pytest_llmserve.plan import parse_objective, plan
    from pytest_llmserve.report.plan import FORMATS, plot

    objectives = [parse_objective(text) for text in options.slo]
    found = plan(_case(options), options.users, objectives)
    if options.plot:
        plot(found, options.plot)
    sys.stdout.write(FORMATS[options.format](found))
    return 0


def _case(options: argparse.Namespace) -> Case:
    from pytest_llmserve.emulator.catalog import load_hardware, load_model
    from pytest_llmserve.engines import normalise_model
    from pytest_llmserve.metrics.roofline import Precision
    from pytest_llmserve.plan import Case

    for name in ("prompt_tokens", "output_tokens", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(options, name)
        _require(value is None or value >= 1, name, value, "a whole number from 1 up")
    for name in ("bandwidth_efficiency", "compute_efficiency", "gpu_memory_utilization"):
        value = getattr(options, name)
        _require(value is None or 0 < value <= 1, name, value, "above 0 and at most 1")
    for name in ("num_speculative_tokens", "draft_cost"):
        value = getattr(options, name)
        _require(value >= 0, name, value, "not negative")
    _require(0 <= options.acceptance <= 1, "acceptance", options.acceptance, "from 0 to 1")
    model, notice = normalise_model(options.model)
    if notice:
        print(f"llmserve plan: {notice}", file=sys.stderr)
    changes = {
        "bandwidth_efficiency": options.bandwidth_efficiency,
        "compute_efficiency": options.compute_efficiency,
        "memory_utilization": options.gpu_memory_utilization,
    }
    hardware = replace(
        load_hardware(options.hardware), **{k: v for k, v in changes.items() if v is not None}
    )
    try:
        hardware = hardware.joined(options.devices)
    except ValueError:
        raise ConfigError(
            f"--devices {options.devices}: {hardware.title} has no link to others; give 1, or a "
            "hardware file with link_bandwidth"
        ) from None
    return Case(
        shape=load_model(model),
        hardware=hardware,
        precision=Precision(options.weights, options.kv),
        prompt=options.prompt_tokens,
        output=options.output_tokens,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        draft_tokens=options.num_speculative_tokens,
        acceptance=options.acceptance,
        draft_cost=options.draft_cost,
    )


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be {wanted}")
