"""Export in the JSON format of pytest-benchmark, which other tools read too.

Its unit is seconds and less is better, so a run is given as seconds per output token
(1 / output_throughput): `ops` is then output tokens per second. Runs of the same test and load (and
side of an A/B comparison) are the rounds of one benchmark. Invalid runs are left out. Emulated ones
say so in their name, group and `extra_info`.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_llmserve.report.files import write_whole

#: The version of the format: that of the pytest-benchmark that wrote files of this shape.
FORMAT_VERSION = "5.1.0"


def document(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The export of runs as the result file has them (`runs` there)."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        if all(c["ok"] for c in run["validity"]) and run["metrics"].get("output_throughput"):
            load = str(run["fingerprint"].get("load", ""))
            key = run["test"], " ".join(filter(None, (run.get("label"), load)))
            groups.setdefault(key, []).append(run)
    several = len({test for test, _ in groups}) < len(groups)
    return {
        "machine_info": _machine(),
        "commit_info": {},
        "benchmarks": [
            _benchmark(test, load if several else "", found)
            for (test, load), found in groups.items()
        ],
        "datetime": datetime.now(UTC).isoformat(),
        "version": FORMAT_VERSION,
    }


def write(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the export whole or not at all."""
    text = json.dumps(document(runs), indent=4, allow_nan=False) + "\n"
    write_whole(path, text)


def _benchmark(test: str, load: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    emulated = any(run["emulated"] for run in runs)
    suffix = f"[{load}]" if load else ""
    mark = " (emulated)" if emulated else ""
    latest = runs[-1]
    return {
        "group": f"seconds per output token{mark}",
        "name": f"{test.rsplit('::', 1)[-1]}{suffix}{mark}",
        "fullname": f"{test}{suffix}{mark}",
        "params": None,
        "param": load or None,
        "extra_info": {
            "unit": "seconds per output token",
            "emulated": emulated,
            "server": latest["server"],
            "engine": latest["engine"],
            "model": latest["model"],
            "verdict": latest["verdict"],
        },
        "options": {
            "disable_gc": False,
            "timer": "perf_counter",
            "min_rounds": 1,
            "max_time": 0.0,
            "min_time": 0.0,
            "warmup": False,
        },
        "stats": stats([1 / run["metrics"]["output_throughput"] for run in runs]),
    }


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's statistics of the rounds (Tukey's fences and outliers)."""
    ordered = sorted(seconds)
    n, mean, median = len(ordered), statistics.fmean(ordered), statistics.median(ordered)
    spread = statistics.stdev(ordered) if n > 1 else 0.0
    q1, q3 = _quartile(ordered, 1), _quartile(ordered, -1)
    iqr = q3 - q1
    fences = q1 - 1.5 * iqr, q3 + 1.5 * iqr
    far = sum(not fences[0] <= value <= fences[1] for value in ordered)
    beyond = sum(not mean - spread <= value <= mean + spread for value in ordered)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": spread,
        "rounds": n,
        "median": median,
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": far,
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{far}",
        "ld15iqr": min(v for v in ordered if v >= fences[0]),
        "hd15iqr": max(v for v in ordered if v <= fences[1]),
        "ops": 1 / mean if mean else math.inf,
        "total": math.fsum(ordered),
        "data": list(seconds),
        "iterations": 1,
    }


def _quartile(ordered: Sequence[float], side: int) -> float:
    """The median of the lower (1) or upper (-1) half: of an odd number the mean of the medians
    with and without the middle one."""
    n = len(ordered)
    if n == 1:
        return ordered[0]
    low = ordered if side > 0 else ordered[::-1]
    return statistics.fmean(
        (statistics.median(low[: n // 2]), statistics.median(low[: (n + 1) // 2]))
    )


def _machine() -> dict[str, Any]:
    """What pytest-benchmark says of a machine, but for its name: names of hosts are left out."""
    from pytest_llmserve.verdict.hardware import describe

    return {
        "node": "",
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": platform.python_version(),
        "python_build": list(platform.python_build()),
        "release": platform.release(),
        "system": platform.system(),
        "byteorder": sys.byteorder,
        "cpu": {"brand_raw": describe()["cpu"], "count": describe()["cores"]},
    }
