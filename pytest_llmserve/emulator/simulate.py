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


@dataclass(frozen=True)
class Simulated:
    """Steady-state figures as METRICS.md defines them: rates per second, times in seconds."""

    output_throughput: float
    total_throughput: float
    ttft_p50: float
    ttft_p95: float
    tpot_p50: float
    concurrency: float
    preemptions: int


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
    scheduler = Scheduler(policy, BlockPool(min(blocks, needed + 1), block_size))
    fresh, arrived = count(), dict[Sequence, float]()
    coming = deque(1 + output * (user + 1) // users for user in range(users))
    first: dict[Sequence, float] = {}
    now = begin = tokens = prefilled = busy = 0.0
    done = 0
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
                coming.append(output)
                arrived.pop(sequence)
                span = now - first.pop(sequence)
                if measuring and sequence.length > 1:
                    tpot.append(span / (sequence.length - 1))
    window = now - begin
    return Simulated(
        output_throughput=tokens / window,
        total_throughput=(tokens + prefilled) / window,
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p95=float(np.percentile(ttft, 95)),
        tpot_p50=float(np.percentile(tpot, 50)) if tpot else float("nan"),
        concurrency=busy / window,
        preemptions=scheduler.totals.preemptions,
    )
