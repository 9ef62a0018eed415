"""How many users a machine can serve: arithmetic and simulation, nothing measured.

`plan` gives the whole answer for a `Case`. The arithmetic is that of `metrics.roofline`; what a
closed loop of users would see comes from the emulated machine in its own time
(`emulator.simulate`). Durations are seconds, rates per second, sizes bytes and lengths tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from pytest_llmserve.emulator.physics import Machine
from pytest_llmserve.emulator.scheduler import Policy
from pytest_llmserve.emulator.simulate import (
    DISTRIBUTIONS,
    RATES,
    STATISTICS,
    Simulated,
    simulate,
)
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.metrics.arithmetic import Line, amount, ceiling_line, step_lines
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
    kv_capacity,
    resident_bytes,
    step_time,
    weight_bytes,
)
from pytest_llmserve.verdict.slo import Objective

#: More users than this are not planned: a simulation of them takes minutes.
MOST_USERS = 4096

#: More users than this, if no more are asked for, are not searched for those that meet objectives.
_SEARCHED = 512

#: Requests a plan simulates at least, so that p95 of the time to first token means something.
_SAMPLES = 384

#: What is assumed of speculative decoding when it is proposed: 3 tokens guessed, each accepted
#: with 70 % if those before it were, and made at 5 % of the time of reading the model's weights.
SPECULATION = (3, 0.7, 0.05)

_NARROWER_WEIGHTS = ("fp8", "nvfp4")
_NARROWER_KV = ("fp8",)

Bound = Literal["memory", "bandwidth", "compute"]


@dataclass(frozen=True)
class Case:
    """A model on a machine, and what each user asks of it, one request after the other.

    `max_num_seqs` None: as many sequences as there are users run together.
    """

    shape: ModelShape
    hardware: Hardware
    precision: Precision
    prompt: int = 128
    output: int = 128
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    draft_tokens: int = 0
    acceptance: float = 0.7
    draft_cost: float = 0.0
    block_size: int = 16

    @property
    def machine(self) -> Machine:
        return Machine(self.shape, self.hardware, self.precision, self.draft_cost)

    @property
    def context(self) -> float:
        """Mean number of tokens before the one that is made."""
        return self.prompt + self.output / 2

    @property
    def made(self) -> float:
        """Mean number of tokens that a sequence makes in a decode step."""
        return sum(self.acceptance**i for i in range(self.draft_tokens + 1))

    @property
    def blocks_of_a_user(self) -> int:
        """KV blocks that one request fills in the end."""
        return -(-(self.prompt + self.output) // self.block_size)

    @property
    def users_that_fit(self) -> int:
        """Users whose requests are in memory at once, at their full length; negative if the
        weights alone are too large."""
        blocks = kv_capacity(self.shape, self.hardware, self.precision) // self.block_size
        return blocks // self.blocks_of_a_user

    def decode_batch(self, users: float) -> Batch:
        """A step in which each of `users` makes its next tokens."""
        return Batch.decode(users, self.context, self.draft_tokens)

    def mean_batch(self, users: float) -> Batch:
        """The mean step of a steady load: the decoding of all users, and the prompts that fall on
        one step."""
        decode = self.decode_batch(users)
        prefills = users * self.made / self.output  # requests that begin, a step
        return Batch(
            tokens=decode.tokens + prefills * self.prompt,
            sampled=decode.sampled + prefills,
            kv_read=decode.kv_read + prefills * self.prompt,
            attended=decode.attended + prefills * self.prompt * (self.prompt + 1) / 2,
        )

    def step(self, batch: Batch) -> StepTime:
        """What a step takes, the guessing of a draft model in its overhead."""
        step = step_time(self.shape, self.hardware, self.precision, batch)
        efficiency = self.hardware.bandwidth * self.hardware.bandwidth_efficiency
        read = weight_bytes(self.shape, self.precision) / efficiency
        return replace(step, overhead=step.overhead + self.draft_tokens * self.draft_cost * read)

    def expect(self, users: int) -> Simulated:
        """What a closed loop of `users` would see, in steady state."""
        policy = Policy(
            max_num_seqs=users if self.max_num_seqs is None else self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            draft_tokens=self.draft_tokens,
            acceptance=self.acceptance,
        )
        return simulate(
            self.machine,
            policy,
            users=users,
            prompt=self.prompt,
            output=self.output,
            block_size=self.block_size,
            requests=max(1, min(8, -(-_SAMPLES // users))),
        )


@dataclass(frozen=True)
class Binding:
    """What limits the output of this many users: one word, and a sentence with the numbers."""

    what: Bound
    why: str


@dataclass(frozen=True)
class UserRange:
    """How many users meet all objectives: from `least` to `most`, to 2 %.

    Both are None if no number does. `why` says what ends the range.
    """

    least: int | None
    most: int | None
    why: str


@dataclass(frozen=True)
class Point:
    """A number of users, what they would see, and what the machine could feed at full speed."""

    users: int
    ceiling: float
    seen: Simulated


@dataclass(frozen=True)
class Lift:
    """One change and what it would bring for the same users; `range` only with objectives."""

    change: str
    seen: Simulated
    factor: float
    users_that_fit: int
    range: UserRange | None


@dataclass(frozen=True)
class Plan:
    """The answer. Nothing in it is measured."""

    case: Case
    users: int
    objectives: tuple[Objective, ...]
    lines: tuple[Line, ...]
    seen: Simulated
    binding: Binding
    range: UserRange
    curve: tuple[Point, ...]
    lifts: tuple[Lift, ...]


def plan(case: Case, users: int, objectives: Iterable[Objective] = ()) -> Plan:
    """The whole plan for `users` closed-loop users under `objectives`.

    Raises ConfigError if the model, or one request, does not fit on the machine, or for an
    objective that a plan cannot compute.
    """
    wanted = tuple(objectives)
    for objective in wanted:
        _limits_users(objective)
    if not 1 <= users <= MOST_USERS:
        raise ConfigError(f"--users {users}: a plan is for 1 to {MOST_USERS:,} users")
    if case.users_that_fit < 1:
        raise ConfigError(_too_large(case))
    search = _Search(case, wanted, users, users)
    seen = search.seen(users)
    most = search.range.most or users
    return Plan(
        case=case,
        users=users,
        objectives=wanted,
        lines=tuple(arithmetic(case, users)),
        seen=seen,
        binding=binding(case, users),
        range=search.range,
        curve=tuple(Point(n, _ceiling(case, n), search.seen(n)) for n in _numbers(users, most)),
        lifts=tuple(lifts(case, users, wanted, seen, most)),
    )


def arithmetic(case: Case, users: int) -> list[Line]:
    """The arithmetic from sizes to tokens a second, line by line."""
    shape, hardware, precision = case.shape, case.hardware, case.precision
    length, token = case.prompt + case.output, kv_bytes(shape, precision)
    weights, resident = weight_bytes(shape, precision), resident_bytes(shape, precision)
    usable = hardware.memory * hardware.memory_utilization
    decode, mean = case.decode_batch(users), case.mean_batch(users)
    full = full_speed(shape, hardware, precision, decode)
    step = case.step(decode)
    steps = step_lines(shape, hardware, precision, decode, users, case.context)
    prompt = _prefill(case)
    kv_user = case.blocks_of_a_user * case.block_size * token
    embedding = "tied to the head" if shape.tied else amount(shape.head_params * HEAD_BYTES, "B")
    lines = [
        *steps[:2],
        Line("kv_user", "KV cache of a user",
             f"{case.prompt} + {case.output} tokens in {case.blocks_of_a_user} blocks of "
             f"{case.block_size} × {amount(token, 'B')}", kv_user, "B"),
        Line("memory_usable", "memory that may be used",
             f"{amount(hardware.memory, 'B')} × {hardware.memory_utilization:g}", usable, "B"),
        Line("memory_left", "memory left for KV cache",
             f"{amount(usable, 'B')} − weights {amount(weights, 'B')} − embedding {embedding}",
             usable - resident, "B"),
        Line("users_that_fit", "users that fit",
             f"{amount(usable - resident, 'B')} / {amount(kv_user, 'B')}",
             case.users_that_fit, "users"),
        *steps[2:],
        ceiling_line(full, users, case.made),
        Line("step", "a step as expected",
             f"max({amount(full.memory, 's')} / {hardware.bandwidth_efficiency:g}, "
             f"{amount(full.compute, 's')} / {hardware.compute_efficiency:g}) + "
             f"{amount(step.overhead, 's')}", step.total, "s"),
        Line("decode", "decoding alone",
             f"{users * case.made:.4g} tokens / {amount(step.total, 's')}",
             users * case.made / step.total, "tok/s"),
        Line("prefill", "a prompt on its own",
             f"{case.prompt} tokens: max({amount(prompt.memory, 's')}, "
             f"{amount(prompt.compute, 's')}) + {amount(prompt.overhead, 's')}",
             prompt.total, "s"),
        Line("mean_step", "a step with its share of prompts",
             f"{mean.tokens - decode.tokens:.4g} prompt tokens beside "
             f"{decode.tokens:.4g} of decoding", case.step(mean).total, "s"),
    ]  # fmt: skip
    assert length >= 2
    return lines


def binding(case: Case, users: int) -> Binding:
    """What limits the output of `users`: memory if they do not fit, else the slower of the two."""
    fit = case.users_that_fit
    if users > fit:
        return Binding(
            "memory",
            f"{users:,} users do not fit: {fit:,} do at their full length, so requests wait or are "
            "preempted and computed again",
        )
    step = case.step(case.mean_batch(users))
    slow, fast = max(step.memory, step.compute), min(step.memory, step.compute)
    other = "compute" if step.bound == "bandwidth" else "bandwidth"
    crossing = _compute_binds_from(case)
    if crossing is None:
        where = "compute never binds, whatever the number of users"
    else:
        where = f"compute binds from about {crossing:,} users"
        where += "" if crossing <= fit else f", and {fit:,} fit"
    return Binding(
        step.bound,
        f"of a mean step, {step.bound} takes {amount(slow, 's')} and {other} {amount(fast, 's')}; "
        f"{where}",
    )


def lifts(
    case: Case, users: int, objectives: Sequence[Objective], now: Simulated, near: int
) -> Iterable[Lift]:
    """What would lift the output, each change on its own, with what it brings.

    `now` is what `users` see without it, `near` the most users that meet the objectives then.
    """
    for change, other in _changes(case):
        search = _Search(other, objectives, users, near)
        if other.users_that_fit < 1:
            continue
        seen = search.seen(users)
        yield Lift(
            change=change,
            seen=seen,
            factor=seen.output_throughput / now.output_throughput,
            users_that_fit=other.users_that_fit,
            range=search.range if objectives else None,
        )


def user_range(case: Case, objectives: Iterable[Objective] = ()) -> UserRange:
    """How many users meet all objectives; without any, how many fit in memory."""
    return _Search(case, tuple(objectives), 1, 1).range


def parse_objective(text: str) -> Objective:
    """An objective as it is written in a shell: "ttft.p95<=0.5", "output_throughput >= 1000".

    Raises ConfigError in one sentence for anything else.
    """
    match = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
    try:
        if match is None:
            raise ValueError
        bound = float(match[3])
    except ValueError:
        raise ConfigError(
            f"--slo {text!r}: write METRIC<=NUMBER or METRIC>=NUMBER, such as 'ttft.p95<=0.5'"
        ) from None
    objective = Objective(match[1], "<=" if match[2] == "<=" else ">=", bound)
    _limits_users(objective)
    return objective


class _Search:
    """Finds the numbers of users that meet objectives; each number is simulated once."""

    def __init__(self, case: Case, objectives: Sequence[Objective], users: int, near: int) -> None:
        """Objectives on rates are looked for near `users`, those on latencies near `near`."""
        self._case = case
        self._users = users
        self._near = near
        self._upper = [o for o in objectives if _limits_users(o)]
        self._lower = [o for o in objectives if not _limits_users(o)]
        self._seen: dict[int, Simulated] = {}

    def seen(self, users: int) -> Simulated:
        if users not in self._seen:
            self._seen[users] = self._case.expect(users)
        return self._seen[users]

    @cached_property
    def range(self) -> UserRange:
        fit = self._case.users_that_fit
        if not (self._upper or self._lower):
            return UserRange(1, fit, f"{_users(fit)} fit in memory; no objective was given")
        top = min(fit, max(_SEARCHED, self._users))
        most, beyond = _last(top, lambda n: not self._missed(n, self._upper), self._near)
        if most == 0:
            return UserRange(None, None, f"one user alone has {self._why(1, self._upper)}")
        if most < top:
            end = f"{_users(beyond)} have {self._why(beyond, self._upper)}"
        elif top == fit:
            end = f"memory holds {_users(top)}"
        else:
            end = f"more than {_users(top)} were not looked at"
        # More users than meet the latencies cannot help, so they are not looked at.
        short, least = _last(most, lambda n: bool(self._missed(n, self._lower)), self._users)
        if short == most:
            missed = self._why(most, self._lower)
            return UserRange(None, None, f"{_users(most)} have {missed}, and {end}")
        return UserRange(least, most, end)

    def _missed(self, users: int, objectives: list[Objective]) -> list[Objective]:
        return [o for o in objectives if not o.met(self.seen(users).value(o.metric))]

    def _why(self, users: int, objectives: list[Objective]) -> str:
        from pytest_llmserve.report.units import show

        objective = self._missed(users, objectives)[0]
        value = self.seen(users).value(objective.metric)
        return (
            f"{objective.metric} {show(objective.metric, value)} where {objective.relation} "
            f"{show(objective.metric, objective.bound)} is asked"
        )


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count:,} users"


def _last(top: int, holds: Callable[[int], bool], near: int = 1) -> tuple[int, int]:
    """The last of 1 … `top` for which `holds`, which is true up to some number and then false,
    and the first for which it is not (0 and 1 if it never holds, `top` and the next if always).

    Looks at few numbers, first at `near` and away from it, until the two are within 2 %.
    """
    low, high, at = 0, top + 1, min(near, top)
    while at > low:
        if holds(at):
            low, at = at, min(2 * at, high - 1)
        else:
            high, at = at, at // 2 if low == 0 else low
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low, high


def _limits_users(objective: Objective) -> bool:
    """Whether more users make it harder to meet (latency), or easier (aggregate rates)."""
    name, _, statistic = objective.metric.partition(".")
    if objective.metric in RATES and objective.relation == ">=":
        return False
    known = name in DISTRIBUTIONS and statistic in STATISTICS
    if known and objective.relation == (">=" if name == "user_throughput" else "<="):
        return True
    raise ConfigError(
        f"--slo '{objective}': a plan can look for {', '.join(f'{n} >=' for n in RATES)}, "
        "user_throughput.STATISTIC >=, ttft.STATISTIC <= and tpot.STATISTIC <=, with a "
        f"statistic of {', '.join(STATISTICS)}"
    )


def _changes(case: Case) -> Iterable[tuple[str, Case]]:
    precision, hardware = case.precision, case.hardware
    for weights in _NARROWER_WEIGHTS:
        if ELEMENT_BYTES[weights] < ELEMENT_BYTES[precision.weights]:
            yield f"{weights} weights", replace(case, precision=replace(precision, weights=weights))
    for kv in _NARROWER_KV:
        if ELEMENT_BYTES[kv] < ELEMENT_BYTES[precision.kv]:
            yield f"{kv} KV cache", replace(case, precision=replace(precision, kv=kv))
    if not case.draft_tokens:
        drafts, acceptance, cost = SPECULATION
        yield (
            f"speculation: {drafts} tokens, {acceptance:.0%} accepted, each {cost:.0%} of a pass "
            "(assumed)".replace("%", " %"),
            replace(case, draft_tokens=drafts, acceptance=acceptance, draft_cost=cost),
        )
    if hardware.link_bandwidth and hardware.devices == 1:
        yield (
            f"a second {hardware.title}, tensor parallel over a link of "
            f"{amount(hardware.link_bandwidth, 'B/s')}",
            replace(case, hardware=hardware.joined(2)),
        )


def _ceiling(case: Case, users: int) -> float:
    batch = case.decode_batch(users)
    full = full_speed(case.shape, case.hardware, case.precision, batch)
    return users * case.made / full.total


def _prefill(case: Case) -> StepTime:
    n = case.prompt
    return case.step(Batch(tokens=n, sampled=1, kv_read=n, attended=n * (n + 1) / 2))


def _compute_binds_from(case: Case) -> int | None:
    """From about how many users compute is slower than bandwidth; None if it never is."""
    top = 1 << 20
    last, first = _last(top, lambda n: case.step(case.mean_batch(n)).bound == "bandwidth")
    return None if last == top else first


def _numbers(users: int, most: int) -> list[int]:
    """Numbers of users for a curve: powers of two, those asked for, and the most that are met."""
    shown = min(most, 4 * users, _SEARCHED)
    top = max(users, shown)
    powers = {2**i for i in range(int(math.log2(top)) + 1)}
    return sorted(powers | {users, shown})


def _too_large(case: Case) -> str:
    usable = case.hardware.memory * case.hardware.memory_utilization
    need = case.blocks_of_a_user * case.block_size * kv_bytes(case.shape, case.precision)
    return (
        f"{case.shape.name} with {case.precision.weights} weights takes "
        f"{amount(resident_bytes(case.shape, case.precision), 'B')} and one request of "
        f"{case.prompt} + {case.output} tokens {amount(need, 'B')}, more than the "
        f"{amount(usable, 'B')} that may be used on {case.hardware.title}; choose a narrower "
        "--weights or --kv, shorter requests, or larger --hardware"
    )
