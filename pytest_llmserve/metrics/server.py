"""The server's own account: its counters, read beside the load and never by the client."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from pytest_llmserve.engines import SERVER_METRICS
from pytest_llmserve.load.ask import ask

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from pytest_llmserve.engines import Engine
    from pytest_llmserve.servers import Server

#: Our names that are gauges; the other scalars are counters.
GAUGES = ("running", "waiting", "kv_usage")
#: Our names that are histograms: `NAME.sum` in seconds and `NAME.count`.
HISTOGRAMS = ("ttft", "queue_time", "e2e")
#: A gauge of which the largest of several engines is meant, not their sum.
_SHARES = ("kv_usage",)

_TIMEOUT = 5.0


def scrape(server: Server, engine: Engine) -> dict[str, float]:
    """The server's metrics by our names (`SERVER_METRICS`; histograms as `.sum` and `.count`).

    Summed over label sets and engines (`kv_usage`: the largest). Empty where the server
    shows none in Prometheus' text format; a metric the server does not show is absent.
    """
    if not engine.metrics:
        return {}
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        text = ask(f"{server.endpoint}{engine.metrics}", headers, timeout=_TIMEOUT).decode()
    except (OSError, UnicodeDecodeError):
        return {}
    return parse(text, engine.counters)


def parse(text: str, names: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Our metrics from an exposition; `names` gives the engine's name or names of each of ours."""
    samples: dict[str, list[float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(sample.value)
    except ValueError:
        return {}
    found: dict[str, float] = {}
    for ours in SERVER_METRICS:
        for theirs in names.get(ours, ()):
            if ours in HISTOGRAMS:
                if f"{theirs}_sum" in samples and f"{theirs}_count" in samples:
                    found[f"{ours}.sum"] = sum(samples[f"{theirs}_sum"])
                    found[f"{ours}.count"] = sum(samples[f"{theirs}_count"])
                    break
                continue
            values = _scalar(samples, theirs)
            if values is not None:
                found[ours] = max(values) if ours in _SHARES else sum(values)
                break
    return found


def _scalar(samples: Mapping[str, list[float]], name: str) -> list[float] | None:
    """A gauge's or counter's values; the parser gives counters their `_total`, or not."""
    base = name.removesuffix("_total")
    return samples.get(name) or samples.get(f"{base}_total") or samples.get(base)


def delta(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Growth of each counter and histogram over a load. Gauges are left out.

    A counter that fell (the server started anew) is left out too: it says nothing.
    """
    return {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if name not in GAUGES and value >= before.get(name, 0.0)
    }


class Sampler:
    """Reads the gauges `rate` times a second while it is entered; a thread beside the load.

    `series` maps `time` (monotonic seconds) and each gauge that was seen to equally long lists
    (NaN where a reading lacked it).
    """

    def __init__(self, server: Server, engine: Engine, rate: float = 2.0) -> None:
        self._server, self._engine, self._period = server, engine, 1.0 / rate
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="llmserve-metrics", daemon=True)
        self._rows: list[tuple[float, dict[str, float]]] = []

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join(2 * _TIMEOUT)

    def _work(self) -> None:
        due = time.monotonic()
        while not self._end.wait(max(0.0, due - time.monotonic())):
            values: dict[str, float] = {}
            at = time.monotonic()
            with contextlib.suppress(OSError):
                values = scrape(self._server, self._engine)
            if values:
                self._rows.append((at, values))
            due = max(due + self._period, time.monotonic())

    @property
    def series(self) -> dict[str, list[float]]:
        """The readings so far."""
        rows = list(self._rows)
        seen: Iterable[str] = [name for name in GAUGES if any(name in row for _, row in rows)]
        columns = {name: [row.get(name, float("nan")) for _, row in rows] for name in seen}
        return {"time": [at for at, _ in rows], **columns}
