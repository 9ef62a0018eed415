"""Drive a load from pytest: start the worker process, follow it, read its record."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest_llmserve
from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.plan import plan_to_dict
from pytest_llmserve.load.record import Record
from pytest_llmserve.load.tokens import Prompts, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmserve.load.plan import LoadPlan, Target

#: So long a worker that was told to stop may take to save its record.
_STOP_TIME = 30.0
_LOOK = 0.25


@dataclass(frozen=True)
class Progress:
    """Where a load is. Times are seconds within `phase`; `remaining` is None if nobody knows.

    `requests` have ended and `in_flight` have not; `tokens` counts the pieces in which answers
    came so far, which is about the tokens: the exact number is known only after the load.
    """

    phase: Literal["warm-up", "ramp", "load", "drain", "evaluation"]
    elapsed: float
    remaining: float | None
    requests: int
    in_flight: int
    tokens: int


def drive(
    target: Target,
    plan: LoadPlan,
    *,
    progress: Callable[[Progress], None] | None = None,
    record_path: Path | None = None,
    alive: Callable[[], bool] | None = None,
    prompts: Prompts | None = None,
) -> Record:
    """Drive `plan` against `target` and give the record, also saved at `record_path` if given.

    `progress` is called about four times a second. When `alive` (is the server still there?)
    turns false, the load is stopped and its record is marked incomplete, as it is when the
    worker is interrupted. `prompts` comes from `tokens.prepare`, which is called if it is None.

    Raises LoadError if the load cannot be driven at all.
    """
    prompts = prepare(target, plan.workload) if prompts is None else prompts
    with tempfile.TemporaryDirectory(prefix="llmserve-load-") as folder:
        path = Path(folder, "record.npz") if record_path is None else record_path.absolute()
        job = {
            "plan": plan_to_dict(plan),
            "target": {
                "url": target.url,
                "model": target.model,
                "headers": dict(target.headers),
                "body": dict(target.body),
            },
            "prompts": asdict(prompts),
            "record": str(path),
        }
        with Path(folder, "stderr").open("wb+") as errors:
            worker = _Worker(job, errors.fileno())
            try:
                worker.follow(progress, alive)
            finally:
                status = worker.end()
            if status or worker.error:
                errors.seek(0)
                raise LoadError(worker.error or _last_line(errors.read(), status))
        return Record.load(path)


class _Worker:
    """The worker process."""

    def __init__(self, job: dict[str, Any], errors: int) -> None:
        package = str(Path(pytest_llmserve.__file__).parents[1])
        paths = [package, os.environ.get("PYTHONPATH", "")]
        self.error: str | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest_llmserve.load.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone: its status and its stderr say why

    def follow(
        self, progress: Callable[[Progress], None] | None, alive: Callable[[], bool] | None
    ) -> None:
        """Pass its progress on until it closes stdout, or stop it."""
        assert self._process.stdout is not None
        out, rest = self._process.stdout.fileno(), b""
        next_look = time.monotonic() + _LOOK
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            while True:
                if selector.select(_LOOK):
                    data = os.read(out, 1 << 16)
                    if not data:
                        return
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._hear(json.loads(line), progress)
                if alive is not None and time.monotonic() >= next_look:
                    if not alive():
                        self._hang_up()
                        alive = None
                    next_look = time.monotonic() + _LOOK

    def _hear(self, message: dict[str, Any], progress: Callable[[Progress], None] | None) -> None:
        if "error" in message:
            self.error = message["error"]
        elif progress is not None:
            progress(Progress(**message))

    def _hang_up(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def end(self) -> int:
        """Its exit status; it is told to save and stop if it has not ended."""
        self._hang_up()
        try:
            status = self._process.wait(_STOP_TIME)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status


def _last_line(errors: bytes, status: int) -> str:
    lines = errors.decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"the load client ended with status {status} and left no record: {said}"
