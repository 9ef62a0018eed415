"""The last net under the supervisor: processes found by the marker in their environment."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

#: Every process of a server's tree has this variable; its value tells the servers apart.
MARKER = "LLMSERVE_SERVER_ID"


def marked(server_id: str) -> list[int]:
    """Ids of the living processes whose environment says that they belong to this server."""
    wanted = f"{MARKER}={server_id}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def sweep(server_id: str, timeout: float = 5.0) -> list[int]:
    """SIGKILL all processes of this server until none is left; ids of those that stay."""
    deadline = time.monotonic() + timeout
    while (left := marked(server_id)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return left
