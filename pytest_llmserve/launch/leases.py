"""Machine-wide locks, so that loads do not overlap: not those of two tests, of two xdist workers,
nor of two separate pytest runs.

The kernel holds them (flock(2)) and lets go of them when the process ends, however it ends, so
none is ever stale.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from filelock import BaseFileLock, FileLock

from pytest_llmserve.errors import ServerError


def lease(resource: str) -> BaseFileLock:
    """The lock of a resource of this machine ("load", "gpu-0"), not taken yet.

    Use it as a context manager. It holds against other processes; the one that has it may enter
    it again, from any thread. Raises ServerError if the folder of locks cannot be made.
    """
    # One process may ask for the same lease in several places: that must be one lock, or the
    # second would wait for the first for ever. Other users of the machine must be able to open it.
    return FileLock(lock_path(resource), mode=0o666, is_singleton=True, thread_local=False)


def lock_path(resource: str) -> Path:
    """The file whose lock is the lease of a resource."""
    return _folder() / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', resource)}.lock"


def _folder() -> Path:
    """A folder that all users of the machine share."""
    folder = Path(tempfile.gettempdir()) / "llmserve-locks"
    try:
        folder.mkdir(exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o1777)
    except OSError as error:
        raise ServerError(
            f"{folder}: the folder of machine-wide locks cannot be made ({error.strerror}); "
            "set TMPDIR to a folder that can be written."
        ) from None
    return folder
