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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest_llmserve
from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.merge import merge
from pytest_llmserve.load.plan import ClosedLoop, plan_to_dict
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
    shards: int = 1,
) -> Record:
    """Drive `plan` against `target` and give the record, also saved at `record_path` if given.

    `progress` is called about four times a second. When `alive` (is the server still there?)
    turns false, the load is stopped and its record is marked incomplete, as it is when the
    worker is interrupted. `prompts` comes from `tokens.prepare`, which is called if it is None.
    With several `shards` as many processes share the users or arrivals of the plan; one is
    enough for a thousand users.

    Raises LoadError if the load cannot be driven at all.
    """
    prompts = prepare(target, plan.workload) if prompts is None else prompts
    if isinstance(plan.arrivals, ClosedLoop):
        shards = min(shards, plan.arrivals.users)
    with tempfile.TemporaryDirectory(prefix="llmserve-load-") as folder:
        paths = [Path(folder, f"{number}.npz") for number in range(shards)]
        if record_path is not None and shards == 1:
            paths = [record_path.absolute()]
        jobs = [
            {
                "plan": plan_to_dict(plan),
                "target": {
                    "url": target.url,
                    "model": target.model,
                    "headers": dict(target.headers),
                    "body": dict(target.body),
                },
                "prompts": prompts.as_dict(),
                "shard": [number, shards],
                "record": str(path),
            }
            for number, path in enumerate(paths)
        ]
        with Workers(jobs, Path(folder)) as workers:
            workers.follow(progress, alive)
        workers.check()
        merged = merge([Record.load(path) for path in paths])
    if record_path is not None and shards > 1:
        merged.save(record_path)
    return merged


class Workers:
    """The worker processes of one load, all ended when the context is left."""

    def __init__(self, jobs: list[dict[str, Any]], folder: Path) -> None:
        self._all: list[_Worker] = []
        try:
            for number, job in enumerate(jobs):
                self._all.append(_Worker(job, folder / f"{number}.stderr"))
        except OSError as error:
            self.__exit__()
            raise LoadError(f"the load client cannot be started: {error}") from None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.hang_up()
        for worker in self._all:
            worker.end()

    def follow(
        self, progress: Callable[[Progress], None] | None, alive: Callable[[], bool] | None
    ) -> None:
        """Start all when all are ready, pass their progress on, until they have ended."""
        next_look = time.monotonic() + _LOOK
        with selectors.DefaultSelector() as selector:
            for worker in self._all:
                selector.register(worker.out, selectors.EVENT_READ, worker)
            while selector.get_map():
                for key, _ in selector.select(_LOOK):
                    worker = key.data
                    if not worker.read():
                        selector.unregister(worker.out)
                        if worker.process.wait(_STOP_TIME):
                            self._hang_up()  # without one of them the plan is not driven
                self._start()
                self._tell(progress)
                if alive is not None and time.monotonic() >= next_look:
                    if not alive():
                        self._hang_up()
                        alive = None
                    next_look = time.monotonic() + _LOOK

    def _start(self) -> None:
        ready = [worker.ready for worker in self._all if worker.ready is not None]
        if len(ready) == len(self._all):
            for worker in self._all:
                worker.start(max(ready))

    def _tell(self, progress: Callable[[Progress], None] | None) -> None:
        """Sums over all workers as they last said, once for each time the first says something."""
        if not self._all[0].news:
            return
        self._all[0].news = False
        heard = [worker.heard for worker in self._all if worker.heard is not None]
        if progress is not None and heard:
            sums = {
                name: sum(getattr(one, name) for one in heard)
                for name in ("requests", "in_flight", "tokens")
            }
            progress(replace(heard[0], **sums))

    def _hang_up(self) -> None:
        for worker in self._all:
            worker.hang_up()

    def check(self) -> None:
        """Raise LoadError, one sentence, if one of them failed."""
        for worker in self._all:
            failure = worker.failure()
            if failure is not None:
                raise LoadError(failure)


class _Worker:
    """One worker process."""

    def __init__(self, job: dict[str, Any], errors: Path) -> None:
        package = str(Path(pytest_llmserve.__file__).parents[1])
        paths = [package, os.environ.get("PYTHONPATH", "")]
        self.ready: float | None = None
        self.heard: Progress | None = None
        self.news = False
        self._error: str | None = None
        self._errors = errors
        self._rest = b""
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest_llmserve.load.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
        assert self.process.stdout is not None
        self.out = self.process.stdout.fileno()
        self._write(job)

    def _write(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        # If it is gone, its status and its stderr say why.
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def start(self, when: float) -> None:
        """Let it begin the plan at a Unix time."""
        self.ready = None
        self._write({"start": when})

    def read(self) -> bool:
        """Take in what it says; False when it has closed its stdout."""
        data = os.read(self.out, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                self._error = message["error"]
            elif "ready" in message:
                self.ready = message["ready"]
            else:
                self.heard, self.news = Progress(**message), True
        return bool(data)

    def hang_up(self) -> None:
        """Tell it to save what there is and stop."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def end(self) -> None:
        """Wait until it has ended; kill it if it does not."""
        try:
            self.process.wait(_STOP_TIME)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def failure(self) -> str | None:
        """Why it left no record, in one sentence; None if it left one."""
        status = self.process.returncode
        if self._error is not None:
            return self._error
        if not status:
            return None
        lines = self._errors.read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"the load client ended with status {status} and left no record: {said}"
