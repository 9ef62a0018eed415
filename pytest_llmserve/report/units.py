"""How metrics are shown: the only place where seconds become milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

_TOKENS_PER_SECOND = (
    "output_throughput", "total_throughput", "user_throughput", "prompt_throughput",
)  # fmt: skip
_TIMES = ("queue_time", "ttft", "tpot", "itl", "e2e", "send_delay", "client_lag")
#: Shown in percent.
_SHARES = (
    "kv_usage", "prefix_hit_rate", "acceptance_rate", "utilization", "throttled", "power_capped",
    "roofline",
)  # fmt: skip
#: Unit and how much of the measured one it is.
_UNITS = {
    "power": ("W", 1.0), "energy": ("J", 1.0), "energy_per_token": ("J", 1.0),
    "temperature": ("°C", 1.0), "memory_used": ("GB", 1e9), "system_memory_used": ("GB", 1e9),
    "sm_clock": ("MHz", 1e6), "memory_clock": ("MHz", 1e6),
}  # fmt: skip


def show(metric: str, value: float | None) -> str:
    """A value with its unit, in three or four significant digits: `show("ttft.p95", 0.2)` is
    "200 ms". None and NaN show as "–"."""
    if value is None or math.isnan(value):
        return "–"
    name = metric.removeprefix("server.").removeprefix("gpu.").split(".")[0]
    if name in _UNITS:
        return f"{_digits(value / _UNITS[name][1])} {_UNITS[name][0]}"
    if name in _SHARES or metric == "goodput.fraction":
        return f"{value:.1%}".replace("%", " %")
    if name in _TIMES and not metric.endswith(".count"):
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


def margin(relation: str, measured: float | None, bound: float | None) -> float | None:
    """How far on the good side of its bound a value is, as a share of it; None if unknown."""
    if measured is None or bound is None or not bound or math.isnan(measured):
        return None
    share = (measured - bound) / abs(bound)
    return share if relation == ">=" else -share


def show_margin(relation: str, measured: float | None, bound: float | None) -> str:
    """The margin in percent of the bound; "–" if unknown."""
    share = margin(relation, measured, bound)
    return "–" if share is None else f"{share:+.1%}".replace("%", " %")


def several(count: int, noun: str) -> str:
    """A number of things: "1 run", "5 runs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _digits(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    size = abs(value)
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{value:,.{decimals}f}"
