"""The server's own account: its counters, read beside the load and never by the client."""

from __future__ import annotations

import itertools
import math
import threading
import time
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from pytest_llmserve.engines import SERVER_METRICS
from pytest_llmserve.load.ask import ask

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
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
#: The share of its time that a server may be kept busy with answering, and the seconds between two
#: readings that are not exceeded for its sake.
_BUSY, _SLOWEST = 0.02, 1.0


def scrape(server: Server, engine: Engine) -> dict[str, float]:
    """The server's metrics by our names (`SERVER_METRICS`; histograms as `.sum` and `.count`).

    Summed over label sets and engines (`kv_usage`: the largest). Empty where the server
    shows none in Prometheus' text format; a metric the server does not show is absent.
    """
    if not engine.metrics:
        return {}
    return parse(exposition(server, engine), engine.counters)


def exposition(server: Server, engine: Engine) -> str:
    """The server's metrics as it shows them; "" if it does not answer."""
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        return ask(f"{server.endpoint}{engine.metrics}", headers, timeout=_TIMEOUT).decode()
    except (OSError, UnicodeDecodeError):
        return ""


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
    """Reads the server's metrics `rate` times a second while it is entered; a thread beside the
    load.

    A server answers `/metrics` in the loop that also sends tokens, so reading is slowed down until
    it takes at most `_BUSY` of its time. Whatever the rate, there is a reading before the load and
    one after it. `series` maps `time` (monotonic seconds) and each gauge and counter that was seen
    to equally long lists (NaN where a reading lacked it).
    """

    def __init__(self, server: Server, engine: Engine, rate: float = 4.0) -> None:
        self._server, self._engine, self._period = server, engine, 1.0 / rate
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="llmserve-metrics", daemon=True)
        self._rows: list[tuple[float, dict[str, float]]] = []

    def __enter__(self) -> Sampler:
        if self._engine.metrics:
            self._read()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._engine.metrics:
            self._thread.join(2 * _TIMEOUT)
            self._read()

    def _work(self) -> None:
        due = time.monotonic() + self._period
        while not self._end.wait(max(0.0, due - time.monotonic())):
            took = self._read()
            due = max(due + max(self._period, min(_SLOWEST, took / _BUSY)), time.monotonic())

    def _read(self) -> float:
        """Take one reading; the seconds that the server took to answer."""
        begin = time.monotonic()
        text = exposition(self._server, self._engine)
        end = time.monotonic()
        values = parse(text, self._engine.counters)
        if values:
            # What the text says was so at some moment in between.
            self._rows.append(((begin + end) / 2, values))
        return end - begin

    @property
    def series(self) -> dict[str, list[float]]:
        """The readings so far."""
        rows = list(self._rows)
        scalars = [name for name in SERVER_METRICS if name not in HISTOGRAMS]
        seen: Iterable[str] = [name for name in scalars if any(name in row for _, row in rows)]
        columns = {name: [row.get(name, float("nan")) for _, row in rows] for name in seen}
        return {"time": [at for at, _ in rows], **columns}


def summarize(
    series: Mapping[str, Sequence[float]],
    grown: Mapping[str, float],
    settled: Mapping[str, float],
    window: tuple[float, float],
) -> dict[str, Any]:
    """The group `server` of a run's metrics (docs/metrics.md, "Of the server").

    `series` are a sampler's, `grown` is what the counters grew by over the load (`delta`),
    `settled` the reading after it, and `window` the measured one on the series' clock. What the
    server does not show is None.
    """
    start, end = window

    def ratio(part: str, whole: str) -> float | None:
        if part not in grown or not grown.get(whole):
            return None
        return grown[part] / grown[whole]

    def rate(counter: str) -> float | None:
        growth = between(series["time"], series.get(counter, ()), start, end)
        return None if growth is None else growth / (end - start)

    accepted = ratio("spec_accepted_tokens", "spec_drafts")
    gauges: dict[str, dict[str, float | None]] = {
        name: {
            "mean": mean_in(series["time"], series.get(name, ()), start, end),
            "max": max(_finite(series.get(name, ())), default=None),
        }
        for name in GAUGES
    }
    gauges["kv_usage"]["last"] = settled.get("kv_usage")
    return {
        **gauges,
        "preemptions": grown.get("preemptions"),
        "prefix_hit_rate": ratio("prefix_hits", "prefix_queries"),
        "acceptance_rate": ratio("spec_accepted_tokens", "spec_draft_tokens"),
        "accepted_length": None if accepted is None else 1.0 + accepted,
        **{name: {"mean": ratio(f"{name}.sum", f"{name}.count")} for name in HISTOGRAMS},
        "output_throughput": rate("generation_tokens"),
        "prompt_throughput": rate("prompt_tokens"),
    }


def between(
    times: Sequence[float], values: Sequence[float], start: float, end: float
) -> float | None:
    """By how much a counter grew from `start` to `end`: readings interpolated at both.

    None if the readings do not reach from one to the other, or if the counter fell in between (the
    server started anew).
    """
    known = [(at, v) for at, v in zip(times, values, strict=False) if math.isfinite(v)]
    if end <= start or not known or known[0][0] > start or known[-1][0] < end:
        return None
    if any(after[1] < before[1] for before, after in itertools.pairwise(known)):
        return None
    import numpy as np

    moments, readings = [at for at, _ in known], [v for _, v in known]
    first, last = np.interp([start, end], moments, readings)
    return float(last - first)


def mean_in(
    times: Sequence[float], values: Sequence[float], start: float, end: float
) -> float | None:
    """Mean of the readings from `start` to `end`; None if there is none."""
    inside = [v for at, v in zip(times, values, strict=False) if start <= at < end]
    found = _finite(inside)
    return sum(found) / len(found) if found else None


def _finite(values: Iterable[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]
