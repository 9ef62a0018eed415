"""Results of other load generators, read for what they mean.

Only what METRICS.md defines in the same way gets our name. All else keeps the tool's own name
("vllm:ttft.p99"), so that two files of one tool can be compared in it but never with ours; why it
is not the same is said. Values are turned into seconds.

What `vllm bench serve --save-result` calls TPOT and ITL are ours, over all requests of its run; so
is AIPerf's inter-token latency, which is a mean per request and thus our TPOT. guidellm's
inter-token latency is weighted by tokens, so nothing of it is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WHOLE_RUN = "it is over the whole run, ramp and drain included, and ours over the steady state"
_FROM_SENT = "it is timed from when the request was sent, and ours from when it was meant to be"


@dataclass(frozen=True)
class Foreign:
    """One run of another tool: `tool`, a `name` of what was run, values by (our or their) name,
    and why their names are not ours."""

    tool: str
    name: str
    values: Mapping[str, float]
    unlike: Mapping[str, str]


def read_foreign(content: Any) -> list[Foreign] | None:
    """The runs in another tool's decoded JSON; None if it is not of a tool that is known."""
    if not isinstance(content, dict):
        return None
    if "total_output_tokens" in content and "request_throughput" in content:
        return [_vllm(content)]
    if isinstance(content.get("benchmarks"), list) and any(
        isinstance(entry, dict) and "metrics" in entry for entry in content["benchmarks"]
    ):
        found = [e for e in content["benchmarks"] if isinstance(e, dict) and "metrics" in e]
        return [_guidellm(entry, number) for number, entry in enumerate(found)]
    if any(isinstance(content.get(key), dict) and "avg" in content[key] for key in _AIPERF):
        return [_aiperf(content)]
    return None


def _vllm(content: Mapping[str, Any]) -> Foreign:
    values: dict[str, float] = {}
    for theirs, ours in (
        ("ttft", "vllm:ttft"),
        ("tpot", "tpot"),
        ("itl", "itl"),
        ("e2el", "vllm:e2e"),
    ):
        for key, statistic in (("mean", "mean"), ("median", "p50"), *_percentiles(content, theirs)):
            _put(values, f"{ours}.{statistic}", content.get(f"{key}_{theirs}_ms"), 1e-3)
    for key in ("output_throughput", "total_token_throughput", "request_throughput"):
        _put(values, f"vllm:{key}", content.get(key))
    load = content.get("max_concurrency") or content.get("request_rate")
    unlike = {
        "vllm:ttft": _FROM_SENT,
        "vllm:e2e": _FROM_SENT,
        "vllm:output_throughput": _WHOLE_RUN,
        "vllm:total_token_throughput": _WHOLE_RUN,
        "vllm:request_throughput": _WHOLE_RUN,
    }
    return Foreign("vllm", f"{content.get('model_id', 'model')} at {load}", values, unlike)


def _percentiles(content: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    return [(f"p{p}", f"p{p}") for p in (50, 90, 95, 99) if f"p{p}_{name}_ms" in content]


_GUIDELLM = {
    "time_to_first_token_ms": ("ttft", 1e-3, _FROM_SENT),
    "inter_token_latency_ms": ("tpot", 1e-3, "it weights each request's mean by its tokens"),
    "request_latency": ("e2e", 1.0, _FROM_SENT),
    "output_tokens_per_second": ("output_throughput", 1.0, _WHOLE_RUN),
    "requests_per_second": ("request_throughput", 1.0, _WHOLE_RUN),
}


def _guidellm(entry: Mapping[str, Any], number: int) -> Foreign:
    values: dict[str, float] = {}
    metrics = entry["metrics"] if isinstance(entry["metrics"], dict) else {}
    for theirs, (name, scale, _) in _GUIDELLM.items():
        group = metrics.get(theirs)
        group = group.get("successful") if isinstance(group, dict) else None
        if not isinstance(group, dict):
            continue
        if name.endswith("throughput"):
            _put(values, f"guidellm:{name}", group.get("mean"), scale)
            continue
        percentiles = group.get("percentiles")
        _put(values, f"guidellm:{name}.mean", group.get("mean"), scale)
        for p in ("p50", "p90", "p95", "p99"):
            value = percentiles.get(p) if isinstance(percentiles, dict) else None
            _put(values, f"guidellm:{name}.{p}", value, scale)
    config = entry.get("config")
    strategy = config.get("strategy", {}) if isinstance(config, dict) else {}
    how = strategy if isinstance(strategy, dict) else {}
    amount = how.get("streams") or how.get("rate") or number
    unlike = {f"guidellm:{name}": why for name, _, why in _GUIDELLM.values()}
    return Foreign("guidellm", f"{how.get('type_', 'benchmark')} {amount}", values, unlike)


_AIPERF = {
    "time_to_first_token": ("aiperf:ttft", _FROM_SENT),
    "inter_token_latency": ("tpot", ""),
    "request_latency": ("aiperf:e2e", _FROM_SENT),
    "output_token_throughput": ("aiperf:output_throughput", _WHOLE_RUN),
    "request_throughput": ("aiperf:request_throughput", _WHOLE_RUN),
}
_SCALES = {"ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "sec": 1.0, "s": 1.0, "seconds": 1.0}


def _aiperf(content: Mapping[str, Any]) -> Foreign:
    values: dict[str, float] = {}
    for theirs, (name, _) in _AIPERF.items():
        group = content.get(theirs)
        if not isinstance(group, dict):
            continue
        if name.endswith("throughput"):
            _put(values, name, group.get("avg"))
            continue
        scale = _SCALES.get(str(group.get("unit", "ms")), math.nan)
        for key in ("avg", "p50", "p90", "p95", "p99"):
            _put(values, f"{name}.{'mean' if key == 'avg' else key}", group.get(key), scale)
    unlike = {name: why for name, why in _AIPERF.values() if why}
    return Foreign("aiperf", "profile", values, unlike)


def _put(values: dict[str, float], name: str, value: Any, scale: float = 1.0) -> None:
    """Keep a value if it is a positive finite number: other values have no ratio."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    scaled = value * scale
    if math.isfinite(scaled) and scaled > 0:
        values[name] = scaled
