"""Which GPUs there are, and who has them: a server keeps its own for as long as it lives.

The lock of a GPU is a file held by the server's supervisor, machine-wide. It is free again when
the whole tree has ended, and with the processes their GPU memory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_llmserve.launch.leases import lock_path


@dataclass(frozen=True)
class Gpus:
    """GPUs that are ours as long as `files` (descriptors of locked files) are open somewhere."""

    ids: tuple[str, ...]
    files: tuple[int, ...]


def visible_gpus() -> list[str]:
    """Indices ("0", "1") or UUIDs of the GPUs that CUDA programs see from here; none without."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [part.strip() for part in chosen.split(",") if part.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program:
        try:
            told = subprocess.run(
                [program, "-L"], capture_output=True, text=True, timeout=30, check=False
            ).stdout
        except subprocess.TimeoutExpired:
            told = ""
        if found := re.findall(r"^GPU (\d+):", told, re.MULTILINE):
            return found
    devices = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted((match[1] for match in devices if match), key=int)


@contextmanager
def taken(known: Sequence[str], count: int) -> Iterator[Gpus | None]:
    """The first `count` of the `known` GPUs that nobody has; None if there are not so many.

    On leaving, our descriptors are closed; the locks stay with whoever inherited them.
    """
    ids: list[str] = []
    files: list[int] = []
    try:
        for gpu in known:
            if len(ids) == count:
                break
            file = os.open(lock_path(f"gpu-{gpu}"), os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            ids.append(gpu)
            files.append(file)
        yield Gpus(tuple(ids), tuple(files)) if len(ids) == count else None
    finally:
        for file in files:
            os.close(file)
