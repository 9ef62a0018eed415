"""What the GPUs do during a load: readings of NVML beside it, and what they say of the window.

Nothing here runs where there is no NVIDIA driver, and nothing is recorded for a server that does
not compute on a GPU of this machine. Readings of several GPUs become one: power, energy and memory
are added up, utilization and clocks are means, temperature is that of the hottest.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.load.priority import core_for_drivers, keep_to
from pytest_llmserve.metrics import nvml as nvml_module
from pytest_llmserve.metrics.nvml import REASONS, Gpu
from pytest_llmserve.metrics.server import between, mean_in

if TYPE_CHECKING:
    from types import TracebackType

    from pytest_llmserve.servers import Server

#: Readings a second, and readings of the list of processes a second: that one costs more.
RATE, PROCESS_RATE = 8.0, 1.0
#: The share of the time that may go into asking a slow driver.
_BUSY = 0.1

#: Reasons for low clocks that make a run invalid. A power cap in software is no fault: a chip that
#: works at its rated power has it all the time.
THROTTLES = ("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake")
#: This bit also shows for a moment when clocks change: it counts if it is seen more than once.
SLOWDOWN = "hw_slowdown"

_SUMS, _MEANS, _HIGHEST = ("memory_used", "power", "energy"), ("utilization", "sm_clock",
                           "memory_clock"), ("temperature",)  # fmt: skip
#: Names in the group `gpu` of metrics and the statistics that each has.
_STATISTICS: Mapping[str, tuple[str, ...]] = {
    "utilization": ("mean", "max"),
    "memory_used": ("mean", "max"),
    "system_memory_used": ("mean", "max"),
    "power": ("mean", "max"),
    "temperature": ("mean", "max"),
    "sm_clock": ("mean", "min"),
    "memory_clock": ("mean", "min"),
}
#: Programs that hold every GPU for others.
_DAEMONS = ("nvidia-cuda-mps", "nvidia-persiste", "nv-hostengine", "dcgm")


@dataclass(frozen=True)
class Owner:
    """Whose GPUs are looked at: their `ids` (empty: all of the machine), and how to tell that a
    process belongs to the server (None: it cannot be told)."""

    ids: tuple[str, ...]
    belongs: Callable[[int], bool] | None


def owner_of(server: Server) -> Owner | str:
    """The GPUs and processes of a server; a sentence if no GPU of this machine is its own."""
    if server.emulated:
        return "the engine is emulated, no GPU computes"
    unused = server.config.gpus == 0 and server.config.engine != "attach"
    if unused or server.effective.get("device") == "cpu":
        return "the server computes on the CPU"
    if not server.local:
        return "the server runs on another machine"
    if server.pid is None or server.log is None:
        return Owner((), None)
    told = _json(server, "state.json")
    status = _json(server, "status.json")
    tree = {status.get(name) for name in ("server", "keeper", "guard")} | {server.pid}
    roots = {pid for pid in tree if isinstance(pid, int)}
    marker = str(told.get("server_id", ""))
    return Owner(
        tuple(str(id) for id in told.get("gpus") or ()), lambda pid: _descends(pid, roots, marker)
    )


def _json(server: Server, name: str) -> dict[str, Any]:
    """What the launcher keeps beside the server's log."""
    try:
        content = json.loads((Path(server.log or "").parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _descends(pid: int, roots: Collection[int], marker: str) -> bool:
    """Whether a process has one of `roots` above it, or the server's marker in its environment
    (a container's processes are not below us)."""
    from pytest_llmserve.launch.tree import MARKER

    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if marker and f"{MARKER}={marker}".encode() in variables:
            return True
    except OSError:
        pass
    while pid > 1:
        if pid in roots:
            return True
        try:
            # The name of the program stands in brackets and may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        pid = int(fields[1])
    return False


@dataclass(frozen=True)
class Readings:
    """What was read: `series` maps `time` (monotonic seconds) and names to equally long lists, NaN
    where a reading lacked it; `foreign` the times and ids of processes that are not the server's.
    """

    gpus: tuple[Mapping[str, Any], ...] = ()
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    foreign: tuple[tuple[float, int, str], ...] = ()
    own_seen: bool = False
    reason: str = ""


class Recorder:
    """Reads the GPUs of a server while it is entered; a thread beside the load.

    `nvml` is the module `pynvml` or what stands for it; by default this machine's, if any.
    """

    def __init__(
        self,
        server: Server,
        nvml: Any | None = None,
        *,
        owner: Owner | str | None = None,
        rate: float = RATE,
    ) -> None:
        self._owner = owner_of(server) if owner is None else owner
        self._nvml: Any = nvml
        self._period = 1.0 / rate
        self._reason = self._owner if isinstance(self._owner, str) else ""
        self._gpus: tuple[Gpu, ...] = ()
        self._facts: tuple[Mapping[str, Any], ...] = ()
        self._rows: list[dict[str, float]] = []
        self._foreign: list[tuple[float, int, str]] = []
        self._own: set[int] = set()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Recorder:
        if not self._reason:
            self._reason = self._open()
        if not self._reason:
            self._read()
            self._look(time.monotonic())
            self._thread = threading.Thread(
                target=self._work, name="llmserve-telemetry", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread is None:
            return
        self._thread.join(5.0)
        if not self._thread.is_alive():  # a driver that hangs is left alone
            self._read()
            self._nvml.nvmlShutdown()

    def _open(self) -> str:
        """Find the GPUs; why there are none, if there are none."""
        if self._nvml is None:
            self._nvml = nvml_module.library()
        if self._nvml is None:
            here = nvml_module.driver_is_here()
            return "nvidia-ml-py is not installed" if here else "this machine has no NVIDIA GPU"
        assert isinstance(self._owner, Owner)
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            return f"the NVIDIA driver cannot be asked ({error})"
        try:
            ids = self._owner.ids or map(str, range(self._nvml.nvmlDeviceGetCount()))
            self._gpus = tuple(Gpu(self._nvml, id) for id in ids)
        except self._nvml.NVMLError as error:
            self._nvml.nvmlShutdown()
            return f"the NVIDIA driver does not show the server's GPUs ({error})"
        if not self._gpus:
            self._nvml.nvmlShutdown()
            return "this machine has no NVIDIA GPU"
        self._facts = tuple(gpu.facts() for gpu in self._gpus)
        return ""

    def _work(self) -> None:
        core = core_for_drivers()
        if core is not None:
            keep_to(core)
        due = looked = time.monotonic()
        while not self._end.wait(max(0.0, due - time.monotonic())):
            begin = time.monotonic()
            self._read()
            if begin - looked >= 1.0 / PROCESS_RATE:
                self._look(begin)
                looked = begin
            now = time.monotonic()
            due = max(due + max(self._period, (now - begin) / _BUSY), now)

    def _read(self) -> None:
        begin = time.monotonic()
        row = combine([gpu.read() for gpu in self._gpus])
        if "memory_used" not in row:
            import psutil

            memory = psutil.virtual_memory()
            row["system_memory_used"] = float(memory.total - memory.available)
        self._rows.append({"time": (begin + time.monotonic()) / 2, **row})

    def _look(self, now: float) -> None:
        """Whose processes are on the GPUs."""
        assert isinstance(self._owner, Owner)
        if self._owner.belongs is None:
            return
        for pid in {pid for gpu in self._gpus for pid in gpu.processes() or ()}:
            if pid in self._own or self._owner.belongs(pid):
                self._own.add(pid)
            elif program := _program(pid):
                self._foreign.append((now, pid, program))

    @property
    def readings(self) -> Readings:
        """What was read so far."""
        rows = list(self._rows)
        names = {name: None for row in rows for name in row}
        return Readings(
            gpus=self._facts,
            series={name: [row.get(name, math.nan) for row in rows] for name in names},
            foreign=tuple(f for f in self._foreign if not f[2].startswith(_DAEMONS)),
            own_seen=bool(self._own),
            reason=self._reason,
        )


def _program(pid: int) -> str:
    """The name of a process' program; "" if there is no such process in our namespace."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def combine(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One reading of several GPUs; what one of them lacks is left out."""
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    found: dict[str, float] = {}
    for name in shared:
        values = [row[name] for row in rows]
        if name in _SUMS:
            found[name] = sum(values)
        elif name in _MEANS:
            found[name] = sum(values) / len(values)
        elif name in _HIGHEST:
            found[name] = max(values) if not any(map(math.isnan, values)) else math.nan
        elif not any(map(math.isnan, values)):
            mask = 0
            for value in values:
                mask |= int(value)
            found[name] = mask
        else:
            found[name] = math.nan
    return found


@dataclass(frozen=True)
class Telemetry:
    """A run's telemetry: the group `gpu` of its metrics (None without a GPU), `energy_per_token`,
    and the `facts` that its result shows (`Run.telemetry`)."""

    metrics: dict[str, Any] | None
    energy_per_token: float | None
    facts: dict[str, Any]


def summarize(
    readings: Readings, window: tuple[float, float], start: float, tokens: float
) -> Telemetry:
    """What the readings say of the `window` (on their clock) in which `tokens` were made.

    The series in the facts have times since `start`.
    """
    if readings.reason or not readings.series:
        return Telemetry(None, None, {"reason": readings.reason or "nothing was read"})
    series = readings.series
    times = series["time"]
    metrics: dict[str, Any] = {
        name: {s: _statistic(s, times, series.get(name, ()), window) for s in statistics}
        for name, statistics in _STATISTICS.items()
    }
    shares = reason_shares(times, series.get("reasons", ()), window)
    metrics["throttled"] = None if shares is None else shares.pop("throttled")
    metrics["power_capped"] = None if shares is None else shares["sw_power_cap"]
    energy, source = energy_in(series, window)
    metrics["energy"] = energy
    facts: dict[str, Any] = {
        "gpus": [dict(gpu) for gpu in readings.gpus],
        "energy_source": source,
        "reasons": shares and {name: share for name, share in shares.items() if share},
        "processes": _processes(readings, window),
        "series": _for_result(series, start),
    }
    per_token = energy / tokens if energy is not None and tokens > 0 else None
    return Telemetry(metrics, per_token, facts)


def energy_in(
    series: Mapping[str, Sequence[float]], window: tuple[float, float]
) -> tuple[float | None, str | None]:
    """Joules in the window and where they are from: `counter` (the GPU's own, interpolated at the
    window's ends), `power` (the integral of power readings), or None."""
    times, (start, end) = series["time"], window
    counted = between(times, series.get("energy", ()), start, end)
    if counted:
        return counted, "counter"
    total, steps = 0.0, [0.0]
    power = series.get("power", ())
    known = [(at, p) for at, p in zip(times, power, strict=False) if math.isfinite(p)]
    for (t0, p0), (t1, p1) in itertools.pairwise(known):
        total += (t1 - t0) * (p0 + p1) / 2
        steps.append(total)
    if len(known) < 2:
        return None, None
    integral = between([at for at, _ in known], steps, start, end)
    return integral, None if integral is None else "power"


def reason_shares(
    times: Sequence[float], masks: Sequence[float], window: tuple[float, float]
) -> dict[str, float] | None:
    """Of the readings in the window, the share with each reason, and `throttled`: with one that
    makes the run invalid. None without readings."""
    start, end = window
    inside = [
        int(mask)
        for at, mask in zip(times, masks, strict=False)
        if start <= at < end and math.isfinite(mask)
    ]
    if not inside:
        return None
    counts = {name: sum(bool(mask & bit) for mask in inside) for name, bit in REASONS.items()}
    bad = sum(REASONS[name] for name in THROTTLES)
    if counts[SLOWDOWN] > 1:
        bad |= REASONS[SLOWDOWN]
    shares = {name: count / len(inside) for name, count in counts.items()}
    return {**shares, "throttled": sum(bool(mask & bad) for mask in inside) / len(inside)}


def _processes(readings: Readings, window: tuple[float, float]) -> dict[str, Any]:
    """Whether the list of processes could be judged, and who was there beside the server."""
    start, end = window
    # The list is read about once a second: one reading before the window still speaks of it.
    during = [f for f in readings.foreign if start - 1 / PROCESS_RATE <= f[0] <= end]
    others = {pid: name for _, pid, name in during}
    return {
        "checked": readings.own_seen,
        "foreign": [{"pid": pid, "program": name} for pid, name in sorted(others.items())]
        if readings.own_seen
        else [],
    }


def _statistic(
    which: str, times: Sequence[float], values: Sequence[float], window: tuple[float, float]
) -> float | None:
    start, end = window
    if which == "mean":
        return mean_in(times, values, start, end)
    inside = [
        v for at, v in zip(times, values, strict=False) if start <= at < end and math.isfinite(v)
    ]
    return (max if which == "max" else min)(inside, default=None)


def _for_result(
    series: Mapping[str, Sequence[float]], start: float
) -> dict[str, list[float | None]]:
    """The series as the result file has them: `time`, `gpu.NAME`, `system_memory_used`, and 0 or 1
    for `throttled` and `power_capped`."""

    def plain(values: Sequence[float]) -> list[float | None]:
        return [None if math.isnan(v) else v for v in values]

    found: dict[str, list[float | None]] = {"time": [round(at - start, 4) for at in series["time"]]}
    for name, values in series.items():
        if name in _STATISTICS:
            found[name if name == "system_memory_used" else f"gpu.{name}"] = plain(values)
    if "reasons" in series:
        bad = sum(REASONS[name] for name in THROTTLES)
        for name, bits in (("throttled", bad), ("power_capped", REASONS["sw_power_cap"])):
            found[name] = [
                None if math.isnan(mask) else float(bool(int(mask) & bits))
                for mask in series["reasons"]
            ]
    return found
