"""When the requests of a plan are to start, all decided beforehand from the seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_llmserve.load.plan import ClosedLoop, OpenLoop

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.load.record import Array


def user_starts(plan: LoadPlan) -> Array:
    """When each user of a closed loop starts: seconds from the plan's start, spread evenly."""
    assert isinstance(plan.arrivals, ClosedLoop)
    return np.arange(plan.arrivals.users) * (plan.lead / plan.arrivals.users)


def arrival_times(plan: LoadPlan) -> Array:
    """Arrivals of an open loop, lead-in included: seconds from the plan's start, ascending."""
    assert isinstance(plan.arrivals, OpenLoop)
    end, rate = plan.lead + plan.duration, plan.arrivals.rate
    if plan.arrivals.arrivals == "constant":
        return np.arange(int(np.ceil(end * rate))) / rate
    # A Poisson process, given how many arrivals it has, is that many uniform times in order.
    random = np.random.default_rng([plan.seed, 0x0A])
    return np.sort(random.uniform(0.0, end, random.poisson(rate * end)))
