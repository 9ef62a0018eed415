"""What can be known before a server is started: is all there that it needs?

`llmserve doctor` shows it for a config, and the launcher looks before each start: a model takes
minutes to load, and on machines whose GPU shares the system's memory a start that runs out of it
can freeze them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from pytest_llmserve.engines import Engine
from pytest_llmserve.engines.models import hub_name
from pytest_llmserve.engines.options import value_of
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch import container, process
from pytest_llmserve.launch.gpus import visible_gpus
from pytest_llmserve.servers import ContainerRunner, ServerConfig

#: Images, weights and compile caches of one engine take about this many bytes.
CACHES = 100 * 10**9

#: vLLM's default share of the GPU's memory, and its option; other engines size by what is free.
_VLLM_SHARE = 0.92


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `warn` does not keep a server from being started; `fail` does.

    `what` says what is the case, `mend` what to do about it ("" if it is well).
    """

    level: Literal["ok", "warn", "fail"]
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.mend}" if self.mend else self.what


def examine(config: ServerConfig, engine: Engine) -> list[Finding]:
    """All findings for a server that would be started here now. Nothing is started or changed."""
    if engine.name == "attach":
        return []
    return [*_program(config, engine), *requirements(config, engine), *memory(config, engine)]


def requirements(config: ServerConfig, engine: Engine) -> list[Finding]:
    """What the machine must have, whoever uses it now: model, GPUs, disk, port."""
    return [
        *_model(config, engine),
        *_gpu(config),
        *_disk(config),
        *_port(config),
    ]


def memory(config: ServerConfig, engine: Engine) -> list[Finding]:
    """Whether the memory is free that the engine takes at its start; nothing if none can tell."""
    total, free, unified = gpu_memory() if config.gpus else (0, 0, False)
    if not total:
        return []
    given = value_of(config.args, "gpu-memory-utilization")
    share = float(given) if isinstance(given, int | float) else _VLLM_SHARE
    vllm = engine.name == "vllm"
    return [memory_finding(total, free, share if vllm else None, unified=unified)]


def _program(config: ServerConfig, engine: Engine) -> Iterator[Finding]:
    try:
        if isinstance(config.runner, ContainerRunner):
            yield Finding("ok", f"containers: {container.find_runtime(config.runner.runtime)}")
        else:
            words = process.program_words(config, engine)
            yield Finding("ok", f"program: {' '.join(words)}")
    except ServerError as error:
        yield Finding("fail", str(error).rstrip("."))


def _model(config: ServerConfig, engine: Engine) -> Iterator[Finding]:
    if not config.model or engine.name in ("emulator", "ollama"):
        return
    if isinstance(config.runner, ContainerRunner) and config.model.startswith("/"):
        return  # a place inside the container
    if config.model.startswith(("/", "./", "../", "~")):
        there = Path(config.model).expanduser().exists()
        if there:
            yield Finding("ok", f"model: {config.model}")
        else:
            yield Finding("fail", f"model: {config.model} is not there", "correct the path")
        return
    name = hub_name(config.model)
    if is_cached(name):
        yield Finding("ok", f"model: {name} is in the cache {hub_cache()}")
    elif _offline(config):
        yield Finding(
            "fail",
            f"model: {name} is not in the cache {hub_cache()}, and HF_HUB_OFFLINE forbids to ask "
            "the hub",
            f"download it once (`hf download {name}`), or unset HF_HUB_OFFLINE",
        )
    else:
        yield Finding("ok", f"model: {name} will be downloaded from the hub")


def hub_cache() -> Path:
    """Where Hugging Face keeps models on this machine (HF_HUB_CACHE, HF_HOME)."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(home).expanduser() / "hub"


def is_cached(name: str) -> bool:
    """Whether a snapshot of a hub's model lies in the cache."""
    snapshots = hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(folder.is_dir() for folder in snapshots.iterdir())


def _offline(config: ServerConfig) -> bool:
    told = config.env.get("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", ""))
    return told.lower() in ("1", "true", "yes", "on")


def _gpu(config: ServerConfig) -> Iterator[Finding]:
    if config.gpus == 0:
        return
    known = visible_gpus()
    if len(known) < config.gpus:
        yield Finding(
            "fail",
            f"gpus: {config.gpus} needed, {len(known)} visible here",
            "check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or lower it",
        )
        return
    rows = _query("name,driver_version")
    named = f" ({', '.join(rows[0])})" if rows else ""
    yield Finding("ok", f"gpus: {len(known)} visible, {config.gpus} needed{named}")


def memory_finding(total: int, free: int, share: float | None, *, unified: bool) -> Finding:
    """Whether `free` of `total` bytes suffice for an engine that takes `share` of the total.

    `share` None: the engine takes what is free. `unified`: the GPU uses the system's memory.
    """
    kind = "memory that CPU and GPU share" if unified else "GPU memory"
    what = f"memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB {kind} are free"
    if share is None or free >= share * total:
        return Finding("ok", what)
    caches = " and drop the page caches (`sync; echo 3 > /proc/sys/vm/drop_caches`)"
    return Finding(
        "fail",
        f"{what}, the engine takes {share * total / 1e9:.1f} GB",
        f"end what uses it{caches if unified else ''}, or lower `gpu-memory-utilization` to "
        f"{max(0.0, free / total - 0.02):.2f}",
    )


def gpu_memory() -> tuple[int, int, bool]:
    """Total and free bytes of the smallest GPU, and whether they are the system's own.

    A GPU that has no memory of its own (GB10) reports none. (0, 0, False): no GPU answers.
    """
    rows = _query("memory.total,memory.free")
    sizes = [tuple(int(v) * 2**20 for v in row) for row in rows if all(v.isdigit() for v in row)]
    if sizes:
        total, free = min(sizes)
        return total, free, False
    if rows:
        memory = psutil.virtual_memory()
        return memory.total, memory.available, True
    return 0, 0, False


def _query(fields: str) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    line = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return []
    if told.returncode:
        return []
    return [[v.strip() for v in row.split(",")] for row in told.stdout.splitlines() if row.strip()]


def _disk(config: ServerConfig) -> Iterator[Finding]:
    if config.gpus == 0 or not config.model or is_cached(hub_name(config.model)):
        return
    folder = hub_cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    what = f"disk: {free / 1e9:.0f} GB are free for models in {folder}"
    if free >= CACHES:
        yield Finding("ok", what)
    else:
        mend = f"free {CACHES / 1e9:.0f} GB, or set HF_HOME to a folder on a larger disk"
        yield Finding("warn", what, mend)


def _port(config: ServerConfig) -> Iterator[Finding]:
    if config.port is None:
        return
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: the closed connections of the last one are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            yield Finding(
                "fail",
                f"port: {config.port} of {config.host} cannot be used ({error.strerror})",
                "leave `port` out of the server config, so that a free one is chosen",
            )
            return
    yield Finding("ok", f"port: {config.port} is free")
