"""What a machine has for serving and loading, whatever the server: the general part of `llmserve
doctor`. Nothing here keeps a server from being started, but for a system that cannot watch it.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator

import psutil
from filelock import Timeout

from pytest_llmserve.engines import MODULES, get_engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch import container
from pytest_llmserve.launch.cuda import driver_cuda
from pytest_llmserve.launch.gpus import visible_gpus
from pytest_llmserve.launch.leases import lease
from pytest_llmserve.launch.preflight import Finding, disk_finding, gpu_memory, gpu_rows, hub_cache


def machine() -> list[Finding]:
    """All general findings. Nothing is started or changed."""
    return [
        *_system(),
        _cores(),
        _memory(),
        _gpus(),
        disk_finding(hub_cache()),
        _containers(),
        _engines(),
        _other_runs(),
    ]


def _system() -> Iterator[Finding]:
    named = f"system: {platform.system()} {platform.release()}, Python {platform.python_version()}"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        yield Finding(
            "fail",
            f"{named}, which cannot watch processes ({error})",
            "start servers on Linux 5.3 or newer; from here, attach to one that runs "
            "(--llmserve-endpoint)",
        )
    else:
        yield Finding("ok", named)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if count and count >= 2:
        return Finding("ok", f"cores: {count}")
    return Finding(
        "warn",
        "cores: one, for server and client",
        "the client will be late and runs invalid: give it a second one, or load from another "
        "machine",
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding(
        "ok", f"memory: {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB are free"
    )


def _gpus() -> Finding:
    known = visible_gpus()
    if not known:
        return Finding(
            "warn",
            "gpus: none is visible",
            "if there should be one, check `nvidia-smi` and CUDA_VISIBLE_DEVICES; without one, "
            "`auto` runs the emulated engine and says EMULATED",
        )
    names = sorted({row[0] for row in gpu_rows("name")})
    driver = "".join(row[0] for row in gpu_rows("driver_version")[:1])
    cuda = driver_cuda()
    total, free, unified = gpu_memory()
    facts = [
        ", ".join(names),
        f"driver {driver}" if driver else "",
        f"CUDA up to {cuda[0]}.{cuda[1]}" if cuda else "",
        f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free" if total else "",
        "memory shared with the CPU" if unified else "",
    ]
    return Finding("ok", f"gpus: {len(known)} visible ({'; '.join(filter(None, facts))})")


def _containers() -> Finding:
    works, broken = [], []
    for name in container.RUNTIMES:
        try:
            works.append(container.find_runtime(name))
        except ServerError as error:
            broken.append(str(error))
    if works:
        return Finding("ok", f"containers: {', '.join(works)}")
    installed = [name for name in container.RUNTIMES if shutil.which(name)]
    if not installed:
        return Finding(
            "warn",
            f"containers: neither {' nor '.join(container.RUNTIMES)} is installed",
            "install one for server configs with a container runner",
        )
    return Finding("warn", f"containers: {' and '.join(installed)} cannot be used", broken[0])


def _engines() -> Finding:
    programs = {name: get_engine(name).program for name in MODULES}
    here = {n: path for n, p in programs.items() if p and (path := shutil.which(p))}
    if here:
        shown = ", ".join(f"{name} ({path})" for name, path in here.items())
        return Finding("ok", f"engines on PATH: {shown}")
    return Finding("ok", "engines on PATH: none (server configs may name others)")


def _other_runs() -> Finding:
    lock = lease("load")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return Finding(
            "warn",
            "load: another test run uses servers on this machine now",
            "tests wait for its end before they load a server",
        )
    except (OSError, ServerError) as error:
        return Finding("fail", "load: its machine-wide lock cannot be used", str(error).rstrip("."))
    lock.release()
    return Finding("ok", "load: no other test run uses servers on this machine")
