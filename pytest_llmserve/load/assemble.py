"""From decoded exchanges to the arrays of a Record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmserve.load.client import Exchange
    from pytest_llmserve.load.clock import Clock
    from pytest_llmserve.load.record import Array


def arrays(exchanges: Sequence[Exchange], clock: Clock) -> dict[str, Array]:
    """All arrays of the record of these exchanges, which are decoded and ended."""
    rows = sorted(exchanges, key=lambda exchange: exchange.intended)
    answers = [row.answer for row in rows]
    assert all(answer is not None for answer in answers)

    def column(values: list[Any], dtype: str) -> Array:
        return np.array(values, dtype=dtype)

    def events(name: str, dtype: str) -> Array:
        parts = [np.frombuffer(getattr(answer, name), dtype=dtype) for answer in answers]
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    counts = column([len(answer.reads) for answer in answers if answer], "int32")
    request = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    times, lags = clock.arrivals(events("stamps", "int64"), events("reads", "float64"))
    places = events("places", "int32")
    same = request[1:] == request[:-1]
    coalesced = np.zeros(len(request), dtype=bool)
    coalesced[1:] = same & (places[1:] == places[:-1])

    starts = np.cumsum(counts) - counts
    first, last = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    some = counts > 0
    first[some] = times[starts[some]]
    last[some] = times[(starts + counts - 1)[some]]

    # What the transport saw end stands where it broke off; a whole answer ended with its last data.
    ended, _ = clock.arrivals(
        column([answer.end_stamp for answer in answers if answer], "int64"),
        column([answer.end_read for answer in answers if answer], "float64"),
    )
    end = column([row.end for row in rows], "float64")
    clean = column([row.error == 0 for row in rows], "bool") & np.isfinite(ended)
    end = np.where(clean, ended, end)

    output = column([answer.output_tokens for answer in answers if answer], "int32")
    tokens = _tokens(events("totals", "int32"), request, starts, counts, output)
    return {
        "phase": column([row.phase for row in rows], "uint8"),
        "user": column([row.user for row in rows], "int32"),
        "intended": column([row.intended for row in rows], "float64"),
        "sent": column([row.sent for row in rows], "float64"),
        "first": first,
        "last": last,
        "end": end,
        "connect": column([row.connect for row in rows], "float64"),
        "status": column([answer.status for answer in answers if answer], "int16"),
        "error": column([answer.error for answer in answers if answer], "uint8"),
        "prompt_tokens": column([answer.prompt_tokens for answer in answers if answer], "int32"),
        "output_tokens": output,
        "cached_tokens": column([answer.cached_tokens for answer in answers if answer], "int32"),
        "want_prompt": column([row.want_prompt for row in rows], "int32"),
        "want_output": column([row.want_output for row in rows], "int32"),
        "events": counts,
        "event_request": request,
        "event_time": times,
        "event_lag": lags.astype(np.float32),
        "event_tokens": tokens,
        "event_coalesced": coalesced,
    }


def _tokens(totals: Array, request: Array, starts: Array, counts: Array, output: Array) -> Array:
    """Tokens of each event: exact where every event tells the total, else an even share."""
    if not len(totals):
        return np.empty(0, np.float32)
    share = np.where(output < 0, 1.0, output / np.maximum(counts, 1))
    tokens = share[request]
    gains = np.diff(totals, prepend=0)
    first = starts[counts > 0]
    gains[first] = totals[first]
    told = np.ones(len(counts), dtype=bool)
    told[request[(totals < 0) | (gains < 0)]] = False
    exact = told[request]
    tokens[exact] = gains[exact]
    return tokens.astype(np.float32)


def timestamps(record_lags: Array) -> Literal["kernel", "user"]:
    """Where the arrivals come from: `kernel` only if every one does."""
    return "kernel" if len(record_lags) and not np.isnan(record_lags).any() else "user"


def token_source(columns: dict[str, Array]) -> Literal["usage", "events"]:
    """Where token counts come from: `usage` only if every whole answer had it."""
    whole = columns["error"] == 0
    return "events" if (columns["output_tokens"][whole] < 0).any() else "usage"
