"""Is this a measurement at all? (METRICS.md, Validity.) Asked before any verdict.

Each question is a small function that gives one `Check`, or None if it does not apply to the
load. A check that could not be made because the server says too little is not a failed one; its
sentence says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_llmserve.load.plan import ClosedLoop
from pytest_llmserve.load.record import ERRORS
from pytest_llmserve.load.schedule import arrival_times
from pytest_llmserve.metrics.definitions import concurrency
from pytest_llmserve.run import Check

if TYPE_CHECKING:
    from pytest_llmserve.load.calibration import Calibration
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.load.record import Record

#: Part by which the delivered load and the lengths may differ from those that were asked for.
DELIVERED = 0.02
#: Part by which the client's and the server's token counts may differ.
COUNTS = 0.01
#: The client's own delay may be this part of a bound on a latency, or this long if that is more.
DELAY_SHARE, DELAY = 0.01, 1e-3
#: The client's own delay may be this long if no latency is asserted: figures are shown with it.
DELAY_UNASSERTED = 10e-3
#: Part of one core from which the client's process counts as saturated, and part of the events a
#: second that its calibration found it can record.
CPU, EVENTS = 0.9, 0.8
#: A client that reads a tenth of what arrives later than this does not keep up. The kernel stamps
#: what waits, but of data that is read at once only the last, and once its buffers are full the
#: server is held up by the client.
BEHIND = 20e-3
#: Part of the output events that may come in the same read as the one before if `itl` is asserted.
COALESCED = 0.05
#: Part of the requests that the drain may cut off before their first token.
CENSORED = 0.01
#: Without kernel timestamps: the longest the client may have looked away, as a part of a bound, or
#: in seconds if that is more.
STALL_SHARE, STALL = 0.1, 0.05
#: By this part, and this many seconds, the server's mean TTFT may exceed the client's.
TTFT_SHARE, TTFT_DELAY = 0.05, 5e-3
#: Tokens that a chat template may put before every prompt, which a prefix cache then knows.
TEMPLATE = 64
#: Prefix hits that pass as chance: part of the tokens looked up.
CHANCE_HITS = 0.01

_OK, _WRONG_LENGTH, _CANCELLED = map(ERRORS.index, ("none", "wrong_length", "cancelled"))


def check(
    record: Record,
    metrics: Mapping[str, Any],
    plan: LoadPlan,
    *,
    counters: Mapping[str, float],
    bounds: Mapping[str, float],
    telemetry: Mapping[str, Any] | None = None,
    allow_errors: float = 0.0,
    alive: bool = True,
    ended: str | None = None,
    calibration: Calibration | None = None,
) -> tuple[Check, ...]:
    """All validity checks of one load.

    `metrics` is `measure`'s result; `counters` the growth of the server's counters over the
    whole load, warm-up included (`metrics.server.delta`; empty if it has none); `telemetry` what
    the GPUs said (`Run.telemetry`); `bounds` the
    bounds of the objectives on latencies, by metric (`{"ttft.p95": 0.5}`); `allow_errors` the
    part of the requests that may fail; `ended` why the server has ended, if that is known;
    `alive` whether the server still answers; `calibration`
    the client's own error on this machine, if it was measured.
    """
    made = (
        _alive(alive, ended),
        _complete(record),
        _window(metrics),
        _rate(record, metrics, plan),
        _concurrency(record, metrics, plan),
        _prompts(record),
        _outputs(record),
        _errors(record, allow_errors),
        _drained(metrics),
        _send_delay(metrics, bounds),
        _client_lag(record, metrics, bounds),
        _keeps_up(record, metrics, calibration),
        _client_error(bounds, calibration),
        _coalescing(metrics, bounds),
        _token_counts(record, counters),
        _server_ttft(record, counters),
        _prefix_cache(record, plan, counters),
        _gpu_throttled(metrics),
        _foreign_process(telemetry or {}),
    )
    return tuple(found for found in made if found is not None)


def _alive(alive: bool, ended: str | None) -> Check:
    if alive:
        return Check("server_alive", True, "the server answered to the end")
    why = f": {ended.removeprefix('the server ')}" if ended else ""
    return Check("server_alive", False, f"the server ended during the load{why}")


def _complete(record: Record) -> Check:
    whole = not record.info.incomplete
    detail = "the whole plan was driven" if whole else "the load was interrupted before its end"
    return Check("complete", whole, detail)


def _window(metrics: Mapping[str, Any]) -> Check:
    duration = metrics["window"]["duration"]
    if duration <= 0:
        return Check(
            "window", False, "there was no steady state: not every user got an answer in time"
        )
    requests = metrics["requests"]
    return Check(
        "window",
        requests > 0,
        f"{requests} requests were begun in a steady state of {duration:.1f} s",
    )


def _rate(record: Record, metrics: Mapping[str, Any], plan: LoadPlan) -> Check | None:
    if isinstance(plan.arrivals, ClosedLoop) or metrics["window"]["duration"] <= 0:
        return None
    planned = int((arrival_times(plan) >= plan.lead).sum())
    start, end = record.info.ramp_end, record.info.plan_end
    of_window = (record.phase == 1) & (record.intended >= start)
    sent = int((of_window & (record.sent < end + DELAY)).sum())
    return Check(
        "rate",
        abs(sent - planned) <= DELIVERED * planned,
        f"{sent} of {planned} planned requests were sent in the measured interval",
    )


def _concurrency(record: Record, metrics: Mapping[str, Any], plan: LoadPlan) -> Check | None:
    if not isinstance(plan.arrivals, ClosedLoop) or metrics["window"]["duration"] <= 0:
        return None
    users, think = plan.arrivals.users, plan.arrivals.think_time
    start = record.info.start + metrics["window"]["start"]
    end = record.info.start + metrics["window"]["end"]
    active = concurrency(record, start, end)["mean"] or 0.0
    thinking = 0.0
    if think:
        since = record.end[record.phase == 1]
        share = np.minimum(since + think, end) - np.maximum(since, start)
        thinking = float(share[share > 0].sum()) / (end - start)
    words = f"{active:.2f} requests were in flight on average"
    if think:
        words += f" and {thinking:.2f} users were thinking"
    return Check(
        "concurrency",
        abs(active + thinking - users) <= DELIVERED * users,
        f"{words}, for {users} users",
    )


def _prompts(record: Record) -> Check:
    known = (record.phase == 1) & (record.prompt_tokens >= 0) & (record.want_prompt >= 0)
    return _lengths("prompt_length", "prompt", record.prompt_tokens, record.want_prompt, known)


def _outputs(record: Record) -> Check:
    whole = (record.error == _OK) | (record.error == _WRONG_LENGTH)
    known = (record.phase == 1) & whole & (record.output_tokens >= 0)
    return _lengths("output_length", "output", record.output_tokens, record.want_output, known)


def _lengths(name: str, what: str, got: Any, want: Any, known: Any) -> Check:
    if not known.any():
        return Check(name, True, f"not checked: no {what} tokens are reported, or none are planned")
    counted, asked = int(got[known].sum()), int(want[known].sum())
    worst = int(np.abs(got[known] - want[known]).max())
    return Check(
        name,
        abs(counted - asked) <= DELIVERED * asked,
        f"{counted} {what} tokens of {asked} that were asked for, at most {worst} off in a request",
    )


def _errors(record: Record, allowed: float) -> Check:
    kinds = np.bincount(record.error, minlength=len(ERRORS))
    failed = {
        kind: int(count)
        for code, (kind, count) in enumerate(zip(ERRORS, kinds, strict=True))
        if count and code not in (_OK, _CANCELLED)
    }
    total, number = len(record.error), sum(failed.values())
    if not number:
        return Check("errors", True, f"none of {total} requests failed")
    listed = ", ".join(f"{kind} {count}" for kind, count in failed.items())
    limit = f", and {allowed:.1%} may" if allowed else ""
    return Check(
        "errors",
        number <= allowed * total,
        f"{number} of {total} requests failed ({listed}){limit}",
    )


def _drained(metrics: Mapping[str, Any]) -> Check:
    cut, total = metrics["censored"], metrics["requests"]
    return Check(
        "drained",
        cut <= CENSORED * total,
        f"{cut} of {total} requests had no token yet when the time to drain was over",
    )


def _tightest(bounds: Mapping[str, float]) -> float:
    """The smallest bound on a latency; 0 without one."""
    latencies = ("ttft", "tpot", "itl", "e2e")
    found = [bound for name, bound in bounds.items() if name.partition(".")[0] in latencies]
    return min(found, default=0.0)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _send_delay(metrics: Mapping[str, Any], bounds: Mapping[str, float]) -> Check:
    p99 = metrics["send_delay"]["p99"]
    # Gaps between tokens do not depend on when the request left.
    to_request = {name: bound for name, bound in bounds.items() if name[:4] in ("ttft", "e2e.")}
    limit = max(DELAY, DELAY_SHARE * _tightest(to_request)) if to_request else DELAY_UNASSERTED
    if p99 is None:
        return Check("send_delay", True, "not checked: no request was begun in the window")
    return Check(
        "send_delay",
        p99 <= limit,
        f"the client sent its requests {_ms(p99)} late (p99), at most {_ms(limit)} may be",
    )


def _client_lag(record: Record, metrics: Mapping[str, Any], bounds: Mapping[str, float]) -> Check:
    if record.info.timestamps == "kernel":
        p99 = metrics["client_lag"]["p99"]
        words = "none was read" if p99 is None else f"the client read them {_ms(p99)} later (p99)"
        return Check("client_lag", True, f"arrivals are stamped by the kernel; {words}")
    limit = max(STALL, STALL_SHARE * _tightest(bounds))
    return Check(
        "client_lag",
        record.info.stalls <= limit,
        "arrivals are stamped when they are read, and the client was away for up to "
        f"{_ms(record.info.stalls)}, at most {_ms(limit)} may be",
    )


def _keeps_up(record: Record, metrics: Mapping[str, Any], calibration: Calibration | None) -> Check:
    """Whether the server was what limited the run, and not the client."""
    length = float(record.end.max(initial=record.info.plan_end)) - record.info.start
    share = max(0.0, record.info.cpu - record.info.spun) / length / record.info.shards
    behind = metrics["client_lag"]["p90"] or 0.0
    rate, limit = _busiest(record), calibration.events_limit if calibration else None
    words = [f"the client used {share:.1%} of one core, {CPU:.0%} is too much"]
    if limit is not None:
        words.append(f"it read up to {rate:,.0f} events/s of the {limit:,.0f} it can read here")
    if behind > BEHIND:
        words.append(f"a tenth of the events waited {_ms(behind)} or more for it")
    kept_up = share < CPU and behind <= BEHIND and (limit is None or rate < EVENTS * limit)
    if not kept_up:
        words.insert(0, "the client was the bottleneck, not the server")
    return Check("client_cpu", kept_up, "; ".join(words))


def _busiest(record: Record) -> float:
    """The most events that one process had to read in a second, each in a read of its own."""
    times = record.event_time[~record.event_coalesced]
    if not len(times):
        return 0.0
    counts = np.bincount((times - times.min()).astype(int))
    return float(counts.max()) / record.info.shards


def _client_error(bounds: Mapping[str, float], calibration: Calibration | None) -> Check | None:
    """Whether what is asserted is more than the client's own error."""
    if calibration is None:
        return None
    of_request, of_gap = calibration.ttft_error["p99"], calibration.itl_error["p99"]
    errors = {"ttft": of_request, "e2e": of_request, "itl": of_gap, "tpot": of_gap}
    below = [
        f"{name} <= {_ms(bound)} is less than {_ms(error)}"
        for name, bound in bounds.items()
        if (error := errors.get(name.partition(".")[0], 0.0)) > bound
    ]
    if below:
        return Check(
            "client_error",
            False,
            f"{'; '.join(below)}, the client's own error on this machine (p99, by its calibration)",
        )
    return Check(
        "client_error",
        True,
        f"the client's own error on this machine is {_ms(of_request)} for TTFT and {_ms(of_gap)} "
        "for ITL (p99, by its calibration)",
    )


def _coalescing(metrics: Mapping[str, Any], bounds: Mapping[str, float]) -> Check | None:
    share = metrics["coalesced"]
    if share is None:
        return None
    words = f"{share:.2%} of the events came together with the one before"
    if share <= COALESCED:
        return Check("coalescing", True, words)
    asserted = any(name.partition(".")[0] == "itl" for name in bounds)
    return Check(
        "coalescing",
        not asserted,
        f"{words}, more than {COALESCED:.0%}: itl, the gaps between them, was not seen",
    )


def _token_counts(record: Record, counters: Mapping[str, float]) -> Check:
    """The server may have made more for requests that were cut off: up to what they asked for."""
    pairs = []
    ok = True
    cut = record.error != _OK
    for name, column, wanted in (
        ("prompt_tokens", record.prompt_tokens, record.want_prompt),
        ("generation_tokens", record.output_tokens, record.want_output),
    ):
        known = column >= 0
        if name not in counters or not known.any():
            continue
        client, server = int(column[known].sum()), counters[name]
        unknown = int(wanted[cut & ~known].sum())
        ok &= client * (1 - COUNTS) <= server <= (client + unknown) * (1 + COUNTS)
        pairs.append(f"{client} {name.replace('_', ' ')} here and {server:.0f} there")
    if not pairs:
        return Check("token_counts", True, "not checked: one side has no token counts")
    return Check("token_counts", bool(ok), "client and server counted " + ", ".join(pairs))


def _server_ttft(record: Record, counters: Mapping[str, float]) -> Check | None:
    seen = ~np.isnan(record.first)
    count = counters.get("ttft.count", 0.0)
    if not count or not seen.any():
        return None
    server = counters["ttft.sum"] / count
    client = float((record.first - record.sent)[seen].mean())
    return Check(
        "server_ttft",
        server <= client * (1 + TTFT_SHARE) + TTFT_DELAY,
        f"mean TTFT from the request's sending was {_ms(client)} here, {_ms(server)} by the server",
    )


def _prefix_cache(record: Record, plan: LoadPlan, counters: Mapping[str, float]) -> Check:
    queried, hits = counters.get("prefix_queries", 0.0), counters.get("prefix_hits", 0.0)
    if not queried:
        return Check("prefix_cache", True, "not checked: the server counts no prefix look-ups")
    workload = plan.workload
    template = TEMPLATE if workload.api == "chat" else 0
    known = [workload.known_tokens(turn) for turn in range(workload.turns)]
    # A user's requests are in order in the record, so their places tell the turns.
    turns = np.zeros(len(record.phase), dtype=int)
    for user in np.unique(record.user[record.phase == 1]) if workload.turns > 1 else ():
        rows = np.flatnonzero((record.user == user) & (record.phase == 1))
        turns[rows] = np.arange(len(rows)) % workload.turns
    most = float((np.array(known)[turns] + template).sum()) + CHANCE_HITS * queried
    seen = max(0, len(record.phase) - 2 * workload.prefixes)
    least = 0.5 * workload.shared_prefix * seen if workload.shared_prefix > 64 else 0.0
    if workload.dataset:
        least, most = 0.0, queried  # what the prompts of a file have in common is not known
    return Check(
        "prefix_cache",
        least <= hits <= most,
        f"{hits:.0f} of {queried:.0f} prompt tokens came from the prefix cache, "
        f"where {least:.0f} to {most:.0f} are intended",
    )


def _gpu_throttled(metrics: Mapping[str, Any]) -> Check | None:
    """Whether heat or a power brake slowed the GPU down. A cap on power in software is told only:
    a chip that works at its rated power has it all the time."""
    gpu = metrics.get("gpu")
    if not isinstance(gpu, Mapping):
        return None
    throttled, capped = gpu.get("throttled"), gpu.get("power_capped")
    if throttled is None:
        return Check("gpu_throttled", True, "not checked: the GPU does not tell why clocks are low")
    hottest = (gpu.get("temperature") or {}).get("max")
    words = f"in {throttled:.1%} of the window the GPU was slowed down by heat or a power brake"
    words += f", it was up to {hottest:.0f} °C warm" if hottest is not None else ""
    words += f"; its power was capped in {capped:.1%} of it, which is no fault" if capped else ""
    return Check("gpu_throttled", throttled == 0, words)


def _foreign_process(telemetry: Mapping[str, Any]) -> Check | None:
    """Whether somebody else computed on the server's GPUs. Judged only if the list of processes
    shows the server's own: inside a container it may hold those of the host, or none."""
    processes = telemetry.get("processes")
    if not isinstance(processes, Mapping):
        return None
    if not processes["checked"]:
        return Check(
            "foreign_process",
            True,
            "not checked: the GPU's list of processes does not show the server's own",
        )
    others = ", ".join(f"{one['program']} ({one['pid']})" for one in processes["foreign"])
    words = f"{others} computed on the server's GPU too" if others else "the server was alone"
    return Check("foreign_process", not others, words if others else f"{words} on its GPU")
