"""How wrong is this client on this machine? Measured against a server whose times are known.

The emulator's exact schedule sends each token at a planned time and logs when it really left.
The client's own figures are compared with that log: what differs is the error of the client
(and of the path between two processes of one machine), whatever the server did. How many events a
second it can record is measured on sockets of its own.

Measured before the first load of a pytest run, in under two seconds, and kept in the user's cache
folder for machine and versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

import pytest_llmserve
from pytest_llmserve.emulator.truth import read_truth
from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.client import Client, Exchange
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop
from pytest_llmserve.load.worker import CLIENT_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_llmserve.load.record import Array, Record

#: The schedule the client is measured against: short, but with the gaps of a fast server.
TTFT, TPOT = 0.02, 0.004
USERS, TOKENS, DURATION = 8, 25, 0.4
#: How many streams bring an event each, and how often, to see how fast they can be recorded.
STREAMS, ROUNDS = 64, 30

MODEL = "calibration"

#: Errors (p99 of TTFT and ITL) beyond these are the machine's mood more than the client: measured
#: a second time, and not kept for the next run.
POOR_TTFT, POOR_ITL = 1e-3, 0.2e-3

_START = 20.0
_SEND = 0.2e-3  # a server that took longer to send does not know when it was sent
_IDS = tuple(range(1000, 1200))


@dataclass(frozen=True)
class Calibration:
    """The client's own error on this machine: seconds, percentiles by name (`p50`, `p99`).

    `ttft_error`: reported − true, from the request's arrival at the server to the first token's
    departure; `itl_error`: its size for each gap; `pacing_error`: sent − intended. `cpu_per_event`
    is the client's CPU time, decoding included, for each token at this low rate, where every
    token wakes it up; `events_limit` the events it can record in a second of CPU time when many
    streams bring one each; `timestamps` as in the record; `events` how many were compared.
    """

    ttft_error: dict[str, float]
    itl_error: dict[str, float]
    pacing_error: dict[str, float]
    cpu_per_event: float
    events_limit: float
    timestamps: str
    events: int

    @property
    def poor(self) -> bool:
        """Whether something disturbed the measurement."""
        return self.ttft_error["p99"] > POOR_TTFT or self.itl_error["p99"] > POOR_ITL

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


@dataclass(frozen=True)
class Errors:
    """Errors of a client against a truth log, in seconds: one `ttft` a request, one `itl` a gap.

    `unmatched` requests of the record are not in the log; times that the server does not know,
    because it was interrupted while it sent, are left out.
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
    unknown: dict[str, list[bool]] = {}
    for event in read_truth(log):
        if event.token == 0:
            arrivals[event.request] = event.due
        else:
            left.setdefault(event.request, []).append(event.before)
            unknown.setdefault(event.request, []).append(event.after - event.before > _SEND)
    names = sorted(left, key=lambda name: left[name][0])
    starts = np.array([left[name][0] for name in names])
    # The stamp is taken inside `send`, so after `before`; 2 µs allow for the two clocks.
    place = np.searchsorted(starts, first + 2e-6) - 1
    ttft_errors, itl_errors = [], []
    for i, reported, between in zip(place, ttft, gaps, strict=True):
        if i < 0:
            continue
        true, unsure = np.array(left[names[i]]), np.array(unknown[names[i]])
        if not unsure[0]:
            ttft_errors.append(reported - (true[0] - arrivals[names[i]]))
        if len(between) == len(true) - 1:
            itl_errors.append((between - np.diff(true))[~(unsure[1:] | unsure[:-1])])
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

    The file in the cache says for what machine, interpreter and versions it holds. Raises
    LoadError if the measurement failed.
    """
    facts = _facts()
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    cached = None if cache_dir is None else cache_dir / f"client-{digest}.json"
    if cached is not None:
        try:
            return Calibration(**json.loads(cached.read_text())["calibration"])
        except (OSError, ValueError, TypeError, KeyError):
            pass  # none yet, or not one of ours: measured anew
    found = _measure()
    if found.poor:
        found = min(found, _measure(), key=lambda one: one.ttft_error["p99"])
    if cached is not None and not found.poor:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        content = {"holds_for": facts, "measured": when, "calibration": found.as_dict()}
        with contextlib.suppress(OSError):  # without a cache it is measured in each run
            cached.parent.mkdir(parents=True, exist_ok=True)
            part = cached.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(content, indent=1) + "\n")
            part.replace(cached)
    return found


def user_cache() -> Path:
    """The folder in which calibrations of this user are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path("~/.cache").expanduser()) / "pytest-llmserve"


def for_run(run_dir: Path) -> Calibration | None:
    """The calibration of a pytest run, whose processes share `run_dir`: the first one makes it.

    None if it failed; `of_run` tells why.
    """
    with FileLock(run_dir / "calibration.lock"):
        path = run_dir / "calibration.json"
        if not path.exists():
            content: dict[str, Any]
            try:
                content = {"calibration": calibrate(user_cache()).as_dict()}
            except LoadError as error:
                content = {"calibration": None, "failed": str(error)}
            path.write_text(json.dumps(content))
    found = of_run(run_dir)
    return found if isinstance(found, Calibration) else None


def of_run(run_dir: Path) -> Calibration | str | None:
    """What `for_run` found; the reason if it failed; None if no load of the run asked for it."""
    try:
        content = json.loads((run_dir / "calibration.json").read_text())
    except OSError:
        return None
    if content["calibration"] is None:
        return str(content["failed"])
    return Calibration(**content["calibration"])


def in_words(found: Calibration | str) -> str:
    """One line for people."""
    if isinstance(found, str):
        return f"client error: not measured on this machine: {found}"

    def p99(errors: dict[str, float]) -> str:
        return f"p99 {errors['p99'] * 1e3:.3f} ms"

    return (
        f"client error: TTFT {p99(found.ttft_error)}, ITL {p99(found.itl_error)} on this machine "
        "(measured against exact times)"
    )


def as_text(found: Calibration) -> str:
    """All of it for people (`llmserve calibrate --client`)."""

    def both(errors: dict[str, float]) -> str:
        return f"{errors['p50'] * 1e3:.3f} / {errors['p99'] * 1e3:.3f} ms"

    rows = (
        ("TTFT error p50 / p99", both(found.ttft_error)),
        ("ITL error p50 / p99", both(found.itl_error)),
        ("sent late p50 / p99", both(found.pacing_error)),
        ("CPU for 1,000 events", f"{found.cpu_per_event * 1e3:.3f} s"),
        ("events/s, one core", f"{found.events_limit:,.0f}"),
        ("time stamps", found.timestamps),
    )
    head = f"the load client on this machine, {found.events} times against a server's exact ones\n"
    return head + "".join(f"  {name:22}{value}\n" for name, value in rows)


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
        events_limit=events_limit(),
        timestamps=record.info.timestamps,
        events=len(found.ttft) + len(found.itl),
    )


def _percentiles(values: Array) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in (("p50", 50), ("p99", 99))}


_EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
CHUNK = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def events_limit() -> float:
    """Events that the client can record in a second of CPU time, each in a read of its own.

    Raises LoadError if this system does not let it open the connections.
    """
    exchanges = [Exchange(1, -1, number) for number in range(STREAMS)]
    peers: list[socket.socket] = []
    spent = 0.0
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=STREAMS))
            client = Client(
                f"http://127.0.0.1:{listener.getsockname()[1]}",
                timeout=60.0,
                stream=True,
                prepare=lambda exchange: setattr(exchange, "request", b"GET / HTTP/1.1\r\n\r\n"),
                on_end=lambda _: None,
            )
            stack.callback(client.close)
            listener.settimeout(10.0)
            for exchange in exchanges:
                exchange.intended = time.monotonic()
                client.schedule(exchange)
                peers.append(stack.enter_context(listener.accept()[0]))
            client.run(lambda: any(math.isnan(exchange.sent) for exchange in exchanges))
            for turn in range(ROUNDS + 1):
                for peer in peers:
                    peer.sendall(CHUNK if turn else HEAD)
                begun = time.thread_time()
                client.run(lambda: client.received < STREAMS * (turn + 1) and not client.ended)  # noqa: B023
                spent += time.thread_time() - begun if turn else 0.0
        except OSError as error:
            raise LoadError(f"the client's calibration failed: {error}") from None
        if client.ended:
            raise LoadError("the client's calibration failed: connections of its own broke")
    return STREAMS * ROUNDS / spent


def _facts() -> dict[str, str]:
    """What a calibration holds for."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return {
        "client": CLIENT_VERSION,
        "machine": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(len(allowed(0))),
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "user": str(os.getuid()),
    }
