"""How long an emulated step takes: the roofline's answer, with noise on top if wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from pytest_llmserve.emulator.scheduler import Work
from pytest_llmserve.metrics.roofline import (
    Batch,
    Hardware,
    ModelShape,
    Precision,
    step_time,
    weight_bytes,
)


def batch_of(works: Iterable[Work]) -> Batch:
    """The sums over a step's work that its duration depends on."""
    tokens = sampled = kv_read = attended = 0
    for work in works:
        tokens += work.tokens
        sampled += 1 + work.drafts if work.makes else 0
        kv_read += work.context + work.tokens
        attended += work.tokens * work.context + work.tokens * (work.tokens + 1) // 2
    return Batch(tokens, sampled, kv_read, attended)


@dataclass(frozen=True)
class Machine:
    """A model on a piece of hardware. `draft_cost` is the time of one speculated token of the draft
    model as a share of reading the target's weights."""

    shape: ModelShape
    hardware: Hardware
    precision: Precision
    draft_cost: float = 0.0

    def duration(self, works: list[Work]) -> float:
        """Seconds of one step, without noise."""
        total = step_time(self.shape, self.hardware, self.precision, batch_of(works)).total
        if self.draft_cost:
            drafts = max((work.drafts for work in works), default=0)
            read = weight_bytes(self.shape, self.precision) / (
                self.hardware.bandwidth * self.hardware.bandwidth_efficiency
            )
            total += drafts * self.draft_cost * read
        return total


class Noise:
    """Log-normal factors of mean 1: `step` is their relative sigma a step, `run` that of one factor
    that holds for the whole process."""

    def __init__(self, step: float, run: float, seed: int) -> None:
        self._random = Random(seed)
        self._sigma = _log_sigma(step)
        self.run = self._factor(_log_sigma(run))

    def factor(self) -> float:
        return self.run * self._factor(self._sigma) if self._sigma else self.run

    def _factor(self, sigma: float) -> float:
        return math.exp(self._random.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0


def _log_sigma(relative: float) -> float:
    return math.sqrt(math.log1p(relative * relative))
