"""A server that runs already, at `endpoint`: any OpenAI-compatible one.

Nothing is started. Which engine answers is found out by `launch.attach`, and the `Server` then
carries that engine's name; this one stands for servers that tell nothing about themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_llmserve.engines import Engine, Fetch
from pytest_llmserve.servers import ServerConfig


def command(config: ServerConfig, port: int) -> list[str]:
    return []


def environment(config: ServerConfig) -> dict[str, str]:
    return {}


def version(fetch: Fetch) -> str:
    answer = fetch("/version")
    return str(answer.get("version", "")) if isinstance(answer, Mapping) else ""


def effective(fetch: Fetch) -> Mapping[str, Any]:
    return {}


ENGINE = Engine(
    name="attach",
    program="",
    module="",
    command=command,
    environment=environment,
    health="/health",
    stages=(),
    failures=(),
    body={"ignore_eos": True},
    token_prompts=False,
    counters={},
    version=version,
    effective=effective,
    needs_gpu=False,
)
