"""The arrays of a record, made small enough to draw: binned, sampled, and saying so.

Each function gives columns (name → list of equal length, JSON-able, None for what does not exist)
for one chart of `charts.py`. Times are seconds since the record's start; rates per second.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_llmserve.load.record import ERRORS, Array, Record
from pytest_llmserve.metrics.definitions import per_request

if TYPE_CHECKING:
    from pytest_llmserve.verdict.baseline_file import Accepted, LoadBaseline, StoredRun

Columns = dict[str, list[Any]]

_CANCELLED = ERRORS.index("cancelled")
#: Widths of bins in time, seconds, from which the smallest that fits is taken.
_WIDTHS = tuple(m * 10.0**e for e in range(-2, 5) for m in (1, 2, 5))
#: Shares at which a distribution is drawn: finer where tails are.
SHARES = np.concatenate(
    [np.linspace(0.005, 0.9, 61)[:-1], np.linspace(0.9, 0.99, 31)[:-1], np.linspace(0.99, 1, 11)]
)


@dataclass(frozen=True)
class Budget:
    """How much of each run may be drawn, so that a report of many runs stays small."""

    requests: int
    bins: int

    @classmethod
    def of(cls, runs: int) -> Budget:
        """The share of one of `runs` runs."""
        runs = max(runs, 1)
        return cls(
            requests=min(2000, max(150, 40_000 // runs)), bins=min(240, max(60, 8000 // runs))
        )


def read_record(base: Path, events: str | None) -> Record | None:
    """The record that a run's `events` names; None if there is none or it cannot be read."""
    if events is None:
        return None
    try:
        return Record.load(base / events)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def over_time(record: Record, bins: int) -> tuple[Columns, float]:
    """Output tokens per second and requests in flight as the client saw them, over the whole
    load, in bins of equal width; and that width in seconds. What came before the load's start
    (warm-up) is left out.

    Columns `t` (start of the bin), `until`, `rate`, `flight` (in flight at the bin's middle).
    """
    start = record.info.start
    ends = record.end[~np.isnan(record.end)] - start
    length = float(max(record.info.plan_end - start, ends.max(initial=0.0), 1e-6))
    width = next((w for w in _WIDTHS if length / w <= bins), length / bins)
    count = max(1, math.ceil(length / width))
    at = record.event_time - start
    seen = at >= 0
    where = np.minimum((at[seen] / width).astype(np.int64), count - 1)
    tokens = np.bincount(where, weights=record.event_tokens[seen], minlength=count)
    edges = np.arange(count) * width
    middles = edges + width / 2
    sent = np.sort(record.sent[~np.isnan(record.sent)] - start)
    flight = np.searchsorted(sent, middles, "right") - np.searchsorted(
        np.sort(ends), middles, "right"
    )
    columns: Columns = {
        "t": _numbers(edges),
        "until": _numbers(edges + width),
        "rate": _numbers(tokens / width, 2),
        "flight": [int(n) for n in flight],
    }
    return columns, width


def readings(
    series: Mapping[str, Sequence[float | None]], names: Sequence[str], most: int
) -> Columns:
    """What a server or its GPUs said of themselves: `t` and each of `names` that was read, every
    k-th reading if there are more than `most`; {} for none. Times are since the record's start."""
    times = series.get("time") or ()
    seen = [name for name in names if any(v is not None for v in series.get(name) or ())]
    if not seen or any(len(series[name]) != len(times) for name in seen):
        return {}
    step = max(1, math.ceil(len(times) / most))
    columns: Columns = {"t": _numbers(np.array(times[::step], dtype=float))}
    for name in seen:
        columns[name] = _numbers(np.array(series[name][::step], dtype=float))
    return columns


def stretches(series: Mapping[str, Sequence[float | None]], name: str) -> Columns:
    """From when (`t`) `until` when a reading was not 0, however short; {} if it never was."""
    times, values = series.get("time") or (), series.get(name) or ()
    found: list[list[float]] = []
    for number, (at, value) in enumerate(zip(times, values, strict=False)):
        if not value or at is None:
            continue
        later = times[number + 1] if number + 1 < len(times) else at
        until = at if later is None else later
        if found and found[-1][1] == at:
            found[-1][1] = until
        else:
            found.append([at, until])
    return {"t": [a for a, _ in found], "until": [b for _, b in found]} if found else {}


def latencies(record: Record, window: Mapping[str, float | None]) -> dict[str, Array]:
    """The samples of `ttft` and `itl` that count in the window (docs/metrics.md), seconds."""
    since, until = window["start"], window["end"]
    if since is None or until is None:
        return {}
    start, end = record.info.start + since, record.info.start + until
    planned = record.phase == 1
    inside = planned & (record.intended >= start) & (record.intended < end)
    cut = (record.error == _CANCELLED) & ~np.isnan(record.first)
    answered = inside & ((record.error == 0) | cut)
    at = record.event_time
    same = record.event_request[1:] == record.event_request[:-1]
    counted = same & (planned[record.event_request] & (at >= start) & (at < end))[1:]
    return {
        "ttft": per_request(record)["ttft"][answered],
        "itl": np.diff(at)[counted],
    }


def distribution(samples: Array) -> Columns:
    """The cumulative distribution of samples: `v` (seconds) at each `share` of `SHARES`; from the
    first positive value on, for its axis is logarithmic and coalesced events have no gap."""
    values = samples[np.isfinite(samples)]
    if not values.size:
        return {}
    drawn = np.quantile(values, SHARES)
    return {"v": _digits(drawn[drawn > 0]), "share": _numbers(SHARES[drawn > 0], 5)}


def baseline_band(runs: Sequence[StoredRun], metric: str) -> Columns:
    """Between which values (`low`, `high`) the stored runs' distributions lie at each `share`."""
    sketches = [run.sketch[metric] for run in runs if len(run.sketch.get(metric, ())) > 1]
    if not sketches:
        return {}
    drawn = np.array(
        [np.interp(SHARES, np.linspace(0, 1, len(sketch)), sketch) for sketch in sketches]
    )
    # A sketch knows nothing between its last two quantiles: leave the extreme tail to the run.
    longest = 1 - 1 / (min(len(s) for s in sketches) - 1)
    known = (longest >= SHARES) & (drawn.min(axis=0) > 0)
    return {
        "share": _numbers(SHARES[known], 5),
        "low": _digits(drawn.min(axis=0)[known]),
        "high": _digits(drawn.max(axis=0)[known]),
    }


def waterfall(record: Record, most: int) -> tuple[Columns, str]:
    """One row a request in order of arrival, at most `most`; and which ones they are, in words.

    Columns `row` (place among all planned requests), `user`, `start` (intended), `sent`, `first`,
    `end`, `tokens`, `error`. If there are too many: failures (up to a fifth of the rows), the
    slowest first tokens (a tenth) and an even sample of the rest.
    """
    planned = np.flatnonzero(record.phase == 1)
    total = len(planned)
    chosen, note = planned, f"All {total:,} requests are drawn."
    if total > most:
        failed = planned[(record.error[planned] != 0) & (record.error[planned] != _CANCELLED)]
        failed = failed[_even(len(failed), most // 5)]
        ttft = np.nan_to_num(record.first[planned] - record.intended[planned], nan=-1.0)
        slowest = planned[np.argsort(ttft)[-(most // 10) :]]
        special = np.union1d(failed, slowest)
        rest = np.setdiff1d(planned, special, assume_unique=True)
        sample = rest[_even(len(rest), most - len(special))]
        chosen = np.union1d(special, sample)
        note = (
            f"{len(chosen):,} of {total:,} requests are drawn: an even sample, and beside it the "
            f"{len(slowest):,} with the slowest first token"
        )
        note += f" and {len(failed):,} that failed." if len(failed) else "."
    return _bars(record, planned, chosen), note


def lanes(record: Record, most: int) -> tuple[Columns, str]:
    """Like `waterfall`, for a row each user (column `lane`): all requests of as many users as there
    is room for, so that a gap in a row is one in the load. The user with the slowest first token is
    among them."""
    planned = np.flatnonzero(record.phase == 1)
    shown = users = np.unique(record.user[planned])
    note = f"All {len(planned):,} requests are drawn."
    if len(planned) > most:
        ttft = np.nan_to_num(record.first[planned] - record.intended[planned], nan=-1.0)
        slowest = record.user[planned[np.argmax(ttft)]]
        room = max(1, most * len(users) // len(planned))
        shown = np.union1d(users[_even(len(users), room)][1:], [slowest])
    chosen = planned[np.isin(record.user[planned], shown)]
    if len(shown) < len(users):
        note = (
            f"{len(chosen):,} of {len(planned):,} requests are drawn: all those of {len(shown)} of "
            f"{len(users)} users, the one with the slowest first token among them."
        )
    of_user = np.searchsorted(shown, record.user[chosen])
    return {**_bars(record, planned, chosen), "lane": [int(lane) for lane in of_user]}, note


def _bars(record: Record, planned: Array, chosen: Array) -> Columns:
    """The columns of `waterfall` for the `chosen` of the `planned` requests."""
    rows = np.searchsorted(planned, chosen)
    start = record.info.start
    return {
        "row": [int(row) for row in rows],
        "user": [int(user) for user in record.user[chosen]],
        "start": _numbers(record.intended[chosen] - start, 4),
        "sent": _numbers(record.sent[chosen] - start, 4),
        "first": _numbers(record.first[chosen] - start, 4),
        "end": _numbers(record.end[chosen] - start, 4),
        "tokens": [int(n) if n >= 0 else None for n in record.output_tokens[chosen]],
        "error": [
            "" if code == 0 else ERRORS[code].replace("_", " ") for code in record.error[chosen]
        ],
    }


@dataclass(frozen=True)
class Trend:
    """The history of one metric. `points`: `i` (from 1), `v`, `kind` (origin, stored, this run),
    `when`; `band`: where one more run is expected (`low`, `high`, `middle`, from run `i1` to `i2`),
    empty below five comparable runs; `accepted`: `i` and `reason` of worse runs accepted."""

    points: Columns
    band: Columns
    accepted: Columns
    caption: str


def baseline_trend(
    load: LoadBaseline, fingerprint: Mapping[str, Any], metric: str, now: float | None
) -> Trend | None:
    """The stored runs of a load and this run's value; None if no stored run has the metric.

    The band is the two-sided 90 % prediction interval of one more run, whose ends are the
    one-sided 95 % bounds of verdict/regression.py.
    """
    from pytest_llmserve.verdict.baseline import RECENT
    from pytest_llmserve.verdict.fingerprint import comparable
    from pytest_llmserve.verdict.regression import BASELINE_RUNS

    rows = [(i, run) for i, run in enumerate(load.runs, 1) if run.metrics.get(metric, math.nan) > 0]
    if not rows:
        return None
    current = {run.id for run in load.current()}
    peers = [
        (i, run)
        for i, run in rows
        if run.id in current
        and metric not in run.uncertified
        and comparable(run.fingerprint, fingerprint)
    ][-RECENT:]
    points: Columns = {
        "i": [i for i, _ in rows],
        "v": [run.metrics[metric] for _, run in rows],
        "kind": ["origin" if run.id in load.origin else "stored" for _, run in rows],
        "when": [run.time[:16].replace("T", " ") for _, run in rows],
    }
    last = len(load.runs) + 1
    if now is not None and now > 0:
        for name, value in (("i", last), ("v", now), ("kind", "this run"), ("when", "now")):
            points[name].append(value)
    band: Columns = {}
    if len(peers) >= BASELINE_RUNS:
        low, middle, high = _prediction([run.metrics[metric] for _, run in peers])
        band = {"i1": [peers[0][0]], "i2": [last], "low": [low], "middle": [middle], "high": [high]}
    changes = accepted_changes(load)
    accepted: Columns = {
        "i": [number for number, _ in changes],
        "reason": [change.reason for _, change in changes],
    }
    caption = f"{len(rows)} stored runs, {rows[0][1].time[:10]} to {rows[-1][1].time[:10]}"
    caption += f"; {len(peers)} are comparable with this run"
    if not band:
        caption += f", and a noise band needs {BASELINE_RUNS}"
    return Trend(points, band, accepted, caption + ".")


def history_before(load: LoadBaseline, value: Callable[[str], float | None]) -> LoadBaseline:
    """A baseline as it was before a run: a run that was stored is not compared with itself and
    with what came after it. `value` gives the run's metrics by dotted name."""
    for place, stored in enumerate(load.runs):
        if stored.metrics and all(value(name) == v for name, v in stored.metrics.items()):
            runs = tuple(load.runs[:place])
            ids = {run.id for run in runs}
            return replace(
                load,
                runs=runs,
                origin=tuple(i for i in load.origin if i in ids),
                accepted=tuple(change for change in load.accepted if change.run in ids),
            )
    return load


def accepted_changes(load: LoadBaseline) -> list[tuple[int, Accepted]]:
    """The worse runs that were accepted, each with its place (from 1) among the stored runs."""
    ids = {run.id: number for number, run in enumerate(load.runs, 1)}
    return [(ids[change.run], change) for change in load.accepted if change.run in ids]


def _prediction(values: Sequence[float]) -> tuple[float, float, float]:
    from scipy.special import stdtrit

    logs = np.log(values)
    n = len(logs)
    half = float(stdtrit(n - 1, 0.95)) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / n)
    middle = float(logs.mean())
    return math.exp(middle - half), math.exp(middle), math.exp(middle + half)


def _even(length: int, most: int) -> Array:
    """Indices of at most `most` of `length` things, evenly spread."""
    if length <= most:
        return np.arange(length)
    return np.linspace(0, length - 1, most).astype(np.int64)


def _numbers(values: Array, decimals: int = 3) -> list[float | None]:
    """Rounded floats; None for NaN."""
    return [None if math.isnan(v) else v for v in np.round(values, decimals).tolist()]


def _digits(values: Array) -> list[float]:
    """Floats of five significant digits."""
    return [float(f"{v:.5g}") for v in values]
