"""Is the driver new enough for the CUDA that an engine was built with?

A driver runs programs of its own CUDA generation and of older ones (NVIDIA's CUDA compatibility
guide); within one generation newer programs run too, but for kernels that are compiled when they
are loaded.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from pytest_llmserve.engines import Engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch import container, process
from pytest_llmserve.servers import ContainerRunner, ServerConfig

#: Major and minor version of CUDA.
Version = tuple[int, int]

# Reads what PyTorch was built with from its file: importing it would take seconds.
_ASK_TORCH = """
import importlib.util, pathlib
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    print(pathlib.Path(spec.origin).with_name("version.py").read_text())
"""


def driver_cuda() -> Version | None:
    """The newest CUDA that the NVIDIA driver runs, as nvidia-smi says; None if none tells."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    # Older ones do not know --version, and have it in the head of their table only.
    for line in ([program, "--version"], [program]):
        if found := re.search(r"CUDA Version\s*:\s*(\d+)\.(\d+)", _output(line)):
            return int(found[1]), int(found[2])
    return None


def engine_cuda(config: ServerConfig, engine: Engine) -> Version | None:
    """The CUDA that the engine of this config was built with; None if that cannot be told.

    Of a Python engine: that of its PyTorch. Of a container: its variable CUDA_VERSION, which
    NVIDIA's images have, if the image is here.
    """
    if isinstance(config.runner, ContainerRunner):
        try:
            runtime = container.find_runtime(config.runner.runtime)
        except ServerError:
            return None
        variables = container.image_variables(runtime, config.runner.image) or {}
        found = re.match(r"(\d+)\.(\d+)", variables.get("CUDA_VERSION", ""))
    else:
        python = _python_of(config, engine)
        told = _output([python, "-c", _ASK_TORCH]) if python else ""
        found = re.search(r"^cuda\b.*=\s*['\"](\d+)\.(\d+)", told, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def _python_of(config: ServerConfig, engine: Engine) -> str | None:
    """The interpreter of a Python engine: the program itself, or the one its script names."""
    try:
        program, *rest = process.program_words(config, engine)
    except ServerError:
        return None
    if rest:  # an interpreter and -m
        return program
    try:
        with Path(program).open("rb") as file:
            head = file.readline(512).decode("utf-8", "replace").strip()
    except OSError:
        return None
    words = head.removeprefix("#!").split()
    python = words[0] if head.startswith("#!") and len(words) == 1 else ""
    return python if "python" in Path(python).name and Path(python).exists() else None


def _output(line: list[str]) -> str:
    try:
        told = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout
