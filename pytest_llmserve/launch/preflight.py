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
from pytest_llmserve.launch.cuda import driver_cuda, engine_cuda
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
        *_key(config, engine),
        *_model(config, engine),
        *_gpu(config),
        *_cuda(config, engine),
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
            runtime = container.find_runtime(config.runner.runtime)
            yield Finding("ok", f"containers: {runtime}")
            yield _image(runtime, config.runner.image)
        else:
            words = process.program_words(config, engine)
            yield Finding("ok", f"program: {' '.join(words)}")
    except ServerError as error:
        yield Finding("fail", str(error).rstrip("."))


def _image(runtime: str, image: str) -> Finding:
    if container.image_variables(runtime, image) is not None:
        return Finding("ok", f"image: {image} is here")
    return Finding(
        "warn",
        f"image: {image} is not here",
        "it is pulled at the first start, which takes minutes; pull it before "
        f"(`{Path(runtime).name} pull {image}`), or raise ready_timeout",
    )


def _key(config: ServerConfig, engine: Engine) -> Iterator[Finding]:
    if value_of(config.args, "api-key") is not None:
        yield Finding(
            "fail",
            "args: api-key would be on a command line, where every user can read it",
            "take it out: where the engine reads a key from its environment one is made up, or "
            "taken from the variable that api_key_env names",
        )
    if config.api_key_env and "key" in engine.notes:
        yield Finding("fail", f"api_key_env: {engine.notes['key']}", "take it out")


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
    rows = gpu_rows("name,driver_version")
    named = f" ({', '.join(rows[0])})" if rows else ""
    yield Finding("ok", f"gpus: {len(known)} visible, {config.gpus} needed{named}")


def _cuda(config: ServerConfig, engine: Engine) -> Iterator[Finding]:
    driver = driver_cuda() if config.gpus else None
    if driver is None:
        return
    runs = f"the driver runs CUDA up to {driver[0]}.{driver[1]}"
    built = engine_cuda(config, engine)
    if built is None:
        yield Finding("ok", f"cuda: {runs}; what the engine was built with cannot be told")
        return
    what = f"cuda: {runs}, the engine was built with {built[0]}.{built[1]}"
    if built <= driver:
        yield Finding("ok", what)
    elif built[0] == driver[0]:
        yield Finding("warn", what, "update the driver if kernels do not load")
    elif isinstance(config.runner, ContainerRunner):
        # Images may hold libraries for newer programs on older drivers; not all GPUs take them.
        yield Finding("warn", what, "update the driver if the engine finds no GPU")
    else:
        mend = f"update the driver, or install a build of the engine for CUDA {driver[0]}"
        yield Finding("fail", what, mend)


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
    rows = gpu_rows("memory.total,memory.free")
    sizes = [tuple(int(v) * 2**20 for v in row) for row in rows if all(v.isdigit() for v in row)]
    if sizes:
        total, free = min(sizes)
        return total, free, False
    if rows:
        memory = psutil.virtual_memory()
        return memory.total, memory.available, True
    return 0, 0, False


def gpu_rows(fields: str) -> list[list[str]]:
    """What nvidia-smi says about these fields (`name,driver_version`), a row each GPU."""
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
    if config.gpus and config.model and not is_cached(hub_name(config.model)):
        yield disk_finding(hub_cache())


def disk_finding(folder: Path) -> Finding:
    """Whether the disk of a folder, which need not exist yet, has room for models."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    what = f"disk: {free / 1e9:.0f} GB are free for models in {folder}"
    if free >= CACHES:
        return Finding("ok", what)
    mend = f"free {CACHES / 1e9:.0f} GB, or set HF_HOME to a folder on a larger disk"
    return Finding("warn", what, mend)


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
