"""What the tests of the launcher share: an engine for the fake server, and a look at processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_llmserve.engines import Engine, Failure
from pytest_llmserve.engines.options import option_words
from pytest_llmserve.servers import ProcessRunner, ServerConfig

FAKE = Path(__file__).with_name("fake_server.py")


def fake_engine(**changes: Any) -> Engine:
    """An engine whose program is tests/fake_server.py; the config's args are its options."""
    settings: dict[str, Any] = {
        "name": "fake",
        "program": sys.executable,
        "module": "",
        "command": lambda config, port: [
            str(FAKE),
            "--port",
            str(port),
            *option_words(config.args, repeated=("say",)),
        ],
        "environment": lambda config: {"FAKE_SETTING": "from the engine"},
        "health": "/health",
        "stages": ((r"Loading weights: (\d+)%", "loading weights, {0} %"), (r"opening", "opening")),
        "failures": (
            Failure(r"unrecognized arguments: (?P<what>.*)", "no argument {what}", "correct it"),
            Failure(r"no memory for (?P<what>\w+)", "no memory for {what}", "buy more"),
        ),
        "body": {},
        "token_prompts": False,
        "counters": {},
        "version": lambda fetch: fetch("/version")["version"],
        "effective": lambda fetch: {"served": fetch("/v1/models")["data"][0]["id"]},
        "needs_gpu": False,
        "api_key": "FAKE_API_KEY",
    }
    return Engine(**settings | changes)


def fake_config(pids: Path, **changes: Any) -> ServerConfig:
    """A config for `fake_engine`; keyword `args` are options of the fake server."""
    args = {"pids": str(pids), **changes.pop("args", {})}
    settings: dict[str, Any] = {
        "name": "fake",
        "engine": "fake",
        "model": "tiny",
        "args": args,
        "runner": ProcessRunner(executable=sys.executable),
        "gpus": 0,
        "ready_timeout": 20.0,
        "stop_timeout": 0.3,  # its workers ignore SIGTERM and use all of it
    }
    return ServerConfig(**settings | changes)


def pids_in(path: Path) -> set[int]:
    return {int(line) for line in path.read_text().split()} if path.exists() else set()


def living(pids: set[int]) -> set[int]:
    """Those that run; a zombie has ended."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            if stat[stat.rindex(")") + 2] != "Z":
                found.add(pid)
    return found


def soon(condition: Callable[[], bool], within: float = 5.0) -> bool:
    """Whether the condition comes true within so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def kill_all(pids: set[int]) -> None:
    """So that a test that fails leaves nothing behind either."""
    for pid in living(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def cleaned(pids: Path) -> Iterator[Path]:
    yield pids
    kill_all(pids_in(pids))
