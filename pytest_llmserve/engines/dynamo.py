"""NVIDIA Dynamo's front end: a router before workers of vLLM, SGLang or TensorRT-LLM.

It is a deployment of several processes that its own tools start, so it is attached to, not
launched. Source: its documentation of metrics. By contract, not run here.
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
    return ""


def effective(fetch: Fetch) -> Mapping[str, Any]:
    return {}


ENGINE = Engine(
    name="dynamo",
    program="",
    module="",
    command=command,
    environment=environment,
    health="/health",
    stages=(),
    failures=(),
    body={"ignore_eos": True},
    token_prompts=True,
    counters={
        "running": ("dynamo_frontend_inflight_requests",),
        "waiting": ("dynamo_frontend_queued_requests",),
        "prompt_tokens": ("dynamo_frontend_input_sequence_tokens_sum",),
        "generation_tokens": (
            "dynamo_frontend_output_tokens_total",
            "dynamo_frontend_output_sequence_tokens_sum",
        ),
        "requests": ("dynamo_frontend_requests_total",),
        "ttft": ("dynamo_frontend_time_to_first_token_seconds",),
        "e2e": ("dynamo_frontend_request_duration_seconds",),
    },
    version=version,
    effective=effective,
    metrics_prefix="dynamo_frontend_",
)
