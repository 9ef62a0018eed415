"""What differs from engine to engine, as data and small functions: one module an engine.

A module defines `ENGINE`, an `Engine`. Nothing else has to be touched to add one but the table
below; third parties register theirs through the entry point group `pytest_llmserve.engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pytest_llmserve.engines.models import normalise_model
from pytest_llmserve.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pytest_llmserve.servers import ServerConfig

__all__ = [
    "FILES",
    "MODULES",
    "SERVER_METRICS",
    "Engine",
    "Failure",
    "Fetch",
    "engine_name",
    "get_engine",
    "normalise_model",
    "third_party_engines",
    "version_at",
]

#: Fetches a path of a running server ("/version") and gives the decoded JSON, or None.
Fetch = Callable[[str], Any]


#: Stands in a command for the folder in which the launcher puts the engine's `files`.
FILES = "{files}"


@dataclass(frozen=True)
class Failure:
    """A known reason for which a start fails: what its log says, what it means, what to do.

    `cause` may name the group `{what}` of `pattern`. Of a table, the first that matches counts:
    root causes come before the consequences they have.
    """

    pattern: str
    cause: str
    mend: str


@dataclass(frozen=True)
class Engine:
    """How to start one kind of server, know that it is ready, and talk to it. What is only attached
    to has no `program`, `module` and `command`.

    `command` gives the arguments that follow the program (`program`, or `module` run by an
    interpreter) for a config and a port. `environment` gives variables the engine needs.
    `health` answers 200 when requests are welcome. `stages` maps a regular expression over log
    lines to the words shown while loading. `body` holds the request fields that, beside
    `max_tokens`, fix the output length. `token_prompts`: `/v1/completions` takes token ids.
    `counters` maps our names of server metrics to the names this engine has used, newest first.
    `effective` reads the arguments in force and `version` the version from a running server.
    `api_key` is the environment variable in which the engine takes the key that `/v1` then asks
    for ("": it takes none), `needs_gpu` whether it cannot run without one, and `owned_by` the
    word in `/v1/models`, `metrics_prefix` the one in `metrics`, by which it is told from others.
    `files` gives files that it reads, name → text; they lie in the folder that stands for
    `FILES` in its command. `metrics` is where its Prometheus text is, "" if it has none.
    """

    name: str
    health: str
    body: Mapping[str, Any]
    token_prompts: bool
    counters: Mapping[str, tuple[str, ...]]
    program: str = ""
    module: str = ""
    command: Callable[[ServerConfig, int], list[str]] = lambda config, port: []
    environment: Callable[[ServerConfig], dict[str, str]] = lambda config: {}
    stages: tuple[tuple[str, str], ...] = ()
    failures: tuple[Failure, ...] = ()
    version: Callable[[Fetch], str] = lambda fetch: ""
    effective: Callable[[Fetch], Mapping[str, Any]] = lambda fetch: {}
    needs_gpu: bool = True
    notes: Mapping[str, str] = field(default_factory=dict)
    api_key: str = ""
    owned_by: str = ""
    metrics: str = "/metrics"
    metrics_prefix: str = ""
    files: Callable[[ServerConfig], Mapping[str, str]] = lambda config: {}


def version_at(path: str) -> Callable[[Fetch], str]:
    """Reads the version from a path that answers with `{"version": …}`."""

    def version(fetch: Fetch) -> str:
        answer = fetch(path)
        return str(answer.get("version", "")) if isinstance(answer, Mapping) else ""

    return version


#: Our names of server metrics. Gauges: running waiting kv_usage. Counters: the rest. Histograms
#: (sum and count): ttft queue_time e2e.
SERVER_METRICS = (
    "running",
    "waiting",
    "kv_usage",
    "prompt_tokens",
    "cached_tokens",
    "generation_tokens",
    "requests",
    "preemptions",
    "prefix_queries",
    "prefix_hits",
    "spec_drafts",
    "spec_draft_tokens",
    "spec_accepted_tokens",
    "ttft",
    "queue_time",
    "e2e",
)

#: Engine name → module that defines its `ENGINE`. Third parties add theirs by entry point.
MODULES: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "pytest_llmserve.engines.vllm",
        "tensorrt-llm": "pytest_llmserve.engines.tensorrt_llm",
        "sglang": "pytest_llmserve.engines.sglang",
        "llama.cpp": "pytest_llmserve.engines.llama_cpp",
        "ollama": "pytest_llmserve.engines.ollama",
        "dynamo": "pytest_llmserve.engines.dynamo",
        "emulator": "pytest_llmserve.engines.emulator",
        "attach": "pytest_llmserve.engines.attach",
    }
)

_ALIASES = {
    "trtllm": "tensorrt-llm",
    "trt-llm": "tensorrt-llm",
    "tensorrtllm": "tensorrt-llm",
    "llamacpp": "llama.cpp",
    "llama-cpp": "llama.cpp",
    "llama-server": "llama.cpp",
    "emulated": "emulator",
}

ENTRY_POINTS = "pytest_llmserve.engines"


def engine_name(name: str) -> str:
    """The name of an engine in its one spelling (`TensorRT_LLM`, `trtllm` → `tensorrt-llm`).

    Imports no engine. Raises ConfigError with the names there are for an unknown one.
    """
    wanted = name.strip().lower().replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted in MODULES:
        return wanted
    known = (*MODULES, *third_party_engines())
    if wanted in known:
        return wanted
    raise ConfigError(
        f"There is no engine {name!r}{_nearest(wanted, known)} Known engines: {', '.join(known)}."
    )


def get_engine(name: str) -> Engine:
    """The engine of that name, in any spelling, imported when it is asked for.

    Raises ConfigError, with the names there are, for an unknown one and for a third-party entry
    point that does not give an `Engine`.
    """
    from importlib import import_module

    wanted = engine_name(name)
    if wanted not in MODULES:
        return _load(third_party_engines()[wanted])
    engine = import_module(MODULES[wanted]).ENGINE
    assert isinstance(engine, Engine)
    return engine


def third_party_engines() -> dict[str, EntryPoint]:
    """Engines that installed packages register in the entry point group `ENTRY_POINTS`."""
    from importlib.metadata import entry_points

    found = entry_points(group=ENTRY_POINTS)
    return {point.name.lower().replace("_", "-"): point for point in found}


def _load(point: EntryPoint) -> Engine:
    try:
        engine = point.load()
    except Exception as error:  # whatever a foreign module raises on import, one sentence tells it
        raise ConfigError(
            f"The engine {point.name!r} of entry point {point.value!r} cannot be loaded: {error}."
        ) from error
    if not isinstance(engine, Engine):
        raise ConfigError(
            f"The entry point {point.value!r} of engine {point.name!r} gives a "
            f"{type(engine).__name__}; it must name an instance of pytest_llmserve.engines.Engine."
        )
    return engine


def _nearest(word: str, known: tuple[str, ...]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
