"""The steady state of a load: the only part of it that is measured (METRICS.md, Per run)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_llmserve.load.plan import ClosedLoop

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.load.record import Record


def window(record: Record, plan: LoadPlan) -> tuple[float, float]:
    """Start and end on the record's clock; equal if there was no steady state.

    Closed loop: from when the ramp is over and every user has received an output event. Open
    loop: from the end of the lead-in. Both until the plan's end, or until the last request that
    was recorded ended if the load was interrupted.
    """
    info = record.info
    start, end = info.ramp_end, info.plan_end
    planned = record.phase == 1
    if info.incomplete:
        end = min(end, float(record.end[planned].max(initial=start)))
    if isinstance(plan.arrivals, ClosedLoop):
        served = planned & ~np.isnan(record.first)
        firsts = np.full(plan.arrivals.users, np.inf)
        np.minimum.at(firsts, record.user[served], record.first[served])
        start = max(start, float(firsts.max()))
    return (start, end) if start < end else (end, end)
