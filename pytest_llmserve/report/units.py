"""How metrics are shown: the only place where seconds become milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

_TOKENS_PER_SECOND = ("output_throughput", "total_throughput", "user_throughput")
_TIMES = ("ttft", "tpot", "itl", "e2e", "send_delay", "client_lag")


def show(metric: str, value: float | None) -> str:
    """A value with its unit, in three or four significant digits: `show("ttft.p95", 0.2)` is
    "200 ms". None and NaN show as "–"."""
    if value is None or math.isnan(value):
        return "–"
    name = metric.split(".")[0]
    if name in _TIMES:
        return show_time(value)
    if name in _TOKENS_PER_SECOND:
        return f"{_digits(value)} tok/s"
    if name in ("request_throughput", "goodput"):
        return f"{_digits(value)} req/s"
    return _digits(value)


def show_time(seconds: float) -> str:
    """A duration in the unit that suits it: µs, ms or s."""
    size = abs(seconds)
    if size >= 10:
        return f"{seconds:,.1f} s"
    if size >= 1:
        return f"{seconds:.2f} s"
    if size >= 1e-3:
        return f"{_digits(seconds * 1e3)} ms"
    return f"{_digits(seconds * 1e6)} µs"


def in_one_unit(seconds: Sequence[float]) -> tuple[str, list[float]]:
    """Durations in the one unit that suits the largest of them, for an axis: its name, the values
    in four significant digits."""
    largest = max((abs(value) for value in seconds), default=0.0)
    unit, size = ("s", 1.0) if largest >= 1 else ("ms", 1e3) if largest >= 1e-3 else ("µs", 1e6)
    return unit, [float(f"{value * size:.4g}") for value in seconds]


def show_margin(relation: str, measured: float | None, bound: float | None) -> str:
    """How far on the good side of its bound a value is, in percent of the bound; "–" if unknown."""
    if measured is None or bound is None or not bound or math.isnan(measured):
        return "–"
    share = (measured - bound) / abs(bound)
    return f"{share if relation == '>=' else -share:+.1%}".replace("%", " %")


def _digits(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    size = abs(value)
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{value:,.{decimals}f}"
