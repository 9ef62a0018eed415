"""What differs from engine to engine, as data and small functions: one module an engine.

A module defines `ENGINE`, an `Engine`. Nothing else has to be touched to add one but the table
below; third parties register theirs through the entry point group `pytest_llmserve.engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llmserve.servers import ServerConfig

#: Fetches a path of a running server ("/version") and gives the decoded JSON, or None.
Fetch = Callable[[str], Any]


@dataclass(frozen=True)
class Failure:
    """A known reason for which a start fails: what its log says, what it means, what to do."""

    pattern: str
    cause: str
    mend: str


@dataclass(frozen=True)
class Engine:
    """How to start one kind of server, know that it is ready, and talk to it.

    `command` gives the arguments that follow the program (`program`, or `module` run by an
    interpreter) for a config and a port. `environment` gives variables the engine needs.
    `health` answers 200 when requests are welcome. `stages` maps a regular expression over log
    lines to the words shown while loading. `body` holds the request fields that, beside
    `max_tokens`, fix the output length. `token_prompts`: `/v1/completions` takes token ids.
    `counters` maps our names of server metrics to the names this engine has used, newest first.
    `effective` reads the arguments in force and `version` the version from a running server.
    """

    name: str
    program: str
    module: str
    command: Callable[[ServerConfig, int], list[str]]
    environment: Callable[[ServerConfig], dict[str, str]]
    health: str
    stages: tuple[tuple[str, str], ...]
    failures: tuple[Failure, ...]
    body: Mapping[str, Any]
    token_prompts: bool
    counters: Mapping[str, tuple[str, ...]]
    version: Callable[[Fetch], str]
    effective: Callable[[Fetch], Mapping[str, Any]]
    needs_gpu: bool = True
    notes: Mapping[str, str] = field(default_factory=dict)


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
