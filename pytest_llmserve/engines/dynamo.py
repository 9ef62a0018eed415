"""NVIDIA Dynamo's front end: a router before workers of vLLM, SGLang or TensorRT-LLM.

It is a deployment of several processes that its own tools start, so it is attached to, not
launched. Source: its documentation of metrics. By contract, not run here.
"""

from __future__ import annotations

from pytest_llmserve.engines import Engine

ENGINE = Engine(
    name="dynamo",
    health="/health",
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
    metrics_prefix="dynamo_frontend_",
)
