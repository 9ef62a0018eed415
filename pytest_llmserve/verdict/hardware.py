"""What machine this is: CPU, memory and GPUs, and a short safe name for it."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@functools.cache
def describe() -> Mapping[str, Any]:
    """This machine: `slug`, `cpu`, `cores`, `memory` (bytes) and, where an NVIDIA GPU can be asked,
    `gpu`, `gpu_count`, `gpu_memory` (bytes; None on unified memory), `driver`,
    `compute_capability`, and of the first `power_limit` (watts) and `max_sm_clock` (Hz) if it tells
    them. Several kinds of GPU give names joined with " + "."""
    import psutil

    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory": psutil.virtual_memory().total,
        **gpus(),
    }
    return {"slug": slug(facts), **facts}


def cpu_model() -> str:
    """The CPU's name as the system gives it; on Arm, where /proc/cpuinfo has none, the machine."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine() or "unknown"
    return " ".join(name.split())


def gpus() -> dict[str, Any]:
    """The GPUs as NVML reports them; nothing if NVML, its driver or a GPU is missing."""
    from pytest_llmserve.metrics.nvml import import_quietly, policy

    pynvml = import_quietly()
    if pynvml is None:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        if not handles:
            return {}
        names = [_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
        try:
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handles[0]).total)
        except pynvml.NVMLError:
            memory = None  # a Spark's unified memory: "Not Supported"
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handles[0])
        return {
            "gpu": " + ".join(dict.fromkeys(names)),
            "gpu_count": len(handles),
            "gpu_memory": memory,
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "compute_capability": f"{major}.{minor}",
            **policy(pynvml, handles[0]),
        }
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def slug(facts: Mapping[str, Any]) -> str:
    """A machine's name for folders: "nvidia-h100-80gb-hbm3", "dgx-spark", "cpu-intel-xeon-2c"; with
    several GPUs, their number comes first ("4x-nvidia-…")."""
    gpu = facts.get("gpu")
    if not gpu:
        cpu = re.sub(r"\([^)]*\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", str(facts["cpu"]))
        return f"cpu-{safe(cpu)}-{facts['cores']}c"
    name = "dgx-spark" if "GB10" in gpu else safe(gpu)
    if not name.startswith(("nvidia", "dgx")):
        name = f"nvidia-{name}"
    count = facts.get("gpu_count", 1)
    return name if count == 1 else f"{count}x-{name}"


def safe(text: str, length: int = 60) -> str:
    """`text` as a folder name: lower-case letters, digits, dots inside, `-` and `_`; never empty,
    never starting with a dot, never a path."""
    plain = re.sub(r"[^a-z0-9._]+", "-", text.lower())
    plain = re.sub(r"\.{2,}", ".", plain).strip("-._")[:length].strip("-._")
    return plain or "unnamed"
