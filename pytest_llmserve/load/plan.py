"""What load to drive: who arrives when, and with what work. All seeded, all decided beforehand.

Times are seconds, rates are per second, lengths are tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pytest_llmserve.errors import PlanError

#: The ramp or lead-in that is chosen for a plan is a fifth of its duration, and at most this.
LONGEST_LEAD = 10.0


@dataclass(frozen=True)
class ClosedLoop:
    """`users` users, each sending its next request `think_time` after the end of its last one.

    Users start spread evenly over `ramp` seconds (None: chosen by the duration), because equal
    output lengths would otherwise keep all of them in step for the whole run.
    """

    users: int
    think_time: float = 0.0
    ramp: float | None = None
    kind: Literal["closed"] = field(default="closed", init=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.users, int) and self.users >= 1):
            raise PlanError(
                f"closed_loop(users={self.users!r}): users must be a whole number from 1 up"
            )
        if self.think_time < 0:
            raise PlanError(
                f"closed_loop(think_time={self.think_time!r}): think_time must not be negative"
            )
        if self.ramp is not None and self.ramp < 0:
            raise PlanError(f"closed_loop(ramp={self.ramp!r}): ramp must not be negative")


@dataclass(frozen=True)
class OpenLoop:
    """Requests arrive at `rate` per second whatever the server does, for `lead_in` seconds before
    the measured interval and then through it (None: chosen by the duration).

    `arrivals`: `poisson`; `constant` gaps; `gamma`, gaps of mean 1/rate whose squared coefficient
    of variation is `burstiness` (1 is Poisson, more comes in bursts, less is more even).
    `profile` makes the rate change: pairs of seconds from the start of the measured interval and
    the rate from there, held until the next (`between="step"`) or reached evenly
    (`between="ramp"`). Before the first pair its rate holds; `rate` is then not used.
    """

    rate: float
    arrivals: Literal["poisson", "constant", "gamma"] = "poisson"
    lead_in: float | None = None
    burstiness: float = 1.0
    profile: tuple[tuple[float, float], ...] = ()
    between: Literal["step", "ramp"] = "step"
    kind: Literal["open"] = field(default="open", init=False)

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise PlanError(f"open_loop(rate={self.rate!r}): rate must be positive")
        if self.arrivals not in ("poisson", "constant", "gamma"):
            raise PlanError(
                f"open_loop(arrivals={self.arrivals!r}): arrivals must be 'poisson', 'constant' "
                "or 'gamma'"
            )
        if not self.burstiness > 0:
            raise PlanError(
                f"open_loop(burstiness={self.burstiness!r}): burstiness must be positive"
            )
        if self.burstiness != 1.0 and self.arrivals != "gamma":
            raise PlanError(
                f"open_loop(burstiness={self.burstiness!r}): burstiness is of arrivals='gamma'"
            )
        if self.between not in ("step", "ramp"):
            raise PlanError(
                f"open_loop(between={self.between!r}): between must be 'step' or 'ramp'"
            )
        object.__setattr__(self, "profile", tuple((float(a), float(b)) for a, b in self.profile))
        times = [at for at, _ in self.profile]
        if times != sorted(set(times)) or any(rate < 0 for _, rate in self.profile):
            raise PlanError(
                f"open_loop(profile={self.profile!r}): write pairs of rising times and rates that "
                "are not negative"
            )


@dataclass(frozen=True)
class Trace:
    """Requests arrive as in a file (`load.files`), time stretched by `scale` (0.5: twice as fast).

    The lengths of the trace are used where it has some; `rate` is its mean. What lies beyond the
    plan's duration is left out.
    """

    file: str
    scale: float = 1.0
    rate: float = field(init=False)
    digest: str = field(init=False)
    arrivals: Literal["trace"] = field(default="trace", init=False)
    kind: Literal["trace"] = field(default="trace", init=False)

    def __post_init__(self) -> None:
        from pytest_llmserve.load.files import read_trace

        if not self.scale > 0:
            raise PlanError(f"trace(scale={self.scale!r}): scale must be positive")
        rows = read_trace(self.file)
        length = rows[-1].at * self.scale
        object.__setattr__(self, "rate", (len(rows) - 1) / length if length else float(len(rows)))
        object.__setattr__(self, "digest", _digest(self.file))


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, cut to `low` … `high`.

    `uniform`; `normal` with mean `middle` and standard deviation `spread`; `lognormal` with median
    `middle` and `spread` the standard deviation of the logarithm.
    """

    kind: Literal["uniform", "normal", "lognormal"]
    low: int
    high: int
    middle: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "normal", "lognormal"):
            raise PlanError(
                f"Lengths(kind={self.kind!r}): kind must be 'uniform', 'normal' or 'lognormal'"
            )
        if not 1 <= self.low <= self.high:
            raise PlanError(
                f"Lengths(low={self.low!r}, high={self.high!r}): write 1 <= low <= high"
            )
        if self.kind != "uniform" and not (self.middle > 0 and self.spread >= 0):
            raise PlanError(
                f"Lengths(middle={self.middle!r}, spread={self.spread!r}): middle must be positive "
                "and spread not negative"
            )


@dataclass(frozen=True)
class Workload:
    """What one request asks for: exactly `prompt_tokens` in and `output_tokens` out.

    Prompts are random and never repeat, so that a prefix cache cannot answer them, but for the
    first `shared_prefix` tokens, which all requests have in common (or those of one of `prefixes`
    groups). `prompt_lengths` and `output_lengths` draw the lengths instead. With `turns`, the
    requests of a closed loop's user make conversations: each turn adds `prompt_tokens` to what
    was said before, where the answers are stand-ins of `output_tokens` made beforehand, so that
    the plan does not depend on the server. `dataset` is a file of prompts (`load.files`), taken
    in order from a seeded start; their lengths are the server's to count.
    """

    prompt_tokens: int = 128
    output_tokens: int = 128
    shared_prefix: int = 0
    api: Literal["completions", "chat"] = "completions"
    stream: bool = True
    prefixes: int = 1
    prompt_lengths: Lengths | None = None
    output_lengths: Lengths | None = None
    turns: int = 1
    dataset: str | None = None
    digest: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name, least in (
            ("prompt_tokens", 1),
            ("output_tokens", 1),
            ("shared_prefix", 0),
            ("prefixes", 1),
            ("turns", 1),
        ):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise PlanError(
                    f"Workload({name}={value!r}): {name} must be a whole number from {least} up"
                )
        shortest = self.prompt_lengths.low if self.prompt_lengths else self.prompt_tokens
        if self.shared_prefix > shortest:
            raise PlanError(
                f"Workload(shared_prefix={self.shared_prefix}): the prefix must not be longer than "
                f"the prompt of {shortest} tokens"
            )
        if self.api not in ("completions", "chat"):
            raise PlanError(f"Workload(api={self.api!r}): api must be 'completions' or 'chat'")
        if self.turns > 1 and (self.prompt_lengths or self.output_lengths or self.dataset):
            raise PlanError(
                f"Workload(turns={self.turns}): conversations have turns of fixed length, without "
                "prompt_lengths, output_lengths and dataset"
            )
        if self.dataset is not None:
            from pytest_llmserve.load.files import read_samples

            read_samples(self.dataset)
            object.__setattr__(self, "digest", _digest(self.dataset))

    @property
    def longest_prompt(self) -> int:
        """The most tokens that one prompt has, as far as the workload decides it."""
        if self.prompt_lengths is not None:
            return self.prompt_lengths.high
        return self.prompt_tokens * self.turns + self.output_tokens * (self.turns - 1)

    def known_tokens(self, turn: int) -> int:
        """Tokens at the start of a prompt that the server has seen in a prompt before."""
        said = self.prompt_tokens * turn + self.output_tokens * (turn - 1) if turn else 0
        return max(self.shared_prefix, said)


def _digest(file: str) -> str:
    """16 hex digits that stand for a file's content in a fingerprint."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


Arrivals = ClosedLoop | OpenLoop | Trace


@dataclass(frozen=True)
class LoadPlan:
    """A load, complete: the same plan and seed give the same requests.

    `duration` is the measured time: closed loop, from the end of the ramp; open loop, from the
    end of the lead-in. `warmup` requests (a closed loop's users send them at once, ahead of the
    plan) have prompts of their own and are never counted. Requests in flight at the end have
    `drain` seconds to finish and are then cancelled. `timeout` bounds one request.
    """

    arrivals: Arrivals
    workload: Workload = Workload()
    duration: float = 30.0
    warmup: int = 0
    drain: float = 30.0
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("duration", "timeout"):
            if not getattr(self, name) > 0:
                raise PlanError(
                    f"LoadPlan({name}={getattr(self, name)!r}): {name} must be a positive time"
                )
        for name in ("warmup", "drain", "seed"):
            if not getattr(self, name) >= 0:
                raise PlanError(
                    f"LoadPlan({name}={getattr(self, name)!r}): {name} must not be negative"
                )

    @property
    def lead(self) -> float:
        """Seconds from the plan's start to the measured interval: the ramp or the lead-in."""
        if isinstance(self.arrivals, ClosedLoop):
            chosen = self.arrivals.ramp
            if chosen is None and self.arrivals.users == 1:
                return 0.0
        elif isinstance(self.arrivals, OpenLoop):
            chosen = self.arrivals.lead_in
        else:
            chosen = 0.0
        return min(LONGEST_LEAD, self.duration / 5) if chosen is None else chosen


@dataclass(frozen=True)
class Target:
    """Where requests go. `url` is the base (`http://127.0.0.1:8000`), `body` further fields of each
    request (how this engine fixes the output length), `token_ids` ids that are safe to draw
    prompts from (empty: prompts are text)."""

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = field(default=(), repr=False)


def closed_loop(users: int, *, think_time: float = 0.0, ramp: float | None = None) -> ClosedLoop:
    """Arrivals of `users` concurrent users, each with one request in flight."""
    return ClosedLoop(users=users, think_time=think_time, ramp=ramp)


def open_loop(
    rate: float,
    *,
    arrivals: Literal["poisson", "constant", "gamma"] = "poisson",
    lead_in: float | None = None,
    burstiness: float = 1.0,
) -> OpenLoop:
    """Arrivals at `rate` requests per second, independent of the answers."""
    return OpenLoop(rate=rate, arrivals=arrivals, lead_in=lead_in, burstiness=burstiness)


def changing_rate(
    *profile: tuple[float, float],
    between: Literal["step", "ramp"] = "step",
    arrivals: Literal["poisson", "constant", "gamma"] = "poisson",
    lead_in: float | None = None,
    burstiness: float = 1.0,
) -> OpenLoop:
    """Arrivals whose rate changes: pairs of seconds from the measured interval's start and rate."""
    if not profile or max(rate for _, rate in profile) <= 0:
        raise PlanError(f"changing_rate{profile!r}: write pairs of a time and a positive rate")
    return OpenLoop(
        rate=max(rate for _, rate in profile),
        arrivals=arrivals,
        lead_in=lead_in,
        burstiness=burstiness,
        profile=profile,
        between=between,
    )


def trace(file: str | Path, *, scale: float = 1.0) -> Trace:
    """Arrivals as they are in a file."""
    return Trace(file=str(file), scale=scale)


_ARRIVALS: dict[str, type[ClosedLoop] | type[OpenLoop] | type[Trace]] = {
    "closed": ClosedLoop,
    "open": OpenLoop,
    "trace": Trace,
}


def plan_to_dict(plan: LoadPlan) -> dict[str, Any]:
    """The plan as JSON can hold it."""
    return asdict(plan)


def plan_from_dict(plain: Mapping[str, Any]) -> LoadPlan:
    """The plan that `plan_to_dict` was given."""
    workload = dict(plain["workload"])
    for name in ("prompt_lengths", "output_lengths"):
        if workload[name] is not None:
            workload[name] = Lengths(**workload[name])
    arrivals = _ARRIVALS[plain["arrivals"]["kind"]]
    made = {
        **plain,
        "arrivals": arrivals(**_given(arrivals, plain["arrivals"])),
        "workload": Workload(**_given(Workload, workload)),
    }
    return LoadPlan(**made)


def _given(kind: type[Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: plain[one.name] for one in fields(kind) if one.init}
