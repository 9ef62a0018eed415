"""The arithmetic of `metrics.roofline` line by line, and the `roofline` figure of a run.

For people: each line says what a number is, how it comes about, and what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pytest_llmserve.metrics.roofline import (
    ELEMENT_BYTES,
    HEAD_BYTES,
    Batch,
    Hardware,
    ModelShape,
    Precision,
    StepTime,
    full_speed,
    kv_bytes,
    step_bytes,
    step_flops,
    weight_bytes,
)


@dataclass(frozen=True)
class Line:
    """One line of arithmetic: `what` is `how`, which makes `value` in `unit`."""

    name: str
    what: str
    how: str
    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.what}: {self.how} = {amount(self.value, self.unit)}"


#: Units that take SI prefixes; all others are counts and rates of things.
_PREFIXED = ("B", "B/s", "FLOP", "FLOP/s", "s")
_MULTIPLES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_FRACTIONS = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def amount(value: float, unit: str) -> str:
    """A value with its unit in three digits: `amount(5.15e9, "B")` is "5.15 GB"."""
    if unit == "":
        return f"{value:.1%}".replace("%", " %")
    if unit not in _PREFIXED:
        size = abs(value)
        digits = 0 if size >= 100 or float(value).is_integer() else 1 if size >= 10 else 2
        return f"{value:,.{digits}f} {unit}"
    steps = _FRACTIONS if unit == "s" else _MULTIPLES
    scale, prefix = next((s for s in steps if abs(value) >= s[0]), steps[-1])
    shown = value / scale
    digits = 0 if abs(shown) >= 100 else 1 if abs(shown) >= 10 else 2
    return f"{shown:,.{digits}f} {prefix}{unit}"


@dataclass(frozen=True)
class Roofline:
    """How near a run came to what its machine could feed.

    `share` is the `roofline` figure of METRICS.md, `ceiling` in tokens/s, `lines` the arithmetic.
    """

    share: float
    ceiling: float
    bound: Literal["bandwidth", "compute"]
    lines: tuple[Line, ...]


def roofline(
    shape: ModelShape,
    hardware: Hardware,
    precision: Precision,
    *,
    rate: float,
    sequences: float,
    context: float,
    made: float = 1.0,
    drafts: float = 0.0,
) -> Roofline:
    """The `roofline` figure of a real run: measured decode rate / what the machine could feed.

    `rate` is the measured output throughput in tokens/s, `sequences` the measured mean
    concurrency and `context` the mean number of tokens before the one that is made (prompt and
    half of the output). With speculation, `drafts` tokens are checked a sequence and step and
    `made` come out of it, the server's own means. The prompts that were prefilled in the same
    time are not credited, so a run of long prompts stays further below. Raises ValueError for
    figures that no run can have.
    """
    if not (rate >= 0 and sequences > 0 and context >= 0 and made >= 1 and drafts >= made - 1):
        raise ValueError(
            f"no run has rate={rate!r}, sequences={sequences!r}, context={context!r}, "
            f"made={made!r}, drafts={drafts!r}"
        )
    batch = Batch.decode(sequences, context, drafts)
    step = full_speed(shape, hardware, precision, batch)
    ceiling = sequences * made / step.total
    lines = (
        *step_lines(shape, hardware, precision, batch, sequences, context),
        ceiling_line(step, sequences, made),
        Line("rate", "measured", "output tokens in the window / window", rate, "tok/s"),
        Line("roofline", "roofline", f"{amount(rate, 'tok/s')} / {amount(ceiling, 'tok/s')}",
             rate / ceiling, ""),
    )  # fmt: skip
    return Roofline(rate / ceiling, ceiling, step.bound, lines)


def weight_line(shape: ModelShape, precision: Precision) -> Line:
    """Bytes of weights a step, from the numbers of weights."""
    return Line(
        "weight_bytes",
        "weights read a step",
        f"{shape.linear_params / 1e9:.3g} G × {ELEMENT_BYTES[precision.weights]:.4g} B "
        f"+ output head {shape.head_params / 1e9:.3g} G × {HEAD_BYTES:g} B",
        weight_bytes(shape, precision),
        "B",
    )


def kv_line(shape: ModelShape, precision: Precision) -> Line:
    """Bytes of KV cache a token, from the model's shape."""
    return Line(
        "kv_bytes",
        "KV cache of a token",
        f"2 × {shape.layers} layers × {shape.kv_heads} KV heads × {shape.head_dim} "
        f"× {ELEMENT_BYTES[precision.kv]:.4g} B",
        kv_bytes(shape, precision),
        "B",
    )


def step_lines(
    shape: ModelShape, hardware: Hardware, precision: Precision, batch: Batch,
    sequences: float, context: float,
) -> tuple[Line, ...]:  # fmt: skip
    """Bytes and FLOPs of a decode step of `sequences`, and the time each needs at full speed."""
    moved, done = step_bytes(shape, precision, batch), step_flops(shape, batch)
    full = full_speed(shape, hardware, precision, batch)
    peak = hardware.peak(precision.weights)
    drafted = f" × {batch.tokens / sequences:g} tokens" if batch.tokens > sequences else ""
    of_a_token = done / batch.tokens
    return (
        weight_line(shape, precision),
        kv_line(shape, precision),
        Line(
            "step_bytes",
            "bytes a step",
            f"{amount(weight_bytes(shape, precision), 'B')} + {sequences:.4g} sequences × "
            f"{context:.4g} tokens × {amount(kv_bytes(shape, precision), 'B')}",
            moved,
            "B",
        ),
        Line(
            "step_flops",
            "FLOPs a step",
            f"{sequences:.4g} sequences{drafted} × {amount(of_a_token, 'FLOP')}",
            done,
            "FLOP",
        ),
        Line(
            "bandwidth_time",
            "bandwidth needs",
            f"{amount(moved, 'B')} / {amount(hardware.bandwidth, 'B/s')}",
            full.memory,
            "s",
        ),
        Line(
            "compute_time",
            "compute needs",
            f"{amount(done, 'FLOP')} / {amount(peak, 'FLOP/s')}",
            full.compute,
            "s",
        ),
    )


def ceiling_line(step: StepTime, sequences: float, made: float) -> Line:
    """Tokens/s at full speed."""
    tokens = f"{sequences:.4g}" if made == 1 else f"{sequences:.4g} × {made:.3g} tokens"
    return Line(
        "ceiling",
        f"ceiling ({step.bound} binds)",
        f"{tokens} / {amount(step.total, 's')}",
        sequences * made / step.total,
        "tok/s",
    )
