"""How wrong is this client on this machine? Measured against a server whose times are known.

The emulator's exact schedule sends each token at a planned time and logs when it really left.
The client's own figures are compared with that log: what differs is the error of the client
(and of the path between two processes of one machine), whatever the server did.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pytest_llmserve
from pytest_llmserve.emulator.truth import read_truth
from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop
from pytest_llmserve.load.worker import CLIENT_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_llmserve.load.record import Array, Record

#: The schedule the client is measured against: short, but with the gaps of a fast server.
TTFT, TPOT = 0.05, 0.01
USERS, TOKENS, DURATION = 8, 40, 0.5

MODEL = "calibration"

_START = 20.0
_IDS = tuple(range(1000, 1200))


@dataclass(frozen=True)
class Calibration:
    """The client's own error on this machine: seconds, percentiles by name (`p50`, `p99`).

    `ttft_error`: reported − true, from the request's arrival at the server to the first token's
    departure; `itl_error`: its size for each gap; `pacing_error`: sent − intended. `cpu_per_event`
    is the client's CPU time, decoding included, for each token at this low rate, where every
    token wakes it up; `timestamps` as in the record; `events` how many were compared.
    """

    ttft_error: dict[str, float]
    itl_error: dict[str, float]
    pacing_error: dict[str, float]
    cpu_per_event: float
    timestamps: str
    events: int

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


@dataclass(frozen=True)
class Errors:
    """Errors of a client against a truth log, in seconds: one `ttft` a request, one `itl` a gap.

    `unmatched` requests of the record are not in the log.
    """

    ttft: Array
    itl: Array
    unmatched: int


def compare(first: Array, ttft: Array, gaps: list[Array], log: Path) -> Errors:
    """Errors of what a client reports, against the emulator's truth log.

    Of each request `first` is the arrival of its first token on `time.monotonic()`, `ttft` its
    reported TTFT, `gaps` those between its tokens (empty: not reported). The server is one
    thread, so first tokens left one after another: a request of the client is the one of the log
    whose first token left last before it arrived.
    """
    arrivals: dict[str, float] = {}
    left: dict[str, list[float]] = {}
    for event in read_truth(log):
        if event.token == 0:
            arrivals[event.request] = event.due
        else:
            left.setdefault(event.request, []).append(event.before)
    names = sorted(left, key=lambda name: left[name][0])
    starts = np.array([left[name][0] for name in names])
    # The stamp is taken inside `send`, so after `before`; 2 µs allow for the two clocks.
    place = np.searchsorted(starts, first + 2e-6) - 1
    ttft_errors, itl_errors = [], []
    for i, reported, between in zip(place, ttft, gaps, strict=True):
        if i < 0:
            continue
        true = np.array(left[names[i]])
        ttft_errors.append(reported - (true[0] - arrivals[names[i]]))
        if len(between) == len(true) - 1:
            itl_errors.append(between - np.diff(true))
    return Errors(
        np.array(ttft_errors),
        np.concatenate(itl_errors) if itl_errors else np.empty(0),
        int((place < 0).sum()),
    )


def errors(record: Record, log: Path) -> Errors:
    """Errors of a record's planned requests that ended well."""
    rows = np.flatnonzero((record.phase == 1) & (record.error == 0))
    ends = np.cumsum(record.events)
    gaps = [np.diff(record.event_time[ends[i] - record.events[i] : ends[i]]) for i in rows]
    return compare(record.first[rows], (record.first - record.intended)[rows], gaps, log)


@contextlib.contextmanager
def exact_server(log: Path, *flags: str) -> Iterator[str]:
    """The URL of an emulator that logs its true times to `log`, for as long as the context.

    Raises LoadError if it cannot be started.
    """
    package = str(Path(pytest_llmserve.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest_llmserve.emulator", "--host", "127.0.0.1"),
            *("--port", "0", "--load-time", "0", "--served-model-name", MODEL),
            *("--truth-log", str(log), *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    with contextlib.suppress(OSError, AttributeError):
        # What disturbs the server must not be taken for an error of the client.
        os.sched_setscheduler(process.pid, os.SCHED_RR, os.sched_param(2))
    lines: list[str] = []
    ready = threading.Event()

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if "Ready" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        heard = ready.wait(_START)
        listening = [line for line in lines if "Listening on" in line]
        if not heard or not listening or process.poll() is not None:
            said = lines[-1] if lines else "it said nothing"
            raise LoadError(f"the emulator for the client's calibration did not start: {said}")
        yield f"http://127.0.0.1:{int(listening[0].rsplit(':', 1)[1])}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(1)
        assert process.stdout is not None
        process.stdout.close()


def calibrate(cache_dir: Path | None = None) -> Calibration:
    """The client's error on this machine, measured once and then read from `cache_dir`.

    The cache is valid for one machine, interpreter and client version. Raises LoadError if the
    measurement failed.
    """
    cached = None if cache_dir is None else cache_dir / f"client-{_key()}.json"
    if cached is not None:
        try:
            return Calibration(**json.loads(cached.read_text()))
        except (OSError, ValueError, TypeError):
            pass  # none yet, or not one of ours: measured anew
    found = _measure()
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found.as_dict(), indent=1))
        part.replace(cached)
    return found


def _measure() -> Calibration:
    plan = LoadPlan(
        closed_loop(USERS, ramp=TPOT), Workload(16, TOKENS), duration=DURATION, warmup=USERS
    )
    with tempfile.TemporaryDirectory(prefix="llmserve-calibration-") as folder:
        log = Path(folder, "truth.csv")
        times = ("--schedule", "exact", "--ttft", str(TTFT), "--tpot", str(TPOT))
        with exact_server(log, *times) as url:
            body = {"ignore_eos": True}
            record = drive(Target(url, MODEL, {}, body, _IDS), plan)
        found = errors(record, log)
    if not len(found.ttft) or not len(found.itl):
        raise LoadError("the client's calibration failed: the emulator answered no request")
    planned = record.phase == 1
    return Calibration(
        ttft_error=_percentiles(found.ttft),
        itl_error=_percentiles(np.abs(found.itl)),
        pacing_error=_percentiles((record.sent - record.intended)[planned]),
        cpu_per_event=(record.info.cpu + record.info.decode_cpu)
        / max(1, int(record.events[planned].sum())),
        timestamps=record.info.timestamps,
        events=len(found.ttft) + len(found.itl),
    )


def _percentiles(values: Array) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in (("p50", 50), ("p99", 99))}


def _key() -> str:
    facts = [
        CLIENT_VERSION,
        platform.node(),
        platform.release(),
        platform.machine(),
        platform.python_version(),
        sys.executable,
        str(os.cpu_count()),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
