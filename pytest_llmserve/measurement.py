"""Drive one load against one server and make a `Run` of it: the arrows of DESIGN.md in a row.

server counters → load → server counters → record → metrics → validity → fingerprint → Run.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.engines import get_engine
from pytest_llmserve.load.control import Progress, drive
from pytest_llmserve.load.plan import LoadPlan, Target
from pytest_llmserve.load.tokens import token_pool
from pytest_llmserve.metrics.definitions import measure
from pytest_llmserve.metrics.server import Sampler
from pytest_llmserve.run import Run
from pytest_llmserve.verdict.fingerprint import fingerprint
from pytest_llmserve.verdict.hardware import describe
from pytest_llmserve.verdict.validity import check

if TYPE_CHECKING:
    from pytest_llmserve.servers import Server


def target_of(server: Server, plan: LoadPlan) -> Target:
    """Where the plan's requests go and in what dialect."""
    engine = get_engine(server.engine)
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
    progress: Callable[[Progress], None] | None = None,
    allow_errors: float = 0.0,
) -> Run:
    """Measure one load. The record is kept at `record_path`.

    Raises LoadError if the load could not be driven at all; a load that was driven but is no
    measurement comes back with the failed checks in `Run.validity`.
    """
    engine = get_engine(server.engine)
    target = target_of(server, plan)
    with Sampler(server, engine) as sampler:
        record = drive(
            plan=plan, target=target, progress=progress, record_path=record_path, alive=alive
        )
    metrics = measure(record, plan)
    counters = sampler.deltas()
    validity = check(
        record, metrics, plan, counters=counters, allow_errors=allow_errors, alive=alive()
    )
    return Run(
        test=test,
        server=server,
        plan=plan,
        metrics=metrics,
        validity=validity,
        fingerprint=fingerprint(server, plan, describe()),
        server_metrics=counters,
        record=record,
    )


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
