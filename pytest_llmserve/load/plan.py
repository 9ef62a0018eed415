"""What load to drive: who arrives when, and with what work. All seeded, all decided beforehand.

Times are seconds, rates are per second, lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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
            raise ValueError(
                f"closed_loop(users={self.users!r}): users must be a whole number from 1 up"
            )
        if self.think_time < 0:
            raise ValueError(
                f"closed_loop(think_time={self.think_time!r}): think_time must not be negative"
            )
        if self.ramp is not None and self.ramp < 0:
            raise ValueError(f"closed_loop(ramp={self.ramp!r}): ramp must not be negative")


@dataclass(frozen=True)
class OpenLoop:
    """Requests arrive at `rate` per second whatever the server does, for `lead_in` seconds before
    the measured interval and then through it (None: chosen by the duration)."""

    rate: float
    arrivals: Literal["poisson", "constant"] = "poisson"
    lead_in: float | None = None
    kind: Literal["open"] = field(default="open", init=False)

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"open_loop(rate={self.rate!r}): rate must be positive")
        if self.arrivals not in ("poisson", "constant"):
            raise ValueError(
                f"open_loop(arrivals={self.arrivals!r}): arrivals must be 'poisson' or 'constant'"
            )


@dataclass(frozen=True)
class Workload:
    """What one request asks for: exactly `prompt_tokens` in and `output_tokens` out.

    Prompts are random and never repeat, so that a prefix cache cannot answer them, but for the
    first `shared_prefix` tokens, which all requests have in common.
    """

    prompt_tokens: int = 128
    output_tokens: int = 128
    shared_prefix: int = 0
    api: Literal["completions", "chat"] = "completions"
    stream: bool = True

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("output_tokens", 1), ("shared_prefix", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise ValueError(
                    f"Workload({name}={value!r}): {name} must be a whole number from {least} up"
                )
        if self.shared_prefix > self.prompt_tokens:
            raise ValueError(
                f"Workload(shared_prefix={self.shared_prefix}): the prefix must not be longer than "
                f"the prompt of {self.prompt_tokens} tokens"
            )
        if self.api not in ("completions", "chat"):
            raise ValueError(f"Workload(api={self.api!r}): api must be 'completions' or 'chat'")

    @property
    def longest_prompt(self) -> int:
        """The most tokens that one prompt has."""
        return self.prompt_tokens


@dataclass(frozen=True)
class LoadPlan:
    """A load, complete: the same plan and seed give the same requests.

    `duration` is the measured time: closed loop, from the end of the ramp; open loop, from the
    end of the lead-in. `warmup` requests (a closed loop's users send them at once, ahead of the
    plan) have prompts of their own and are never counted. Requests in flight at the end have
    `drain` seconds to finish and are then cancelled. `timeout` bounds one request.
    """

    arrivals: ClosedLoop | OpenLoop
    workload: Workload = Workload()
    duration: float = 30.0
    warmup: int = 0
    drain: float = 30.0
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("duration", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"LoadPlan({name}={getattr(self, name)!r}): {name} must be a positive time"
                )
        for name in ("warmup", "drain", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"LoadPlan({name}={getattr(self, name)!r}): {name} must not be negative"
                )

    @property
    def lead(self) -> float:
        """Seconds from the plan's start to the measured interval: the ramp or the lead-in."""
        if isinstance(self.arrivals, ClosedLoop):
            chosen = self.arrivals.ramp
            if chosen is None and self.arrivals.users == 1:
                return 0.0
        else:
            chosen = self.arrivals.lead_in
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
    arrivals: Literal["poisson", "constant"] = "poisson",
    lead_in: float | None = None,
) -> OpenLoop:
    """Arrivals at `rate` requests per second, independent of the answers."""
    return OpenLoop(rate=rate, arrivals=arrivals, lead_in=lead_in)


_ARRIVALS: dict[str, type[ClosedLoop] | type[OpenLoop]] = {"closed": ClosedLoop, "open": OpenLoop}


def plan_to_dict(plan: LoadPlan) -> dict[str, Any]:
    """The plan as JSON can hold it."""
    return asdict(plan)


def plan_from_dict(plain: Mapping[str, Any]) -> LoadPlan:
    """The plan that `plan_to_dict` was given."""
    arrivals = {key: value for key, value in plain["arrivals"].items() if key != "kind"}
    fields = {
        **plain,
        "arrivals": _ARRIVALS[plain["arrivals"]["kind"]](**arrivals),
        "workload": Workload(**plain["workload"]),
    }
    return LoadPlan(**fields)
