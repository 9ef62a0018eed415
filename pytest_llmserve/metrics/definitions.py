"""What every metric means, as code: METRICS.md over the arrays of a record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_llmserve.load.record import ERRORS
from pytest_llmserve.metrics.percentiles import describe
from pytest_llmserve.metrics.window import window

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.load.record import Array, Record

#: Raised with every change of a meaning here. Results of different versions are not compared.
METRICS_VERSION = 1

_CANCELLED = ERRORS.index("cancelled")


def per_request(record: Record) -> dict[str, Array]:
    """`ttft tpot e2e send_delay user_throughput output_tokens`, one value for each row.

    Seconds, rates per second, tokens; NaN where undefined (METRICS.md, Per request).
    """
    tokens = _output_tokens(record)
    first_tokens = np.zeros(len(record.events))
    some = record.events > 0
    starts = (np.cumsum(record.events) - record.events)[some]
    first_tokens[some] = record.event_tokens[starts]
    with np.errstate(divide="ignore", invalid="ignore"):
        later = np.where(record.events > 1, tokens - first_tokens, np.nan)
        later = np.where(later > 0, later, np.nan)
        tpot = (record.last - record.first) / later
        speed = np.where(tpot > 0, 1.0 / tpot, np.nan)
    return {
        "ttft": record.first - record.intended,
        "tpot": tpot,
        "e2e": record.end - record.intended,
        "send_delay": record.sent - record.intended,
        "user_throughput": speed,
        "output_tokens": tokens,
    }


def _output_tokens(record: Record) -> Array:
    """Tokens of each answer: the server's count, else those of its events."""
    counted = np.bincount(
        record.event_request, weights=record.event_tokens, minlength=len(record.events)
    )
    return np.where(record.output_tokens >= 0, record.output_tokens, counted)


def measure(
    record: Record, plan: LoadPlan, *, objectives: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All metrics of one load, nested as in the result file; what cannot be measured is None.

    A request belongs to the window if it was intended in it; its latencies count even if they
    ended during the drain, because leaving out the slow ones would flatter the server. Requests
    that failed have no latencies; those that the drain cut off keep their `ttft`. Events belong
    by their own time. `objectives` are upper bounds by metric (`{"ttft": 0.5, "tpot": 0.05}`)
    that a request must meet to count for `goodput`.
    """
    start, end = window(record, plan)
    duration = end - start
    planned = record.phase == 1
    inside = planned & (record.intended >= start) & (record.intended < end)
    whole = record.error == 0
    values = per_request(record)
    cut = record.error == _CANCELLED
    answered = inside & (whole | (cut & ~np.isnan(record.first)))

    event_planned = planned[record.event_request]
    at = record.event_time
    event_inside = event_planned & (at >= start) & (at < end)
    gaps = np.diff(at, prepend=np.nan)
    follows = np.zeros(len(at), dtype=bool)
    follows[1:] = record.event_request[1:] == record.event_request[:-1]
    tokens = record.event_tokens.astype(np.float64)

    output = float(tokens[event_inside].sum())
    prefilled = planned & (record.first >= start) & (record.first < end)
    prompt = np.where(record.prompt_tokens >= 0, record.prompt_tokens, record.want_prompt)
    prompts = int(prompt[prefilled].sum())
    ended = planned & whole & (record.end >= start) & (record.end < end)
    events_inside = int(event_inside.sum())

    def rate(amount: float) -> float | None:
        return amount / duration if duration > 0 else None

    return {
        "window": {
            "start": start - record.info.start,
            "end": end - record.info.start,
            "duration": duration,
        },
        "ttft": describe(values["ttft"][answered]),
        "tpot": describe(values["tpot"][inside & whole]),
        "itl": describe(gaps[event_inside & follows]),
        "e2e": describe(values["e2e"][inside & whole]),
        "send_delay": describe(values["send_delay"][inside]),
        "client_lag": describe(record.event_lag[event_inside]),
        "user_throughput": describe(values["user_throughput"][inside & whole]),
        "connect": describe(record.connect[inside & (record.connect > 0)]),
        "output_throughput": rate(output),
        "total_throughput": rate(output + prompts),
        "request_throughput": rate(int(ended.sum())),
        "concurrency": concurrency(record, start, end),
        "requests": int(inside.sum()),
        "errors": {
            kind: int(count)
            for kind, count in zip(
                ERRORS[1:],
                np.bincount(record.error[planned], minlength=len(ERRORS))[1:],
                strict=True,
            )
            if count
        },
        "censored": int((inside & cut & np.isnan(record.first)).sum()),
        "prompt_tokens": prompts,
        "output_tokens": output,
        "tokens_per_event": output / events_inside if events_inside else None,
        "coalesced": (
            float(record.event_coalesced[event_inside].mean()) if events_inside else None
        ),
        "timestamps": record.info.timestamps,
        "token_source": record.info.token_source,
        **({"goodput": goodput(record, plan, objectives)} if objectives else {}),
    }


def concurrency(record: Record, start: float, end: float) -> dict[str, float | int | None]:
    """Time-average and maximum of the requests in flight (sent and not ended) in a window."""
    sent = ~np.isnan(record.sent) & (record.phase == 1)
    began, over = record.sent[sent], np.nan_to_num(record.end[sent], nan=end)
    if end <= start:
        return {"mean": None, "max": 0}
    share = np.minimum(over, end) - np.maximum(began, start)
    mean = float(share[share > 0].sum() / (end - start))
    during = (over > start) & (began < end)
    times = np.concatenate([np.maximum(began[during], start), over[during]])
    steps = np.concatenate([np.ones(during.sum(), int), -np.ones(during.sum(), int)])
    # Of what happens at the same time the endings come first: a user is one request.
    order = np.lexsort((steps, times))
    return {"mean": mean, "max": int(np.cumsum(steps[order]).max(initial=0))}


def goodput(
    record: Record, plan: LoadPlan, objectives: Mapping[str, float]
) -> dict[str, float | None]:
    """Requests per second, and the fraction of them, that meet every bound.

    Bounds are on `ttft tpot e2e` (seconds, at most) and `user_throughput` (at least). A request
    that failed or was cut off meets none; a value that is undefined (tpot of one event) meets its.
    """
    start, end = window(record, plan)
    inside = (record.phase == 1) & (record.intended >= start) & (record.intended < end)
    values = per_request(record)
    good = inside & (record.error == 0)
    for name, bound in objectives.items():
        value = values[name]
        met = value >= bound if name == "user_throughput" else value <= bound
        good &= met | np.isnan(value)
    n = int(inside.sum())
    return {
        "rate": float(good.sum()) / (end - start) if end > start else None,
        "fraction": float(good.sum()) / n if n else None,
    }
