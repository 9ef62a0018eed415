"""Drive one load against one server and make a `Run` of it: the arrows of DESIGN.md in a row.

server counters → load, with server and GPUs sampled beside it → server counters → record → metrics
→ validity → fingerprint → Run.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.engines import Engine, get_engine
from pytest_llmserve.load.control import Progress, drive
from pytest_llmserve.load.plan import LoadPlan, Target
from pytest_llmserve.load.tokens import prepare, token_pool
from pytest_llmserve.metrics import telemetry
from pytest_llmserve.metrics.definitions import measure
from pytest_llmserve.metrics.server import Sampler, delta, scrape, summarize
from pytest_llmserve.metrics.subject import run_roofline, subject_of
from pytest_llmserve.metrics.telemetry import Recorder
from pytest_llmserve.metrics.window import window
from pytest_llmserve.run import Check, Run
from pytest_llmserve.verdict.fingerprint import fingerprint, server_arguments
from pytest_llmserve.verdict.hardware import describe
from pytest_llmserve.verdict.validity import check

if TYPE_CHECKING:
    from pytest_llmserve.load.calibration import Calibration
    from pytest_llmserve.servers import Server

#: A server may count the last tokens a moment after it has sent them; so long it is waited for.
SETTLE = 2.0

#: Validity checks of a run for given bounds on latencies (`{"ttft.p95": 0.5}`).
Validate = Callable[[Mapping[str, float]], tuple[Check, ...]]


def target_of(server: Server, engine: Engine, plan: LoadPlan) -> Target:
    """Where the plan's requests go and in what dialect."""
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    ids: tuple[int, ...] = ()
    if engine.token_prompts and plan.workload.api == "completions":
        ids = token_pool(server.endpoint, headers, server.model)
    return Target(server.endpoint, server.model, headers, engine.body, ids)


def take(
    server: Server,
    plan: LoadPlan,
    *,
    test: str,
    record_path: Path,
    alive: Callable[[], bool],
    ended: Callable[[], str | None] = lambda: None,
    progress: Callable[[Progress], None] | None = None,
    allow_errors: float = 0.0,
    calibration: Calibration | None = None,
    goodput: Mapping[str, float] | None = None,
) -> tuple[Run, Validate]:
    """Measure one load. The record is kept at `record_path`.

    `alive` tells whether the server is there, and `ended` why it is not, for who reads the result.

    What a client may be late depends on what is asserted, so the run comes with a function that
    checks it again for the bounds of a verdict. Raises LoadError if the load could not be driven
    at all; a load that was driven but is no measurement has failed checks in `Run.validity`.
    `calibration` is the client's own error on this machine, if it is known, `goodput` the bounds
    that a request must meet to count for the metric of that name.
    """
    engine = get_engine(server.engine)
    target = target_of(server, engine, plan)
    prompts = prepare(target, plan.workload)
    before = scrape(server, engine)
    with Sampler(server, engine) as sampler, Recorder(server) as recorder:
        record = drive(
            target, plan, progress=progress, record_path=record_path, alive=alive, prompts=prompts
        )
    after = _settled(server, engine)
    counters = delta(before, after)
    metrics = measure(record, plan, objectives=goodput)
    span = window(record, plan)
    metrics["server"] = summarize(sampler.series, counters, after, span)
    gpu = telemetry.summarize(
        recorder.readings, span, record.info.start, metrics["output_tokens"] or 0.0
    )
    if gpu.metrics is not None:
        metrics |= {"gpu": gpu.metrics, "energy_per_token": gpu.energy_per_token}
    machine = describe()
    subject = subject_of(server, machine, server_arguments(server))
    ceiling = run_roofline(subject, record, metrics, counters)
    metrics["roofline"] = ceiling.get("share")
    lives = alive()
    why = None if lives else ended()

    def validate(bounds: Mapping[str, float]) -> tuple[Check, ...]:
        return check(
            record,
            metrics,
            plan,
            counters=counters,
            telemetry=gpu.facts,
            bounds=bounds,
            allow_errors=allow_errors,
            alive=lives,
            ended=why,
            calibration=calibration,
        )

    run = Run(
        test=test,
        server=server,
        plan=plan,
        metrics=metrics,
        validity=validate({}),
        fingerprint=fingerprint(
            server, plan, machine, extra={"timestamps": record.info.timestamps}
        ),
        server_metrics={**counters, "series": _relative(sampler.series, record.info.start)},
        record=record,
        telemetry=gpu.facts,
        roofline=ceiling,
    )
    return run, validate


def _settled(server: Server, engine: Engine) -> dict[str, float]:
    """The server's counters once no request runs any more."""
    deadline = time.monotonic() + SETTLE
    while True:
        counters = scrape(server, engine)
        busy = counters.get("running") or counters.get("waiting")
        if not busy or time.monotonic() > deadline:
            return counters
        time.sleep(0.1)


def _relative(series: Mapping[str, list[float]], start: float) -> dict[str, list[float | None]]:
    """Time series for the result file: times since the load's start, None for what is missing."""
    shifted = {**series, "time": [at - start for at in series["time"]]}
    return {k: [None if math.isnan(x) else x for x in v] for k, v in shifted.items()}


def fresh_seed() -> int:
    """A seed that no run before has used, so that no prompt of this run waits in a prefix cache.

    It is written into the result; giving it to `load(..., seed=)` repeats the run's requests.
    """
    return secrets.randbits(31)


def record_name(directory: Path) -> Path:
    """A path for the next record of this process in `directory`."""
    return directory / f"record-{os.getpid()}-{secrets.token_hex(4)}.npz"


def plan_facts(plan: LoadPlan) -> Mapping[str, Any]:
    """The plan as the result file has it: `kind`, `users` or `rate`, workload and times."""
    from dataclasses import asdict

    flat = {**asdict(plan.arrivals), "workload": asdict(plan.workload)}
    rest = {k: v for k, v in asdict(plan).items() if k not in ("arrivals", "workload")}
    return {**flat, **rest}
