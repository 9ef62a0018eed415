"""SGLang. Sources: docs.sglang.ai (server arguments, production metrics). By contract, not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_llmserve.engines import Engine, Failure, Fetch
from pytest_llmserve.engines.models import hub_name
from pytest_llmserve.engines.options import given, option_words
from pytest_llmserve.servers import ProcessRunner, ServerConfig

_EFFECTIVE = (
    "model_path",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "context_length",
    "mem_fraction_static",
    "max_running_requests",
    "max_total_num_tokens",
    "chunked_prefill_size",
    "disable_radix_cache",
    "tp_size",
    "dp_size",
    "attention_backend",
    "speculative_algorithm",
    "speculative_num_draft_tokens",
)


def command(config: ServerConfig, port: int) -> list[str]:
    """Arguments after `sglang`, or after `python -m sglang.launch_server`."""
    as_module = isinstance(config.runner, ProcessRunner) and config.runner.interpreter
    words = [] if as_module else ["serve"]
    words += ["--model-path", hub_name(config.model), "--host", config.host, "--port", str(port)]
    if config.served_model_name and not given(config.args, "served-model-name"):
        words += ["--served-model-name", config.served_model_name]
    if not given(config.args, "enable-metrics"):
        words.append("--enable-metrics")
    return words + option_words(config.args, negations=False)


def _info(fetch: Fetch) -> Mapping[str, Any]:
    for path in ("/server_info", "/get_server_info"):
        answer = fetch(path)
        if isinstance(answer, Mapping):
            return answer
    return {}


def version(fetch: Fetch) -> str:
    return str(_info(fetch).get("version", ""))


def effective(fetch: Fetch) -> Mapping[str, Any]:
    info = _info(fetch)
    return {name: info[name] for name in _EFFECTIVE if info.get(name) is not None}


ENGINE = Engine(
    name="sglang",
    program="sglang",
    module="sglang.launch_server",
    command=command,
    health="/health",
    stages=(
        (r"server_args=ServerArgs", "starting the engine"),
        (r"Load weight begin", "loading weights"),
        (r"Load weight end", "weights loaded"),
        (r"KV Cache is allocated", "KV cache allocated"),
        (r"Capture cuda graph begin", "capturing CUDA graphs"),
        (r"Capture cuda graph end", "CUDA graphs captured"),
        (r"The server is fired up", "engine ready"),
    ),
    failures=(
        Failure(
            r"error: unrecognized arguments: (?P<what>.*)",
            "this SGLang does not know the argument {what}",
            "correct it in `args` of the server config",
        ),
        Failure(
            r"error: (?P<what>argument \S+: .*)",
            "SGLang refuses an argument ({what})",
            "correct the value in `args` of the server config",
        ),
        Failure(
            r"\[Errno 98\]|[Aa]ddress already in use",
            "the port is taken by another program",
            "leave `port` out of the server config, so that a free one is chosen",
        ),
        Failure(
            r"Not enough memory\. Please try to increase --mem-fraction-static",
            "the weights leave no memory for the KV cache",
            "raise `mem-fraction-static` in `args`, or serve a smaller or quantised model",
        ),
        Failure(
            r"CUDA out of memory|OutOfMemoryError",
            "the GPU ran out of memory",
            "lower `mem-fraction-static` in `args`, or end other GPU programs",
        ),
        Failure(
            r"No module named '?sglang",
            "the interpreter has no SGLang",
            "set `runner: {process: {interpreter: …}}` to the Python of an environment with SGLang",
        ),
    ),
    body={"ignore_eos": True},
    token_prompts=True,
    counters={
        "running": ("sglang:num_running_reqs",),
        "waiting": ("sglang:num_queue_reqs",),
        "kv_usage": ("sglang:token_usage",),
        "prompt_tokens": ("sglang:prompt_tokens_total",),
        "cached_tokens": ("sglang:cached_tokens_total",),
        "generation_tokens": ("sglang:generation_tokens_total",),
        "requests": ("sglang:num_requests_total",),
        "preemptions": ("sglang:num_retracted_reqs_total",),
        "ttft": ("sglang:time_to_first_token_seconds",),
        "queue_time": ("sglang:queue_time_seconds",),
        "e2e": ("sglang:e2e_request_latency_seconds",),
    },
    version=version,
    effective=effective,
    owned_by="sglang",
    metrics_prefix="sglang:",
    notes={"key": "SGLang takes a key on its command line only, and prints it into its log"},
)
