"""The process that drives one load: `python -m pytest_llmserve.load.worker`.

It is a process of its own so that pytest's threads, its interpreter lock and its garbage
collector cannot delay a request. The job comes as one line of JSON on stdin, which is then kept
open. After the warm-up the worker says when it could start (Unix time), and is told when to, the
same for all shards of a plan. The end of stdin means that the parent is gone or wants the load to
stop, and what was recorded by then is saved as incomplete. Progress goes to stdout, one line of
JSON about four times a second; the record goes to the file that the job names. SIGINT and SIGTERM
stop the load likewise.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pytest_llmserve.errors import ConfigError, LoadError
from pytest_llmserve.load import assemble, plan
from pytest_llmserve.load.client import Client, Exchange
from pytest_llmserve.load.drivers import Closed, Open, Shard, Warmup
from pytest_llmserve.load.priority import core_for_drivers, keep_off, scheduled_soon
from pytest_llmserve.load.record import Record, RecordInfo
from pytest_llmserve.load.requests import Requests
from pytest_llmserve.load.tokens import Prompts
from pytest_llmserve.poller import tighten_timers

#: Raised with every change of the client that can move a measured value.
CLIENT_VERSION = "3"

_TICK = 0.25
_HEAD_START = 0.1  # from the end of the warm-up to the start of the plan


class Worker:
    """One load, from the job to the saved record."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._plan = plan.plan_from_dict(job["plan"])
        target = plan.Target(**job["target"])
        prompts = Prompts.from_dict(job["prompts"])
        self._requests = Requests(target, self._plan, prompts)
        self._shard = Shard(*job["shard"])
        self._start: float | None = None
        self._driver: Warmup | Closed | Open | None = None
        self._phase = "warm-up"
        self._phase_start = time.monotonic()
        self._phase_end: float | None = None
        self._client = Client(
            target.url,
            timeout=self._plan.timeout,
            stream=self._plan.workload.stream,
            prepare=self._prepare,
            on_end=self._ended,
        )

    def _prepare(self, exchange: Exchange) -> None:
        exchange.request, exchange.want_prompt, exchange.want_output = self._requests.make(
            exchange.phase, exchange.user, exchange.number
        )

    def _ended(self, exchange: Exchange) -> None:
        if self._driver is not None and not self._client.stopped:
            self._driver.ended(exchange)

    def run(self) -> Record:
        """Drive the load and give what was recorded."""
        client = self._client
        self._listen()
        self._tick()
        gc.collect()
        gc.freeze()
        gc.disable()
        tighten_timers()
        with scheduled_soon():
            self._warm_up()
            start, cpu, spun = self._load()
        incomplete = client.stopped
        client.stopped = True  # nobody sends any more
        client.cancel()
        client.clock.sample()
        self._enter("evaluation", None)
        decode_cpu = time.process_time()
        client.decode()
        columns = assemble.arrays(client.exchanges, client.clock)
        decode_cpu = time.process_time() - decode_cpu
        client.close()
        ramp_end = start + self._plan.lead
        info = RecordInfo(
            start=start,
            ramp_end=ramp_end,
            plan_end=ramp_end + self._plan.duration,
            wall_offset=client.clock.wall_offset,
            timestamps=assemble.timestamps(columns["event_lag"]),
            token_source=assemble.token_source(columns),
            cpu=cpu,
            stalls=client.stalls,
            incomplete=incomplete,
            version=CLIENT_VERSION,
            decode_cpu=decode_cpu,
            spun=spun,
        )
        return Record(info=info, **columns)

    def _warm_up(self) -> None:
        self._driver = warmup = Warmup(self._client, self._plan, self._shard)
        warmup.begin()
        self._client.run(warmup.going)

    def _load(self) -> tuple[float, float, float]:
        """Drive the plan until all has ended or the drain is over.

        Gives its start, the CPU time, and the part of that spent waiting.
        """
        client, planned = self._client, self._plan
        say({"ready": time.time() + _HEAD_START})
        client.run(lambda: self._start is None)
        start = time.monotonic() if self._start is None else self._start
        ramp_end = start + planned.lead
        plan_end = ramp_end + planned.duration
        give_up = plan_end + planned.drain
        closed = isinstance(planned.arrivals, plan.ClosedLoop)
        self._driver = load = (Closed if closed else Open)(client, planned, self._shard, start)
        client.stalls = client.poller.spun = 0.0
        cpu = time.process_time()
        load.begin()
        self._enter("ramp", ramp_end)
        client.at(ramp_end, lambda: self._enter("load", plan_end))
        client.at(plan_end, lambda: self._enter("drain", give_up))
        client.run(load.sending)
        client.run(lambda: client.in_flight > 0 and time.monotonic() < give_up)
        return start, time.process_time() - cpu, client.poller.spun

    def _listen(self) -> None:
        """Stop on the parent's end, SIGINT and SIGTERM."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        os.set_blocking(read, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)

        def stop() -> None:
            self._client.stopped = True

        def hear() -> None:
            line = os.read(sys.stdin.fileno(), 1 << 10)
            if not line:
                stop()
            elif self._start is None:
                # Unix time is what machines have in common; the load keeps monotonic time.
                self._start = json.loads(line)["start"] - self._client.clock.wall_offset

        self._client.watch(read, stop)
        with contextlib.suppress(PermissionError):  # a plain file: it is at its end already
            self._client.watch(sys.stdin.fileno(), hear)

    def _enter(self, phase: str, end: float | None) -> None:
        self._phase, self._phase_start, self._phase_end = phase, time.monotonic(), end
        self._report()

    def _tick(self) -> None:
        self._client.clock.sample()
        self._report()
        self._client.at(time.monotonic() + _TICK, self._tick)

    def _report(self) -> None:
        now, client = time.monotonic(), self._client
        say(
            {
                "phase": self._phase,
                "elapsed": now - self._phase_start,
                "remaining": None if self._phase_end is None else max(0.0, self._phase_end - now),
                "requests": client.ended,
                "in_flight": client.in_flight,
                "tokens": client.received,
            }
        )


def say(message: dict[str, Any]) -> None:
    """Write a line to the parent; drop it if the parent does not read."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def _raise_file_limit() -> None:
    """Let as many connections be open as the system allows this user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Read the job, drive it, save the record. Status 2 and a sentence if that is impossible."""
    line = sys.stdin.buffer.readline()
    if not line:
        return 2
    job = json.loads(line)
    os.set_blocking(1, False)
    _raise_file_limit()
    core = core_for_drivers()
    if core is not None:
        keep_off(core)
    try:
        record = Worker(job).run()
        record.save(Path(job["record"]))
    except (ConfigError, LoadError) as error:
        say({"error": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
