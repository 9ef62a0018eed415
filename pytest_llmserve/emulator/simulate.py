"""The emulated machine under a closed loop, in its own time: no process, no socket, no waiting.

It gives in milliseconds what the emulated server would show after minutes, for planning and for
comparing the model with published figures.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import count

import numpy as np

from pytest_llmserve.emulator.kv import BlockPool
from pytest_llmserve.emulator.physics import Machine
from pytest_llmserve.emulator.scheduler import Policy, Scheduler, Sequence
from pytest_llmserve.metrics.roofline import kv_capacity

#: Metrics of a simulation: METRICS.md's rates, and its distributions with these statistics.
RATES = ("output_throughput", "total_throughput", "request_throughput", "concurrency.mean")
DISTRIBUTIONS = ("ttft", "tpot", "user_throughput")
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True)
class Simulated:
    """Steady-state figures as METRICS.md defines them: rates per second, times in seconds.

    `ttft` and `tpot` are of each request (`tpot` of those with more than one token).
    """

    output_throughput: float
    total_throughput: float
    request_throughput: float
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    concurrency: float
    preemptions: int

    def value(self, metric: str) -> float:
        """A metric by its dotted name: one of `RATES`, or of `DISTRIBUTIONS` with a statistic.

        NaN for a distribution without samples; raises KeyError for a name that is none of these.
        """
        if metric in RATES:
            return float(getattr(self, metric.partition(".")[0]))
        name, _, statistic = metric.partition(".")
        if name not in DISTRIBUTIONS or statistic not in STATISTICS:
            raise KeyError(metric)
        samples = np.array(self.ttft if name == "ttft" else self.tpot)
        if not samples.size:
            return float("nan")
        if name == "user_throughput":
            samples = 1 / samples
        if statistic in ("mean", "max"):
            return float(getattr(samples, statistic)())
        return float(np.percentile(samples, int(statistic[1:])))

    @property
    def ttft_p50(self) -> float:
        return self.value("ttft.p50")

    @property
    def ttft_p95(self) -> float:
        return self.value("ttft.p95")

    @property
    def tpot_p50(self) -> float:
        return self.value("tpot.p50")


def simulate(
    machine: Machine,
    policy: Policy,
    *,
    users: int,
    prompt: int,
    output: int,
    block_size: int = 16,
    requests: int = 8,
) -> Simulated:
    """A closed loop of `users`, each with `prompt` tokens in and `output` out at a time.

    The first request of each user is of another length, so that users are out of step as after
    a ramp; then `requests` a user are measured on average. An answer's successor arrives when the
    next step has begun, as it does over HTTP. Raises ValueError if one request does not fit.
    """
    blocks = kv_capacity(machine.shape, machine.hardware, machine.precision) // block_size
    if blocks < 1:
        raise ValueError("the weights leave no room for a KV cache")
    needed = users * -(-(prompt + output) // block_size)
    # Prompts are all different, so a prefix cache would find nothing and only cost time.
    pool = BlockPool(min(blocks, needed + 1), block_size, prefix_caching=False)
    scheduler = Scheduler(policy, pool)
    fresh, arrived = count(), dict[Sequence, float]()
    coming = deque(1 + output * (user + 1) // users for user in range(users))
    first: dict[Sequence, float] = {}
    now = begin = tokens = prefilled = busy = 0.0
    done = ended = 0
    ttft: list[float] = []
    tpot: list[float] = []
    while done < users * (requests + 1):
        works = scheduler.plan()
        while coming:
            length = coming.popleft()
            new = Sequence([next(fresh) for _ in range(prompt)], length, lambda i: i)
            arrived[new] = now
            scheduler.add(new)
        if not works:
            continue
        duration = machine.duration(works)
        now += duration
        measuring = done >= users
        if not measuring:
            begin = now
        else:
            busy += duration * len(scheduler.running)
        for emission in scheduler.commit(works):
            sequence = emission.sequence
            if emission.first == 0:
                first[sequence] = now
                if measuring:
                    prefilled += prompt
                    ttft.append(now - arrived[sequence])
            if measuring:
                tokens += emission.count
            if emission.done:
                done += 1
                ended += measuring
                coming.append(output)
                arrived.pop(sequence)
                span = now - first.pop(sequence)
                if measuring and sequence.length > 1:
                    tpot.append(span / (sequence.length - 1))
    window = now - begin
    return Simulated(
        output_throughput=tokens / window,
        total_throughput=(tokens + prefilled) / window,
        request_throughput=ended / window,
        ttft=tuple(ttft),
        tpot=tuple(tpot),
        concurrency=busy / window,
        preemptions=scheduler.totals.preemptions,
    )
