"""What was measured, on what: the facts that decide whether two runs may be compared.

A fingerprint is a flat, sorted, JSON-able mapping. Each field has a class:

* **must** match: with another value the two runs measured different things, and no verdict rests
  on their comparison;
* **should** match: they are compared, and the verdict names the field with both values;
* **info**: kept for the reader.

Engine arguments are fields of their own (`args.max-num-seqs`): as the engine itself reports
them, else as configured. They must match; one that only one side has must match too unless the
engine's version differs, because a new version reports new arguments of its own. Seeds and
injected faults are info; what an engine derives from the memory it finds should match.

What changes without changing the measurement stays out: ports, hosts, paths, process ids, and
all secrets. Durations are no part either: a longer run of the same load measures the same.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_llmserve.verdict.hardware import safe

if TYPE_CHECKING:
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.servers import Server

Class = Literal["must", "should", "info"]

#: The class of every field; `args.*` as the module's text says; any other field is info.
CLASSES: Mapping[str, Class] = {
    "emulated": "must",
    "hardware": "must",
    "gpu": "must",
    "gpu_count": "must",
    "compute_capability": "must",
    "engine": "must",
    "model": "must",
    "quantization": "must",
    "tokenizer": "must",
    "load": "must",
    "metrics_version": "must",
    "engine_version": "should",
    "driver": "should",
    "cpu": "should",
    "cores": "should",
    "memory": "should",
    "client": "should",
    "clocks": "should",
    "timestamps": "should",
    "token_source": "must",
    "python": "info",
    "server": "info",
}

#: Arguments that do not change what is measured: names, seeds, and faults injected into the
#: emulated engine, which stand for what a baseline is there to find.
FREE_ARGUMENTS = ("seed", "fault", "faults", "served-model-name")

#: Arguments that an engine works out from the memory it finds: they vary a little from start to
#: start, and should match.
DERIVED_ARGUMENTS = ("num-gpu-blocks", "num-cpu-blocks", "kv-cache-memory-bytes")

#: Where engines keep the precision of the weights among their arguments; the type of numbers is
#: that of weights that are not quantized.
QUANTIZATION = ("quantization", "quantize", "quant_algo", "weights", "dtype")
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}

_SECRET = re.compile(r"key|token$|secret|password|credential|authorization", re.IGNORECASE)
_PLACE = re.compile(
    r"(^|[-_.])(u?ports?|hosts?|host-?name|addr|address|ip|pid|uuid|socket|dir|directory|path|file|log|url|"
    r"endpoint|config|root|started|time|timestamp)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Difference:
    """A field with two values; None is a field that one side lacks."""

    field: str
    left: Any
    right: Any
    kind: Class

    def __str__(self) -> str:
        return f"{self.field}: {_show(self.left)} → {_show(self.right)}"


def fingerprint(
    server: Server,
    plan: LoadPlan,
    hardware: Mapping[str, Any],
    *,
    metrics_version: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fingerprint of a load of `plan` on `server`.

    `hardware` is what `hardware.describe()` says of this machine. It counts only for a real server
    on this machine: an emulated server's hardware is the one it imitates ("emulated-dgx-spark"),
    and an attached server on another host is on the hardware its config names, or on "remote".
    `extra` adds fields that the caller knows, such as `timestamps`.
    """
    if metrics_version is None:
        from pytest_llmserve.metrics.definitions import METRICS_VERSION

        metrics_version = METRICS_VERSION
    arguments = server_arguments(server)
    fields = {
        "emulated": server.emulated,
        **_hardware(server, hardware),
        "engine": server.engine,
        "engine_version": server.version or None,
        "model": model_name(server),
        "quantization": _quantization(server, arguments),
        "server": server.config.name,
        "load": load_key(plan),
        "client": client_version(),
        "metrics_version": metrics_version,
        "python": platform.python_version(),
        **{f"args.{name}": value for name, value in arguments.items()},
        **(extra or {}),
    }
    return {name: fields[name] for name in sorted(fields) if fields[name] is not None}


def client_version() -> str | None:
    """The version of this package; None if it runs from a folder without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pytest-llmserve")
    except PackageNotFoundError:
        return None


def _hardware(server: Server, hardware: Mapping[str, Any]) -> dict[str, Any]:
    config = server.config
    if server.emulated:
        imitated = config.emulation.hardware if config.emulation else config.hardware
        return {"hardware": f"emulated-{safe(imitated or 'unknown')}"}
    if not server.local:
        return {"hardware": safe(config.hardware or "remote")}
    facts = {k: v for k, v in hardware.items() if k != "slug"}
    if config.gpus == 0 and config.engine != "attach":  # computed on the CPU alone
        from pytest_llmserve.verdict.hardware import slug

        facts = {k: facts[k] for k in ("cpu", "cores", "memory") if k in facts}
        return {"hardware": slug(facts) if "cpu" in facts else hardware["slug"], **facts}
    return {"hardware": hardware["slug"], **facts}


def model_name(server: Server) -> str:
    """The model's identity: as configured, else as served; of a local path its last part."""
    name = server.config.model or server.model
    local = name.startswith(("/", "~", ".")) or name.count("/") > 1
    return name.rstrip("/").rsplit("/", 1)[-1] if local else name


def server_arguments(server: Server) -> dict[str, Any]:
    """Arguments in force, effective over configured, without places and secrets.

    Values are plain JSON; a nested one becomes dotted names, so that a difference names its leaf.
    """
    configured = {_dashed(k): v for k, v in _leaves(server.config.args)}
    effective = {_dashed(k): v for k, v in _leaves(server.effective)}
    merged = {**configured, **effective}
    if server.emulated and server.config.emulation:
        imitated = asdict(server.config.emulation, dict_factory=_plain)
        merged |= {f"emulation.{k}": v for k, v in _leaves(imitated)}
    return {k: v for k, v in merged.items() if v is not None and not _left_out(k)}


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in pairs}


def _left_out(name: str) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return bool(_SECRET.search(leaf) or _PLACE.search(leaf))


def _dashed(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _leaves(value, f"{name}.")
        elif value is None or isinstance(value, (bool, int)):
            found.append((name, value))
        elif isinstance(value, float):
            found.append((name, value if abs(value) < float("inf") else str(value)))
        elif isinstance(value, str):
            found.append((name, _no_folder(value)))
        else:
            found.append((name, _no_folder(json.dumps(value, sort_keys=True, default=str))))
    return found


def _no_folder(text: str) -> str:
    """An absolute path's last part: the folders before it are a matter of the machine."""
    return text.rstrip("/").rsplit("/", 1)[-1] if text.startswith(("/", "~/")) else text


def _quantization(server: Server, arguments: Mapping[str, Any]) -> str | None:
    if server.emulated and server.config.emulation:
        return f"{server.config.emulation.weights}, KV {server.config.emulation.kv}"
    for name in QUANTIZATION:
        value = str(arguments.get(_dashed(name)) or "").removeprefix("torch.")
        if value not in ("", "auto"):
            return _SHORT.get(value, value)
    return None


def load_facts(plan: LoadPlan) -> dict[str, Any]:
    """What of a plan makes it the same load: arrivals and work, not duration, warm-up or seed."""
    arrivals, work = asdict(plan.arrivals), asdict(plan.workload)
    for irrelevant in ("ramp", "lead_in"):
        arrivals.pop(irrelevant, None)
    return {**arrivals, **work}


def load_key(plan: LoadPlan) -> str:
    """A load's name in files: readable, and unique by 6 hex digits of its facts
    ("closed-30-128in-128out-1f2e3d")."""
    facts = load_facts(plan)
    amount = facts.get("users", facts.get("rate"))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:6]
    lengths = f"{facts['prompt_tokens']}in-{facts['output_tokens']}out"
    return f"{facts['kind']}-{amount:g}-{lengths}-{digest}"


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The fields in which two fingerprints differ, must-match ones first."""
    rank = ("must", "should", "info")
    same_engine = left.get("engine_version") == right.get("engine_version")
    found = [
        Difference(name, left.get(name), right.get(name), _class(name, left, right, same_engine))
        for name in sorted({*left, *right})
        if left.get(name) != right.get(name)
    ]
    return tuple(sorted(found, key=lambda d: rank.index(d.kind)))


def comparable(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether no must-match field differs."""
    return not any(d.kind == "must" for d in differences(left, right))


def _class(
    name: str, left: Mapping[str, Any], right: Mapping[str, Any], same_engine: bool
) -> Class:
    if name.startswith("args."):
        leaf = name.rsplit(".", 1)[-1]
        if leaf in FREE_ARGUMENTS:
            return "info"
        if leaf in DERIVED_ARGUMENTS:
            return "should"
        both = name in left and name in right
        return "must" if both or same_engine else "should"
    if name in ("cpu", "cores") and "gpu" not in left and "gpu" not in right:
        return "must"  # without a GPU the CPU is what computes
    return CLASSES.get(name, "info")


def _show(value: Any) -> str:
    return "none" if value is None else str(value)
