"""What the client saw, as arrays: the one input of all metrics.

Times are float64 seconds on `time.monotonic()` (CLOCK_MONOTONIC) of the client's machine; a
time that does not exist is NaN; a count that is not known is -1.

Requests, one row each (`R` rows, in order of `intended`):

| array | type | meaning (METRICS.md) |
|---|---|---|
| `phase` | uint8 | 0 warm-up, 1 planned |
| `user` | int32 | closed loop: the user; open loop: -1 |
| `intended` `sent` `first` `last` `end` | float64 | `t_intended` … `t_end` |
| `connect` | float64 | seconds spent opening a connection for it, 0 on a reused one |
| `status` | int16 | HTTP status, 0 without an answer |
| `error` | uint8 | index into `ERRORS` |
| `prompt_tokens` `output_tokens` `cached_tokens` | int32 | as the server's usage says |
| `want_prompt` `want_output` | int32 | as the plan asked |
| `events` | int32 | events that carried output |

Events that carried output, one row each (`E` rows, grouped by request, in order of arrival):

| array | type | meaning |
|---|---|---|
| `event_request` | int32 | row of its request |
| `event_time` | float64 | arrival |
| `event_lag` | float32 | `client_lag`: read − kernel arrival; NaN without kernel timestamps |
| `event_tokens` | float32 | tokens it carried: exact if every event says so or carries one, else
  an even share of `output_tokens` |
| `event_coalesced` | bool | it came in the same read as the event before it |
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Kinds of failure of one request, in the order of their codes.
ERRORS = (
    "none",
    "refused",  # the connection could not be opened
    "http_status",  # a status other than 200, or an error object in the stream
    "reset",  # the connection broke before the answer was complete
    "truncated",  # the stream ended without [DONE] or the promised bytes
    "malformed",  # not HTTP, not SSE or not JSON
    "timeout",  # the request's time-out passed
    "wrong_length",  # complete, but not the output length that was asked for
    "cancelled",  # cut off by the plan after the drain; not a fault of the server
)


@dataclass(frozen=True)
class RecordInfo:
    """Facts of the whole record. Times are seconds on the same clock as the arrays.

    `ramp_end` is when the measured interval may begin (all users started, or lead-in over) and
    `plan_end` when the plan stops sending. `wall_offset` added to a time gives Unix time.
    `timestamps` says where arrivals come from, `token_source` where token counts do.
    `cpu` is the CPU time the client used from `start` to the last request's end, `spun` the part of
    it in which it only waited for a time that was near; `stalls` the
    longest time its loop was away; `decode_cpu` is what decoding took afterwards. `incomplete`
    is true if the run was interrupted. `shards` is how many processes drove the load; `cpu` is
    then their sum.
    """

    start: float
    ramp_end: float
    plan_end: float
    wall_offset: float
    timestamps: Literal["kernel", "user"]
    token_source: Literal["usage", "events"]
    cpu: float
    stalls: float
    incomplete: bool
    version: str
    decode_cpu: float = 0.0
    shards: int = 1
    spun: float = 0.0


@dataclass(frozen=True)
class Record:
    """All arrays of one load (see the module's text) and its facts."""

    info: RecordInfo
    phase: Array
    user: Array
    intended: Array
    sent: Array
    first: Array
    last: Array
    end: Array
    connect: Array
    status: Array
    error: Array
    prompt_tokens: Array
    output_tokens: Array
    cached_tokens: Array
    want_prompt: Array
    want_output: Array
    events: Array
    event_request: Array
    event_time: Array
    event_lag: Array
    event_tokens: Array
    event_coalesced: Array

    def save(self, path: Path) -> None:
        """Write a compressed `.npz` (NumPy arrays, no pickle; `info` is JSON in a byte array)."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "info"}
        info = np.frombuffer(json.dumps(asdict(self.info)).encode(), dtype=np.uint8)
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, info=info, **arrays)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            info = RecordInfo(**json.loads(data["info"].tobytes()))
            return cls(info=info, **{name: data[name] for name in data.files if name != "info"})
