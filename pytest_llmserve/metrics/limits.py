"""Bounds that no server can meet: an objective held against the arithmetic of the machine.

A bound is refused only if it is beyond what the machine could do at its full bandwidth and peak
compute, with no other cost and everything else in the server's favour. What is merely unlikely
passes. Durations are seconds, rates per second, lengths tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmserve.metrics.arithmetic import Line, amount, ceiling_line, step_lines, weight_line
from pytest_llmserve.metrics.roofline import Batch, full_speed, step_flops, weight_bytes
from pytest_llmserve.report.units import show

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmserve.metrics.roofline import Hardware, ModelShape, Precision
    from pytest_llmserve.verdict.slo import Objective

#: Bytes of weights that may stay in a chip's own caches from step to step: of models that small
#: the memory's bandwidth says nothing.
CACHED = 1e9


def forbidden(
    objective: Objective,
    shape: ModelShape,
    hardware: Hardware,
    precision: Precision,
    *,
    users: int,
    prompt_tokens: int,
    output_tokens: int,
    made: float = 1.0,
) -> str | None:
    """Why no server on this machine can meet the objective, with the arithmetic; None if one could.

    `users` is the most requests that can run at once, `prompt_tokens` the shortest prompt without
    what a prefix cache may know of it, `output_tokens` the shortest answer, and `made` the most
    tokens that a sequence can get out of a step (1 + the speculated ones). Judged are lower bounds
    on `output_throughput` and `user_throughput.*` and upper bounds on `ttft.*`, `tpot.*`, `itl.*`
    and `e2e.*`. Raises ValueError for a load that cannot be.
    """
    if not (users >= 1 and prompt_tokens >= 0 and output_tokens >= 1 and made >= 1):
        raise ValueError(
            f"no load has users={users!r}, prompt_tokens={prompt_tokens!r}, "
            f"output_tokens={output_tokens!r}, made={made!r}"
        )
    if weight_bytes(shape, precision) < CACHED:
        return None
    machine = _Machine(shape, hardware, precision, prompt_tokens, output_tokens, made)
    name, _, statistic = objective.metric.partition(".")
    found: tuple[float, tuple[Line, ...]] | None = None
    if objective.relation == ">=":
        if name == "output_throughput":
            found = machine.most_output(users)
        elif name == "user_throughput":
            found = machine.most_of_a_user()
        if found is None or objective.bound <= found[0]:
            return None
    else:
        least: dict[str, Callable[[], tuple[float, tuple[Line, ...]]]] = {
            "ttft": machine.least_ttft,
            "tpot": machine.least_tpot,
            "e2e": machine.least_e2e,
        }
        # A step that makes several tokens may send them as several events: most gaps are 0 then.
        if made == 1 or statistic in ("mean", "max"):
            least["itl"] = machine.least_tpot
        if name not in least:
            return None
        found = least[name]()
        if objective.bound >= found[0]:
            return None
    limit, lines = found
    side = "at most" if objective.relation == ">=" else "at least"
    arithmetic = "".join(f"\n  {line}" for line in lines)
    return (
        f"{objective.metric} {objective.relation} {show(objective.metric, objective.bound)} cannot "
        f"be met: {shape.name} with {precision.weights} weights and {precision.kv} KV cache on "
        f"{hardware.title} has {side} {show(objective.metric, limit)}, at full bandwidth and "
        f"compute and without any other cost:{arithmetic}"
    )


class _Machine:
    """The limits of one model on one machine, each with its arithmetic."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        precision: Precision,
        prompt: int,
        output: int,
        made: float,
    ) -> None:
        self._on = (shape, hardware, precision)
        self._prompt, self._output, self._made = prompt, output, made

    def most_output(self, users: int) -> tuple[float, tuple[Line, ...]]:
        """Tokens/s of `users` that all decode, always.

        Every token has at least its prompt before it, and the first of an answer comes out of the
        prompt's own step, which need not read the cache.
        """
        return self._ceiling(users, self._prompt * (1 - 1 / self._output))

    def most_of_a_user(self) -> tuple[float, tuple[Line, ...]]:
        """Tokens/s of a user who has the machine to himself."""
        return self._ceiling(1, self._prompt)

    def least_tpot(self) -> tuple[float, tuple[Line, ...]]:
        """Seconds of a step for one sequence, a token."""
        ceiling, lines = self._ceiling(1, self._prompt)
        how = "1 / the ceiling" if self._made == 1 else f"1 / the ceiling, {self._made:g} a step"
        return 1 / ceiling, (*lines, Line("least_tpot", "a token takes", how, 1 / ceiling, "s"))

    def least_ttft(self) -> tuple[float, tuple[Line, ...]]:
        """Seconds of the one step that takes a prompt alone."""
        shape, hardware, precision = self._on
        n = max(1, self._prompt)
        batch = Batch(tokens=n, sampled=1, kv_read=0, attended=n * (n + 1) / 2)
        full = full_speed(shape, hardware, precision, batch)
        done, peak = step_flops(shape, batch), hardware.peak(precision.weights)
        moved = weight_bytes(shape, precision)
        return full.total, (
            weight_line(shape, precision),
            Line("prompt_flops", "FLOPs of a prompt",
                 f"{n} tokens × {amount(done / n, 'FLOP')}", done, "FLOP"),
            Line("bandwidth_time", "bandwidth needs",
                 f"{amount(moved, 'B')} / {amount(hardware.bandwidth, 'B/s')}", full.memory, "s"),
            Line("compute_time", "compute needs",
                 f"{amount(done, 'FLOP')} / {amount(peak, 'FLOP/s')}", full.compute, "s"),
        )  # fmt: skip

    def least_e2e(self) -> tuple[float, tuple[Line, ...]]:
        """Seconds of a prompt and of the steps of its answer, for a request alone."""
        ttft, first = self.least_ttft()
        tpot, rest = self.least_tpot()
        total = ttft + (self._output - 1) * tpot
        how = f"{amount(ttft, 's')} + {self._output - 1} × {amount(tpot, 's')}"
        prompt = tuple(line for line in first if line.name == "prompt_flops")
        first_token = Line("least_ttft", "the first token takes", "the slower of bandwidth and "
                           "compute for the prompt", ttft, "s")  # fmt: skip
        return total, (*prompt, first_token, *rest,
                       Line("least_e2e", "a request takes", how, total, "s"))  # fmt: skip

    def _ceiling(self, sequences: int, context: float) -> tuple[float, tuple[Line, ...]]:
        shape, hardware, precision = self._on
        batch = Batch.decode(sequences, context, self._made - 1)
        step = full_speed(shape, hardware, precision, batch)
        lines = step_lines(shape, hardware, precision, batch, sequences, context)
        ceiling = sequences * self._made / step.total
        return ceiling, (*lines, ceiling_line(step, sequences, self._made))
