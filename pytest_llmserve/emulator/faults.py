"""Faults to inject: named, composable, seeded.

A fault is written `NAME` or `NAME=KEY:VALUE,KEY:VALUE`. Those that strike requests take
`probability` and, where they strike within a stream, `token`: how many events have gone out
before. `llmserve serve` and a server config's `emulation.options.fault` take the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType

from pytest_llmserve.errors import ConfigError

_STREAM = {"probability": 1.0, "token": 8}

#: Name → its keys with their defaults.
FAULTS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        # while starting
        "slow-start": {"seconds": 5.0},  # ready so much later
        "never-ready": {},  # /health stays at 503
        "crash-at-load": {"code": 1},  # exits with this status instead of getting ready
        # of the process
        "crash": {"tokens": 100},  # kills itself once so many tokens have left
        "ignore-sigterm": {},
        "leak-children": {
            "count": 1,
            "seconds": 120.0,
            "session": 0,
        },  # outlive it; 1: in their own
        # of a request, before its answer
        "http-429": {"probability": 1.0},
        "http-500": {"probability": 1.0},
        "http-503": {"probability": 1.0},
        "refuse": {"probability": 1.0},  # resets the connection instead of answering
        # within a stream
        "reset": _STREAM,  # connection reset
        "truncate": _STREAM,  # connection closed in the middle of the body
        "no-done": _STREAM,  # body ends in order, but early and without [DONE]
        "malformed": _STREAM,  # one event's JSON is cut in half
        "error-event": _STREAM,  # an error object at status 200, then [DONE]
        "hang": _STREAM,  # nothing more is sent, and the connection stays open
        "stall": {**_STREAM, "seconds": 1.0},  # a pause, then what was held back comes at once
        "fragment": {"probability": 1.0},  # each event is split over two sends
        # of the answer
        "wrong-count": {"probability": 1.0, "by": 1},  # usage counts so many tokens too many
        "wrong-length": {"probability": 1.0, "by": -1},  # so many tokens too many are made
        "wrong-text": {"probability": 1.0},  # greedy text that is not reproducible
        # of the machine
        "kv-leak": {"blocks": 1},  # blocks lost for ever with each finished request
        "no-prefix-reuse": {},  # the prefix cache is on, and finds nothing
        "throttle": {
            "factor": 2.0,
            "after": 10.0,
            "lasting": 0.0,
        },  # slow steps (0: for ever)
        "drift": {"rate": 0.1},  # steps last longer by this share each minute
    }
)

_BEFORE = ("http-429", "http-500", "http-503", "refuse")
_WITHIN = ("reset", "truncate", "no-done", "malformed", "error-event", "hang", "stall")
_ANSWER = ("fragment", "wrong-count", "wrong-length", "wrong-text")


@dataclass(frozen=True)
class Fault:
    """One fault that was asked for. `values` has every key of its kind."""

    name: str
    values: Mapping[str, float]
    text: str

    def __getitem__(self, key: str) -> float:
        return self.values[key]


def parse_fault(text: str) -> Fault:
    """A fault as it was written. Raises ConfigError naming what is not known."""
    name, _, rest = text.partition("=")
    name = name.strip().lower().replace("_", "-")
    if name not in FAULTS:
        raise ConfigError(f"--fault {text}: {name!r} is not known; use one of {', '.join(FAULTS)}")
    values = dict(FAULTS[name])
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition(":")
        if key not in values:
            known = ", ".join(values) or "none"
            raise ConfigError(f"--fault {text}: {name} has no key {key!r}; its keys are: {known}")
        try:
            values[key] = float(value)
        except ValueError:
            raise ConfigError(f"--fault {text}: {key} must be a number, not {value!r}") from None
        if key == "probability" and not 0 <= values[key] <= 1:
            raise ConfigError(f"--fault {text}: probability must be from 0 to 1")
    return Fault(name, MappingProxyType(values), text)


@dataclass(frozen=True)
class Trouble:
    """What will befall one request.

    `refusal` is an HTTP status, 0 for a reset, None for neither; `within` are faults by the
    number of events that have gone out before.
    """

    refusal: int | None = None
    within: Mapping[int, tuple[Fault, ...]] = field(default_factory=dict)
    fragment: bool = False
    count_error: int = 0
    length_error: int = 0
    nonce: int = 0


NO_TROUBLE = Trouble()


class Faults:
    """The faults of a server: who is struck is drawn in the order of arrival."""

    def __init__(self, faults: tuple[Fault, ...], seed: int) -> None:
        self._all = {fault.name: fault for fault in faults}
        self._requests = [f for f in faults if f.name in (*_BEFORE, *_WITHIN, *_ANSWER)]
        self._random = Random(seed ^ 0xFA017)

    def get(self, name: str) -> Fault | None:
        return self._all.get(name)

    def draw(self) -> Trouble:
        """The fate of the next request."""
        if not self._requests:
            return NO_TROUBLE
        struck = [f for f in self._requests if self._random.random() < f["probability"]]
        named = {fault.name: fault for fault in struck}
        refusal = next((name for name in _BEFORE if name in named), None)
        within: dict[int, tuple[Fault, ...]] = {}
        for fault in struck:
            if fault.name in _WITHIN:
                token = int(fault["token"])
                within[token] = (*within.get(token, ()), fault)
        return Trouble(
            refusal=None if refusal is None else int(refusal.partition("-")[2] or 0),
            within=within,
            fragment="fragment" in named,
            count_error=int(named["wrong-count"]["by"]) if "wrong-count" in named else 0,
            length_error=int(named["wrong-length"]["by"]) if "wrong-length" in named else 0,
            nonce=self._random.getrandbits(64) if "wrong-text" in named else 0,
        )

    def slowdown(self, elapsed: float) -> float:
        """The factor on a step's duration `elapsed` seconds after the server was ready."""
        factor = 1.0
        throttle, drift = self.get("throttle"), self.get("drift")
        if throttle is not None and elapsed >= throttle["after"]:
            lasting = throttle["lasting"]
            if not lasting or elapsed < throttle["after"] + lasting:
                factor *= throttle["factor"]
        if drift is not None:
            factor *= 1.0 + drift["rate"] * elapsed / 60.0
        return factor
