"""What a server computes on, with what, and how precisely: the arguments of a roofline.

Where one of them is not known there is no roofline, and a sentence says which one it is. Nothing
is guessed from a name that could mean two things.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.metrics.arithmetic import roofline
from pytest_llmserve.metrics.roofline import ELEMENT_BYTES, Hardware, ModelShape, Precision

if TYPE_CHECKING:
    from pytest_llmserve.load.record import Record
    from pytest_llmserve.servers import Server

#: GPUs by the name that NVML gives → the emulator's description. Variants of one chip differ in
#: memory (H100 PCIe, A100 40GB, laptops), so only whole names count.
CHIPS: Mapping[str, str] = {
    "NVIDIA GB10": "dgx-spark",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}

#: Engines whose models are in 16 bits unless something says that they are quantized.
_PLAIN = ("vllm", "sglang", "tensorrt-llm", "dynamo")

#: What engines call a quantization → our precision. Names that leave the bits open (compressed-
#: tensors, gptq) are not here: the model's name or its own config.json tells then.
_WEIGHTS: Mapping[str, str] = {
    **dict.fromkeys(("bf16", "bfloat16", "float16", "half", "fp16"), "bf16"),
    **dict.fromkeys(("fp8", "fbgemm_fp8", "ptpc_fp8", "w8a8_fp8", "modelopt_fp8"), "fp8"),
    **dict.fromkeys(("fp8_per_tensor", "fp8_per_block", "fp8_per_channel"), "fp8"),
    **dict.fromkeys(("nvfp4", "modelopt_fp4", "petit_nvfp4", "nvfp4_per_token"), "nvfp4"),
    **dict.fromkeys(("awq", "awq_marlin", "auto_awq", "int4", "w4a16"), "int4"),
}
_IN_NAME = (
    ("nvfp4", r"nvfp4|(?<![a-z])fp4"),
    ("fp8", r"fp8"),
    ("int4", r"int4|w4a16|awq|4bit"),
)
#: Stands for the word of an engine that its model is not quantized.
_NOT = "not quantized"
_PARALLEL = ("tensor-parallel-size", "tp-size", "tp", "config.tensor-parallel-size")
_OTHER_PARALLEL = (
    "pipeline-parallel-size", "pp-size", "data-parallel-size", "dp-size",
    "config.pipeline-parallel-size",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model of this shape, on this hardware, in this precision."""

    shape: ModelShape
    hardware: Hardware
    precision: Precision


def subject_of(
    server: Server, machine: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Subject | str:
    """What the server computes with; a sentence if a part of it is not known.

    `machine` is what `verdict.hardware.describe()` says of this one, `arguments` are those in
    force, flat and dashed (`verdict.fingerprint.server_arguments`).
    """
    try:
        if server.emulated:
            return _imitated(server)
        hardware = hardware_of(server, machine, arguments)
        if isinstance(hardware, str):
            return hardware
        name = _model_name(server)
        if "quantization" in server.effective and not server.effective["quantization"]:
            arguments = {**arguments, "quantization": _NOT}
        precision = precision_of(server.engine, name, arguments)
        if isinstance(precision, str):
            return precision
        from pytest_llmserve.emulator.catalog import load_model

        return Subject(load_model(name), hardware, precision)
    except ConfigError as unknown:
        return str(unknown)


def _imitated(server: Server) -> Subject:
    """The machine and model that an emulated server imitates."""
    from pytest_llmserve.emulator.catalog import load_hardware, load_model
    from pytest_llmserve.servers import Emulation

    told, meant = server.effective, server.config.emulation or Emulation()
    attached = server.config.engine == "attach"
    hardware = str(told.get("hardware", "")) if attached else meant.hardware
    model = str(told.get("model", "")) if attached else meant.model
    return Subject(
        load_model(model),
        load_hardware(hardware),
        Precision(
            str(told.get("weights", meant.weights)), str(told.get("kv_cache_dtype", meant.kv))
        ),
    )


def hardware_of(
    server: Server, machine: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Hardware | str:
    """The description of a real server's hardware; a sentence if there is none."""
    from pytest_llmserve.emulator.catalog import load_hardware

    on_cpu = server.config.gpus == 0 and server.config.engine != "attach"
    if on_cpu or arguments.get("device") == "cpu":
        return "the server computes on the CPU, whose memory bandwidth is not known"
    if server.local:
        gpu = machine.get("gpu")
        if not gpu:
            return "no GPU of this machine can be asked for its name (is nvidia-ml-py installed?)"
        if gpu not in CHIPS:
            return f"there is no description of {gpu}: its memory bandwidth is not known"
        chip = load_hardware(CHIPS[gpu])
    elif server.config.hardware:
        chip = load_hardware(server.config.hardware)
    else:
        return "the server runs on another machine: name it by `hardware` in its config"
    if any(_count(arguments, (name,)) != 1 for name in _OTHER_PARALLEL):
        return "the server is split by layers or copied (pipeline or data parallel)"
    devices = _count(arguments, _PARALLEL)
    if devices == 1:
        return chip
    try:
        return chip.joined(devices)
    except ValueError:
        return f"no link between {devices} of {chip.title} is described"


def _count(arguments: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = next((arguments[name] for name in names if arguments.get(name) is not None), 1)
    return found if isinstance(found, int) and found >= 1 else 1


def _model_name(server: Server) -> str:
    """The model as a folder or by its publisher's name."""
    own = server.config.model or str(server.effective.get("model") or server.model)
    return str(Path(own).expanduser()) if own.startswith("~") else own


def precision_of(engine: str, model: str, arguments: Mapping[str, Any]) -> Precision | str:
    """The precisions of weights and KV cache; a sentence if one of them is not known."""
    weights = _weights(engine, model, arguments)
    if weights is None:
        said = [arguments[name] for name in ("quantization", "dtype") if arguments.get(name)]
        words = ", ".join(map(str, said)) or "nothing of it"
        return f"the precision of the weights is not known: {engine} says {words}"
    for name in ("kv-cache-dtype", "config.kv-cache-config.dtype", "kv-cache-config.dtype"):
        cache = _plain(arguments.get(name))
        if cache not in ("", "auto"):
            break
    kv = "bf16" if cache in ("", "auto") else "fp8" if cache.startswith("fp8") else cache
    kv = {"bfloat16": "bf16", "float16": "bf16", "fp16": "bf16"}.get(kv, kv)
    if kv not in ELEMENT_BYTES:
        return f"the bytes of a KV cache of {cache} are not known"
    return Precision(weights, kv)


def _weights(engine: str, model: str, arguments: Mapping[str, Any]) -> str | None:
    said = _plain(arguments.get("quantization") or arguments.get("quantize"))
    if said in _WEIGHTS:
        return _WEIGHTS[said]
    own = {} if said == _NOT else _quantization(model)
    for text in () if said == _NOT else (_plain(own.get("quant_algo")), Path(model).name.lower()):
        for precision, pattern in _IN_NAME:
            if text and re.search(pattern, text):
                return precision
    method = _plain(own.get("quant_method"))
    if own.get("bits") == 4:
        return "int4"
    if method in _WEIGHTS:
        return _WEIGHTS[method]
    if said != _NOT and (said or method or engine not in _PLAIN):
        return None
    dtype = _plain(arguments.get("dtype"))
    return "bf16" if dtype in ("", "auto") else _WEIGHTS.get(dtype)


def _quantization(model: str) -> Mapping[str, Any]:
    """What the `config.json` of a model in a local folder says of its quantization."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, Mapping) else {}


def _plain(value: Any) -> str:
    return str(value or "").lower().removeprefix("torch.")


def run_roofline(
    subject: Subject | str,
    record: Record,
    metrics: Mapping[str, Any],
    counters: Mapping[str, float],
) -> dict[str, Any]:
    """The roofline of a load as the result has it (`Run.roofline`): `share` (the `roofline` of its
    metrics), `ceiling` (tokens/s), `bound`, what it was computed for, and the arithmetic in
    `lines`; or only the `reason` why there is none.

    The batch is the mean number of requests in flight but for those that waited on the server.
    """
    if isinstance(subject, str):
        return {"reason": subject}
    rate, flying = metrics["output_throughput"], metrics["concurrency"]["mean"]
    context = mean_context(record, metrics)
    if not rate or not flying or context is None:
        return {"reason": "there was no output in the window"}
    drafts = counters.get("spec_drafts", 0.0)
    drafted, accepted = (
        counters.get(name, 0.0) for name in ("spec_draft_tokens", "spec_accepted_tokens")
    )
    if drafted and not drafts:
        return {"reason": "the server speculates and does not tell how many drafts it made"}
    waiting = metrics["server"]["waiting"]["mean"] or 0.0
    found = roofline(
        subject.shape,
        subject.hardware,
        subject.precision,
        rate=rate,
        sequences=max(flying - waiting, min(flying, 1.0)),
        context=context,
        made=1.0 + accepted / drafts if drafts else 1.0,
        drafts=max(drafted, accepted) / drafts if drafts else 0.0,
    )
    return {
        "share": found.share,
        "ceiling": found.ceiling,
        "bound": found.bound,
        "hardware": subject.hardware.title,
        "model": subject.shape.name,
        "weights": subject.precision.weights,
        "kv": subject.precision.kv,
        "lines": [str(line) for line in found.lines],
    }


def mean_context(record: Record, metrics: Mapping[str, Any]) -> float | None:
    """Mean number of tokens before an output token, over the answers begun in the window: prompt
    and half of the output, each answer counted by its tokens."""
    import numpy as np

    from pytest_llmserve.metrics.definitions import per_request

    start = record.info.start + metrics["window"]["start"]
    end = record.info.start + metrics["window"]["end"]
    inside = (record.phase == 1) & (record.intended >= start) & (record.intended < end)
    output = per_request(record)["output_tokens"]
    prompt = np.where(record.prompt_tokens >= 0, record.prompt_tokens, record.want_prompt)
    known = inside & (output > 0) & (prompt >= 0)
    if not known.any():
        return None
    return float(np.average(prompt[known] + output[known] / 2, weights=output[known]))
