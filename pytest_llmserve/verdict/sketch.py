"""A distribution in a few numbers: evenly spaced quantiles, from which its CDF is redrawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.load.record import Record

#: Quantiles at 0, 1/64, …, 1.
POINTS = 65


def distributions(record: Record, plan: LoadPlan) -> dict[str, npt.NDArray[np.float64]]:
    """`ttft tpot e2e` of the requests of the window that were answered whole, and `itl` in it:
    seconds, NaN where undefined."""
    import numpy as np

    from pytest_llmserve.metrics.definitions import per_request
    from pytest_llmserve.metrics.window import window

    start, end = window(record, plan)
    intended = (record.intended >= start) & (record.intended < end)
    rows = (record.phase == 1) & intended & (record.error == 0)
    values = per_request(record)
    same = record.event_request[1:] == record.event_request[:-1]
    at = record.event_time[1:]
    planned = record.phase[record.event_request[1:]] == 1
    gaps = np.diff(record.event_time)[same & planned & (at >= start) & (at < end)]
    return {**{name: values[name][rows] for name in ("ttft", "tpot", "e2e")}, "itl": gaps}


def sketch(values: npt.ArrayLike) -> list[float]:
    """`POINTS` quantiles (linear interpolation) of the finite values, to 6 significant digits,
    never decreasing; empty without a finite value."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    if not array.size:
        return []
    quantiles = np.quantile(array, np.linspace(0, 1, POINTS))
    return [float(f"{value:.6g}") for value in quantiles]


def cdf(quantiles: Sequence[float], at: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The share of values at or below each of `at`, from a sketch."""
    import numpy as np

    points = np.asarray(quantiles, dtype=np.float64)
    places = np.asarray(at, dtype=np.float64)
    # The last point at or below: of equal quantiles the highest share counts.
    left = np.searchsorted(points, places, side="right") - 1
    low = np.clip(left, 0, points.size - 2)
    width = points[low + 1] - points[low]
    part = (places - points[low]) / np.where(width > 0, width, 1.0)
    share = (low + np.clip(part, 0.0, 1.0)) / (points.size - 1)
    return np.where(left < 0, 0.0, np.where(left >= points.size - 1, 1.0, share))
