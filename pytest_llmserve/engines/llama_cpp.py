"""llama.cpp's `llama-server`. By contract, not run here.

Sources: tools/server/README.md and common/arg.cpp of its public repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_llmserve.engines import Engine, Failure, Fetch
from pytest_llmserve.engines.options import given, option_words
from pytest_llmserve.servers import ServerConfig


def command(config: ServerConfig, port: int) -> list[str]:
    """Arguments after `llama-server`. A model that is no `.gguf` path is a hub repository."""
    local = config.model.endswith(".gguf") or config.model.startswith(("/", ".", "~"))
    words = ["-m" if local else "-hf", config.model, "--host", config.host, "--port", str(port)]
    if config.served_model_name and not given(config.args, "alias", "a"):
        words += ["--alias", config.served_model_name]
    if not given(config.args, "metrics"):
        words.append("--metrics")
    return words + option_words(config.args)


def _props(fetch: Fetch) -> Mapping[str, Any]:
    answer = fetch("/props")
    return answer if isinstance(answer, Mapping) else {}


def version(fetch: Fetch) -> str:
    return str(_props(fetch).get("build_info", ""))


def effective(fetch: Fetch) -> Mapping[str, Any]:
    props = _props(fetch)
    settings = props.get("default_generation_settings")
    found = {"model": props.get("model_path"), "parallel": props.get("total_slots")}
    if isinstance(settings, Mapping):
        found["context"] = settings.get("n_ctx")
    return {name: value for name, value in found.items() if value is not None}


ENGINE = Engine(
    name="llama.cpp",
    program="llama-server",
    module="",
    command=command,
    health="/health",
    stages=(
        (r"load_model: loading model|llama_model_loader: loaded meta data", "loading weights"),
        (r"load_tensors: offload", "weights loaded"),
        (r"llama_kv_cache|KV self size", "KV cache allocated"),
        (r"warming up the model", "warming up"),
        (r"main: model loaded", "engine ready"),
    ),
    failures=(
        Failure(
            r"error: invalid argument: (?P<what>\S+)",
            "this llama-server does not know the argument {what}",
            "correct it in `args` of the server config",
        ),
        Failure(
            r"failed to open GGUF file|gguf_init_from_file: failed|failed to load model",
            "the model file cannot be loaded",
            "give the path of a GGUF file that exists and that this llama.cpp can read",
        ),
        Failure(
            r"couldn't bind HTTP server socket",
            "the port is taken by another program",
            "leave `port` out of the server config, so that a free one is chosen",
        ),
        Failure(
            r"unable to allocate .* buffer|cudaMalloc failed: out of memory",
            "there is not enough memory for the model and its context",
            "lower `-c` or `-np` in `args`, or take a smaller quantisation",
        ),
    ),
    body={"ignore_eos": True},
    token_prompts=True,
    counters={
        "running": ("llamacpp:requests_processing",),
        "waiting": ("llamacpp:requests_deferred",),
        "kv_usage": ("llamacpp:kv_cache_usage_ratio",),
        "prompt_tokens": ("llamacpp:prompt_tokens_total",),
        "generation_tokens": ("llamacpp:tokens_predicted_total",),
        "spec_drafts": ("llamacpp:spec_decode_num_drafts_total",),
        "spec_draft_tokens": ("llamacpp:spec_decode_num_draft_tokens_total",),
        "spec_accepted_tokens": ("llamacpp:spec_decode_num_accepted_tokens_total",),
    },
    version=version,
    effective=effective,
    needs_gpu=False,
    api_key="LLAMA_API_KEY",
    owned_by="llamacpp",
    metrics_prefix="llamacpp:",
    notes={"stream": "comment lines (`:`) keep the connection alive while a request waits"},
)
