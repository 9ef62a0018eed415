"""Result files for tests and benchmarks of the reports, made by arithmetic and not by a server.

Not measurements: every figure comes from a seeded random generator. The metrics are computed from
the arrays by the real `measure`, so that figures and arrays agree as in a real result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pytest_llmserve.load.plan import ClosedLoop, LoadPlan, Workload
from pytest_llmserve.load.record import ERRORS, Record, RecordInfo
from pytest_llmserve.measurement import plan_facts
from pytest_llmserve.metrics.definitions import METRICS_VERSION, measure
from pytest_llmserve.verdict.fingerprint import load_key

START = 5000.0
CAPSTONE = "suites/capstone/test_capstone.py::test_thirty_users"
CURVE = "suites/capstone/test_capstone.py::test_latency_under_load"


def make_record(
    users: int,
    duration: float,
    *,
    output_tokens: int = 64,
    speed: float = 1.0,
    seed: int = 0,
    failures: int = 0,
    wall: float = 1_790_000_000.0,
) -> tuple[Record, LoadPlan]:
    """A closed loop as it might look; `speed` scales the server, `failures` resets so many."""
    rng = np.random.default_rng(seed)
    plan = LoadPlan(ClosedLoop(users), Workload(128, output_tokens), duration=duration, seed=seed)
    ramp = plan.lead
    step = (0.012 + 0.0004 * users) / speed
    each = 0.03 + 0.004 * users + output_tokens * step
    rounds = int((ramp + duration) / each) + 2
    shape = (users, rounds)
    first = (0.02 + 0.006 * users * rng.gamma(2.0, 0.5, shape)) / speed
    gaps = step * rng.gamma(60.0, 1 / 60.0, (*shape, output_tokens - 1)).astype(np.float32)
    lasting = first + gaps.sum(axis=2)
    begin = START + np.linspace(0, ramp, users, endpoint=False)[:, None]
    ends = begin + np.cumsum(lasting + 1e-4, axis=1)
    intended = ends - lasting
    keep = intended < START + ramp + duration
    order = np.argsort(intended[keep], kind="stable")
    wanted, ttft = intended[keep][order], first[keep][order]
    gap = gaps[keep][order].astype(float)
    n = len(wanted)
    times = np.concatenate([np.zeros((n, 1)), np.cumsum(gap, axis=1)], axis=1)
    times += (wanted + ttft)[:, None]
    error = np.zeros(n, np.uint8)
    error[rng.choice(n, failures, replace=False)] = ERRORS.index("reset")
    end = times[:, -1].copy()
    user = np.broadcast_to(np.arange(users)[:, None], shape)[keep][order]
    full = np.full(n, output_tokens, np.int32)
    events = full.copy()
    count = n * output_tokens
    record = Record(
        info=RecordInfo(
            start=START, ramp_end=START + ramp, plan_end=START + ramp + duration,
            wall_offset=wall - START, timestamps="kernel", token_source="usage", cpu=1.0,
            stalls=0.001, incomplete=False, version="1",
        ),
        phase=np.ones(n, np.uint8), user=user.astype(np.int32), intended=wanted,
        sent=wanted + rng.uniform(5e-5, 2e-4, n), first=times[:, 0].copy(),
        last=end.copy(), end=end,
        connect=np.zeros(n), status=np.full(n, 200, np.int16), error=error,
        prompt_tokens=np.full(n, 128, np.int32), output_tokens=full,
        cached_tokens=np.zeros(n, np.int32), want_prompt=np.full(n, 128, np.int32),
        want_output=full, events=events,
        event_request=np.repeat(np.arange(n, dtype=np.int32), output_tokens),
        event_time=times.ravel(), event_lag=rng.uniform(1e-5, 2e-4, count).astype(np.float32),
        event_tokens=np.ones(count, np.float32), event_coalesced=np.zeros(count, bool),
    )  # fmt: skip
    return record, plan


def make_run(
    folder: Path,
    name: str,
    users: int,
    duration: float = 12.0,
    *,
    test: str = CAPSTONE,
    emulated: bool = True,
    engine: str = "emulator",
    engine_version: str = "1.0",
    server: str = "qwen3-8b-nvfp4",
    model: str = "Qwen3-8B-NVFP4",
    bounds: Sequence[tuple[str, str, float]] = (),
    checks: Sequence[tuple[str, bool, str]] = (("delivered load", True, "all users were served"),),
    gauges: bool = True,
    extra: Mapping[str, Any] | None = None,
    **record_options: Any,
) -> dict[str, Any]:
    """One run of a result document; its arrays are written to `folder`/NAME.npz."""
    record, plan = make_record(users, duration, **record_options)
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder / f"{name}.npz")
    metrics = measure(record, plan)
    verdicts = [_judge(metrics, *bound) for bound in bounds]
    valid = all(ok for _, ok, _ in checks)
    worst = min(
        (v["verdict"] for v in verdicts), key=("fail", "inconclusive", "pass").index, default=None
    )
    counters: dict[str, Any] = {"generation_tokens": float(record.event_tokens.sum())}
    if gauges:
        counters["series"] = _gauges(record, users)
    hardware = "emulated-dgx-spark" if emulated else "dgx-spark"
    return {
        "test": test, "server": server, "engine": engine, "engine_version": engine_version,
        "model": model, "emulated": emulated, "load": dict(plan_facts(plan)), "metrics": metrics,
        "server_metrics": counters,
        "validity": [{"check": c, "ok": ok, "detail": d} for c, ok, d in checks],
        "verdicts": verdicts, "verdict": worst if valid else "invalid",
        "fingerprint": {
            "args.max-num-seqs": 64, "emulated": emulated, "engine": engine,
            "engine_version": engine_version, "hardware": hardware, "load": load_key(plan),
            "metrics_version": METRICS_VERSION, "model": model, "server": server, **(extra or {}),
        },
        "events": f"{name}.npz",
    }  # fmt: skip


def add_telemetry(run: dict[str, Any]) -> None:
    """What a server and its GPU say of themselves beside a load, put into a run."""
    times = [0.5 * i for i in range(9)]
    n = len(times)
    slow = [0.0, 0.0, 1.0, 1.0] + [0.0] * (n - 4)
    run["metrics"] |= {
        "server": {
            "running": {"mean": 7.5, "max": 8.0}, "waiting": {"mean": 0.0, "max": 1.0},
            "kv_usage": {"mean": 0.1, "max": 0.16, "last": 0.0}, "preemptions": 2.0,
            "prefix_hit_rate": 0.012, "acceptance_rate": None, "accepted_length": None,
            "queue_time": {"mean": 0.0021}, "output_throughput": 480.25,
        },
        "gpu": {
            "power": {"mean": 350.0, "max": 420.5}, "sm_clock": {"mean": 1.98e9, "min": 1.2e9},
            "utilization": {"mean": 0.97, "max": 1.0}, "temperature": {"mean": 61.0, "max": 66.0},
            "memory_used": {"mean": 7.2e10, "max": 7.3e10}, "throttled": 0.2, "energy": 1400.0,
        },
        "energy_per_token": 0.0731, "roofline": 0.413,
    }  # fmt: skip
    run["telemetry"] = {
        "gpus": [{"id": "GPU-0", "name": "NVIDIA H200"}], "energy_source": "counter",
        "series": {
            "time": times, "gpu.utilization": [0.97] * n, "throttled": slow,
            "gpu.power": [350.0 + 5 * i for i in range(n)],
            "gpu.sm_clock": [1.2e9 if s else 1.98e9 for s in slow],
            "gpu.temperature": [58.0 + i for i in range(n)], "gpu.memory_used": [7.2e10] * n,
        },
    }  # fmt: skip
    lines = ["weights read in a step 16.4 GB", "a step takes 3.4 ms: 8 sequences, 2,350 tokens/s"]
    run["roofline"] = {"share": 0.413, "ceiling": 2350.0, "bound": "bandwidth", "lines": lines}


def document(*runs: Mapping[str, Any]) -> dict[str, Any]:
    """A result document of runs."""
    prints = [run["fingerprint"] for run in runs]
    return {
        "schema": "llmserve-result/1",
        "metrics_version": METRICS_VERSION,
        "emulated": any(run["emulated"] for run in runs),
        "fingerprint": {k: v for k, v in prints[0].items() if all(p.get(k) == v for p in prints)},
        "runs": list(runs),
    }


def capstone(folder: Path, **options: Any) -> dict[str, Any]:
    """Thirty users that pass, and a curve of latency under load."""
    bounds = (("output_throughput", ">=", 800.0), ("ttft.p95", "<=", 0.5))
    runs = [make_run(folder, "thirty", 30, bounds=bounds, **options)]
    for users in (1, 2, 4, 8, 16, 30):
        asked = bounds[:1] if users == 30 else ()
        runs.append(
            make_run(folder, f"curve-{users}", users, 8.0, test=CURVE, bounds=asked, **options)
        )
    return document(*runs)


def write(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a document as a result file."""
    path.write_text(json.dumps(content, allow_nan=False))
    return path


def _judge(metrics: Mapping[str, Any], name: str, relation: str, bound: float) -> dict[str, Any]:
    group, _, statistic = name.partition(".")
    value = metrics[group][statistic] if statistic else metrics[group]
    good = value >= bound if relation == ">=" else value <= bound
    sure = statistic in ("", "p50") or statistic in metrics[group]["certified"]
    verdict = ("pass" if good else "fail") if sure else "inconclusive"
    reason = {
        "pass": "met",
        "fail": f"measured {value:.4g}, asked for {relation} {bound:g}",
        "inconclusive": f"{metrics[group]['n'] if statistic else 0} samples are too few",
    }[verdict]
    return {
        "objective": f"{name} {relation} {bound:g}", "measured": value, "bound": bound,
        "verdict": verdict, "reason": reason,
    }  # fmt: skip


def _gauges(record: Record, users: int) -> dict[str, list[float | None]]:
    times = np.arange(record.info.start, record.end.max(), 0.5)
    sent, end = np.sort(record.sent), np.sort(record.end)
    flight = np.searchsorted(sent, times) - np.searchsorted(end, times)
    waiting = np.maximum(0, flight - 24)
    return {
        "time": (times - record.info.start).tolist(),
        "running": (flight - waiting).astype(float).tolist(),
        "waiting": waiting.astype(float).tolist(),
        "kv_usage": (0.02 * flight).clip(0, 1).tolist(),
    }
