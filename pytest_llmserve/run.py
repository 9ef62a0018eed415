"""One measured load: what the `load` fixture gives and what verdicts and reports are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.load.record import Record
    from pytest_llmserve.servers import Server

Outcome = Literal["pass", "fail", "inconclusive", "invalid"]
_ORDER: tuple[Outcome, ...] = ("pass", "inconclusive", "fail", "invalid")


def worst(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The outcome that decides: invalid, fail, inconclusive, pass, in this order; None of none."""
    return max(outcomes, key=_ORDER.index, default=None)


@dataclass(frozen=True)
class Check:
    """One question of "is this a measurement at all?" (METRICS.md, Validity)."""

    check: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """One objective judged. `measured` is None if there was nothing to measure."""

    objective: str
    measured: float | None
    bound: float | None
    verdict: Outcome
    reason: str


@dataclass(frozen=True)
class Run:
    """A load and all that was measured in it.

    `metrics` is nested as in the result file (`{"ttft": {"p95": …}, "output_throughput": …}`);
    `run["ttft.p95"]` is the short way to one value. `server_metrics` are the server's own
    counters over the load, `telemetry` what the GPUs said (docs/metrics.md, "Of the GPU"), and
    `roofline` the arithmetic of the figure of that name, each with the `reason` if there is none.
    `fingerprint` says what was measured, on what.
    """

    test: str
    server: Server
    plan: LoadPlan
    metrics: Mapping[str, Any]
    validity: tuple[Check, ...]
    fingerprint: Mapping[str, Any]
    server_metrics: Mapping[str, Any] = field(default_factory=dict)
    record: Record | None = field(default=None, repr=False)
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    roofline: Mapping[str, Any] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return all(check.ok for check in self.validity)

    def __getitem__(self, name: str) -> float:
        """The value of a metric by its dotted name; NaN if it was not measurable.

        Raises KeyError with the names that exist if there is no such metric.
        """
        value: Any = self.metrics
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                known = ", ".join(value) if isinstance(value, Mapping) else "nothing below it"
                raise KeyError(f"no metric {name!r}: at {part!r} there is {known}")
            value = value[part]
        if isinstance(value, Mapping):
            raise KeyError(f"{name!r} is a group of metrics: name one of {', '.join(value)}")
        return float("nan") if value is None else float(value)
