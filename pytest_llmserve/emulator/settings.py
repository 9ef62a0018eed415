"""The emulator's command line, parsed and checked into one frozen `Settings`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pytest_llmserve.emulator.catalog import hardware_names, load_hardware, load_model, model_names
from pytest_llmserve.emulator.dialects import DIALECTS
from pytest_llmserve.emulator.faults import Fault, parse_fault
from pytest_llmserve.emulator.physics import Machine
from pytest_llmserve.emulator.scheduler import Policy
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.metrics.roofline import (
    ELEMENT_BYTES,
    Hardware,
    ModelShape,
    Precision,
    kv_bytes,
    kv_capacity,
    resident_bytes,
)

Schedule = Literal["batched", "exact", "max-rate"]

# A prompt's blocks need not be all there is, but the ids of a pool of tiny models would fill lists
# of many million entries.
_MOST_BLOCKS = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What to imitate and how. Times are seconds."""

    host: str
    port: int
    model: str
    served: tuple[str, ...]
    machine: Machine
    policy: Policy
    block_size: int
    blocks: int
    max_model_len: int
    prefix_caching: bool
    max_queued: int | None
    cached_details: bool
    schedule: Schedule
    ttft: float
    tpot: float
    events_per_write: int
    reasoning_tokens: int
    dialect: str
    faults: tuple[Fault, ...]
    load_time: float
    noise: float
    run_noise: float
    seed: int
    truth_log: Path | None
    api_key: str | None

    def as_dict(self) -> dict[str, Any]:
        """The settings in force, plain, for `/server_info`. The key is not among them."""
        hardware = self.machine.hardware
        return {
            "emulated": True,
            "model": self.model,
            "served_model_name": list(self.served),
            "hardware": hardware.name,
            "weights": self.machine.precision.weights,
            "kv_cache_dtype": self.machine.precision.kv,
            "bandwidth": hardware.bandwidth,
            "bandwidth_efficiency": hardware.bandwidth_efficiency,
            "compute_efficiency": hardware.compute_efficiency,
            "overhead": hardware.overhead,
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "num_gpu_blocks": self.blocks,
            "enable_prefix_caching": self.prefix_caching,
            "max_num_seqs": self.policy.max_num_seqs,
            "max_num_batched_tokens": self.policy.max_num_batched_tokens,
            "max_num_queued_reqs": self.max_queued,
            "batching": self.policy.batching,
            "num_speculative_tokens": self.policy.draft_tokens,
            "acceptance": self.policy.acceptance,
            "schedule": self.schedule,
            "ttft": self.ttft,
            "tpot": self.tpot,
            "events_per_write": self.events_per_write,
            "reasoning_tokens": self.reasoning_tokens,
            "dialect": self.dialect,
            "faults": [fault.text for fault in self.faults],
            "noise": self.noise,
            "run_noise": self.run_noise,
            "seed": self.seed,
        }


def parser() -> argparse.ArgumentParser:
    """The options, for `python -m pytest_llmserve.emulator` and for whoever shows its help."""
    p = argparse.ArgumentParser(
        prog="python -m pytest_llmserve.emulator",
        description="An emulated LLM server: an OpenAI-compatible API whose times come from the "
        "arithmetic of a model on a machine. Nothing it says is measured on that machine.",
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000)
    what = p.add_argument_group("what is imitated")
    what.add_argument("--model", default="qwen3-8b", help=f"{', '.join(model_names())} or a path")
    what.add_argument("--served-model-name", nargs="+", default=None)
    what.add_argument("--hardware", default="dgx-spark", help=", ".join(hardware_names()))
    what.add_argument("--weights", default="nvfp4", choices=tuple(ELEMENT_BYTES))
    what.add_argument("--kv", default="fp8", choices=tuple(ELEMENT_BYTES))
    what.add_argument("--bandwidth-efficiency", type=float, help="share of bandwidth reached")
    what.add_argument("--compute-efficiency", type=float, help="share of the peak reached")
    what.add_argument("--overhead", type=float, help="seconds a step takes beside the roofline")
    what.add_argument("--noise", type=float, default=0.0, help="relative sigma of a step's time")
    what.add_argument("--run-noise", type=float, default=0.0, help="the same, once a process")
    what.add_argument("--load-time", type=float, default=0.0, help="seconds until it is ready")
    what.add_argument("--dialect", default="vllm", choices=tuple(DIALECTS))
    what.add_argument("--reasoning-tokens", type=int, default=0, help="of a chat answer")
    what.add_argument(
        "--fault", action="append", default=[], help="NAME[=KEY:VALUE,…], may be repeated"
    )
    batch = p.add_argument_group("scheduling, named as in vLLM")
    batch.add_argument("--max-num-seqs", type=int, default=64)
    batch.add_argument("--max-num-batched-tokens", type=int, default=2048)
    batch.add_argument("--max-model-len", type=int)
    batch.add_argument("--max-num-queued-reqs", type=int)
    batch.add_argument("--block-size", type=int, default=16)
    batch.add_argument("--num-gpu-blocks-override", type=int)
    batch.add_argument("--gpu-memory-utilization", type=float)
    batch.add_argument("--enable-prefix-caching", action=flag, default=True)
    batch.add_argument("--enable-prompt-tokens-details", action=flag, default=False)
    batch.add_argument(
        "--batching", default="continuous", choices=("continuous", "static", "serial")
    )
    batch.add_argument("--num-speculative-tokens", type=int, default=0)
    batch.add_argument("--acceptance", type=float, default=0.7, help="of one speculated token")
    batch.add_argument("--draft-cost", type=float, default=0.0, help="of one, in model passes")
    batch.add_argument("--speculative-config", help="vLLM's JSON; read are the token number and "
                       "the synthetic acceptance length")  # fmt: skip
    time = p.add_argument_group("time")
    time.add_argument("--schedule", default="batched", choices=("batched", "exact", "max-rate"))
    time.add_argument("--ttft", type=float, default=0.2, help="exact: arrival to first token")
    time.add_argument("--tpot", type=float, default=0.02, help="exact: between tokens")
    time.add_argument("--events-per-write", type=int, default=1, help="events sent at once")
    time.add_argument("--truth-log", type=Path, help="CSV of the true time of every event")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--api-key-env", help="environment variable that holds the key to ask for")
    return p


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from a command line.

    Raises ConfigError with one sentence for values that make no sense together; argparse itself
    ends the process with status 2 for options that do not exist.
    """
    a = parser().parse_args(arguments)
    _check_ranges(a)
    precision = Precision(weights=a.weights, kv=a.kv)
    shape, hardware = load_model(a.model), _hardware(a)
    blocks, length = _memory(a, shape, hardware, precision)
    drafts, acceptance = _speculation(a)
    return Settings(
        host=a.host,
        port=a.port,
        model=a.model,
        served=tuple(a.served_model_name or [a.model]),
        machine=Machine(shape, hardware, precision, a.draft_cost),
        policy=Policy(
            max_num_seqs=a.max_num_seqs,
            max_num_batched_tokens=a.max_num_batched_tokens,
            batching=a.batching,
            draft_tokens=drafts,
            acceptance=acceptance,
        ),
        block_size=a.block_size,
        blocks=blocks,
        max_model_len=length,
        prefix_caching=a.enable_prefix_caching,
        max_queued=a.max_num_queued_reqs,
        cached_details=a.enable_prompt_tokens_details,
        schedule=a.schedule,
        ttft=a.ttft,
        tpot=a.tpot,
        events_per_write=a.events_per_write,
        reasoning_tokens=a.reasoning_tokens,
        dialect=a.dialect,
        faults=tuple(parse_fault(text) for text in a.fault),
        load_time=a.load_time,
        noise=a.noise,
        run_noise=a.run_noise,
        seed=a.seed,
        truth_log=a.truth_log,
        api_key=_api_key(a.api_key_env),
    )


def _check_ranges(a: argparse.Namespace) -> None:
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "events_per_write"):
        _require(getattr(a, name) >= 1, name, getattr(a, name), "a whole number from 1 up")
    for name in ("max_model_len", "max_num_queued_reqs", "num_gpu_blocks_override"):
        value = getattr(a, name)
        _require(value is None or value >= 1, name, value, "a whole number from 1 up")
    for name in ("ttft", "tpot", "noise", "run_noise", "load_time", "draft_cost",
                 "num_speculative_tokens", "reasoning_tokens"):  # fmt: skip
        _require(getattr(a, name) >= 0, name, getattr(a, name), "not negative")
    for name in ("bandwidth_efficiency", "compute_efficiency", "gpu_memory_utilization"):
        value = getattr(a, name)
        _require(value is None or 0 < value <= 1, name, value, "above 0 and at most 1")
    _require(a.overhead is None or a.overhead >= 0, "overhead", a.overhead, "not negative")
    _require(0 <= a.acceptance <= 1, "acceptance", a.acceptance, "from 0 to 1")
    _require(0 <= a.port <= 65535, "port", a.port, "from 0 to 65535")
    _require(a.schedule != "exact" or a.tpot > 0, "tpot", a.tpot, "positive with --schedule exact")


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be {wanted}")


def _hardware(a: argparse.Namespace) -> Hardware:
    changes = {
        name: value
        for name in ("bandwidth_efficiency", "compute_efficiency", "overhead")
        if (value := getattr(a, name)) is not None
    }
    if a.gpu_memory_utilization is not None:
        changes["memory_utilization"] = a.gpu_memory_utilization
    return replace(load_hardware(a.hardware), **changes)


def _memory(
    a: argparse.Namespace, shape: ModelShape, hardware: Hardware, precision: Precision
) -> tuple[int, int]:
    """Number of KV blocks and longest sequence, or the sentence that says why it does not fit."""
    usable = hardware.memory * hardware.memory_utilization
    weights = resident_bytes(shape, precision)
    room = kv_capacity(shape, hardware, precision)
    if a.num_gpu_blocks_override is None and room < a.block_size:
        raise ConfigError(
            f"No available memory for the cache blocks: {shape.name} in {precision.weights} takes "
            f"{weights / 1e9:.1f} GB of the {usable / 1e9:.1f} GB usable on {hardware.title}; "
            "choose a smaller model, a narrower precision or larger hardware"
        )
    blocks = a.num_gpu_blocks_override or min(room // a.block_size, _MOST_BLOCKS)
    length = a.max_model_len or min(shape.max_positions, blocks * a.block_size)
    if length > blocks * a.block_size:
        need = length * kv_bytes(shape, precision) / 1e9
        raise ConfigError(
            f"To serve at least one request with the model's max seq len ({length}), {need:.2f} GB "
            f"KV cache is needed, and {blocks * a.block_size} tokens fit; "
            "lower --max-model-len, or choose a narrower --kv or larger hardware"
        )
    return blocks, length


def _speculation(a: argparse.Namespace) -> tuple[int, float]:
    """Speculated tokens a step and acceptance of one of them."""
    if not a.speculative_config:
        return a.num_speculative_tokens, a.acceptance
    try:
        config = json.loads(a.speculative_config)
        drafts = int(config["num_speculative_tokens"])
        length = config.get("synthetic_acceptance_length")
        return drafts, a.acceptance if length is None else acceptance_for(float(length), drafts)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"--speculative-config {a.speculative_config}: it must be a JSON object with "
            "num_speculative_tokens"
        ) from None


def acceptance_for(length: float, drafts: int) -> float:
    """The acceptance of one token with which a step of `drafts` makes `length` tokens on average.

    The mean is 1 + p + p² + … + p^drafts; it grows with p, so bisection finds it.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**i for i in range(drafts + 1)) < length:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"--api-key-env {variable}: the environment has no such variable")
    return key
