"""A free port, and who listens on it."""

from __future__ import annotations

import socket

import psutil


def free_port(host: str) -> int:
    """A port of `host` that nobody uses now. Another program may take it before the server does:
    whoever starts one has to try again then."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def listens(root: int, port: int) -> bool:
    """Whether a process of the tree below (and with) `root` listens on `port`.

    True, too, where the system does not let us look: then nothing speaks against it.
    """
    try:
        top = psutil.Process(root)
        tree = [top, *top.children(recursive=True)]
    except psutil.Error:
        return False
    for process in tree:
        try:
            connections = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        except psutil.Error:
            return True
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return True
    return False
