"""TensorRT-LLM (1.x), served by `trtllm-serve`.

Sources: tensorrt_llm/commands/serve.py and tensorrt_llm/metrics/collector.py of its public
repository, and NVIDIA's playbook for the DGX Spark. Known by contract, not run here.

Of a config's `args`, `config` (or `extra_llm_api_options`, the older name of the same option)
may be a mapping: it becomes the YAML file of that option. The switches without which the server
has no metrics are added to it unless the user set them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_llmserve.engines import FILES, Engine, Failure, Fetch, version_at
from pytest_llmserve.engines.models import hub_name
from pytest_llmserve.engines.options import option_words
from pytest_llmserve.servers import ServerConfig

# Both names of the option, newest first. The older one is understood by all releases.
_OPTIONS = ("config", "extra_llm_api_options")
_FILE = "llm_options.yaml"
_METRICS = {"enable_iter_perf_stats": True, "return_perf_metrics": True}


def command(config: ServerConfig, port: int) -> list[str]:
    """Arguments after `trtllm-serve`, or after `python -m tensorrt_llm.commands.serve`."""
    option, given = _file_option(config)
    plain = {name: value for name, value in config.args.items() if name.lstrip("-") not in _OPTIONS}
    path = given if isinstance(given, str) else f"{FILES}/{_FILE}"
    words = ["serve", hub_name(config.model), "--host", config.host, "--port", str(port)]
    return [*words, *option_words(plain, negations=False), f"--{option}", path]


def files(config: ServerConfig) -> dict[str, str]:
    """The YAML file of `--config`; none if the config names a file of the user's own."""
    _, given = _file_option(config)
    if isinstance(given, str):
        return {}
    import yaml

    return {_FILE: yaml.safe_dump({**_METRICS, **given}, sort_keys=False)}


def _file_option(config: ServerConfig) -> tuple[str, Mapping[str, Any] | str]:
    for name, value in config.args.items():
        bare = name.lstrip("-")
        if bare in _OPTIONS and value is not None:
            return bare, value
    return _OPTIONS[-1], {}


def effective(fetch: Fetch) -> Mapping[str, Any]:
    """What `/server_info` says; releases without it say nothing."""
    answer = fetch("/server_info")
    return answer if isinstance(answer, Mapping) else {}


ENGINE = Engine(
    name="tensorrt-llm",
    program="trtllm-serve",
    module="tensorrt_llm.commands.serve",
    command=command,
    files=files,
    health="/health",
    stages=(
        (r"TensorRT[- ]LLM version", "starting TensorRT-LLM"),
        (r"Loading weights concurrently|Loading weights|Prefetching", "loading weights"),
        (r"Weight loading took|weights loaded|Model init total", "weights loaded"),
        (
            r"Estimated max memory in KV cache|Allocated .* for max tokens in paged KV cache",
            "KV cache allocated",
        ),
        (r"[Aa]utotun|Running autotuner warmup", "tuning kernels"),
        (
            r"CUDA graph warmup|Creating CUDA graph|Run generation only CUDA graph",
            "capturing CUDA graphs",
        ),
        (r"Application startup complete|Uvicorn running", "opening the port"),
    ),
    failures=(
        Failure(
            r"No such option: (?P<what>\S+)",
            "this trtllm-serve does not know the option {what}",
            "correct it in `args`; options of the LLM API belong under `config:`",
        ),
        Failure(
            r"Invalid value for (?P<what>'?--?\S+.*)",
            "trtllm-serve refuses a value ({what})",
            "correct it in `args` of the server config",
        ),
        Failure(
            r"Failed to bind socket|\[Errno 98\]|[Aa]ddress already in use",
            "the port is taken by another program",
            "leave `port` out of the server config, so that a free one is chosen",
        ),
        Failure(
            r"No GPU devices found on the node|no CUDA-capable device|Found no NVIDIA driver",
            "TensorRT-LLM finds no GPU",
            "check `nvidia-smi`; in a container, that the GPU is handed to it",
        ),
        Failure(
            r"CUDA out of memory|OutOfMemoryError|cudaErrorMemoryAllocation",
            "the GPU ran out of memory",
            "lower `free_gpu_memory_fraction` or `max_batch_size` in `args`, or end other programs",
        ),
        Failure(
            r"RepositoryNotFoundError|GatedRepoError|LocalEntryNotFoundError|HFValidationError",
            "the model is not to be had under this name",
            "check the name and HF_TOKEN, or download it once and mount the cache",
        ),
        Failure(
            r"ValidationError.*\bLlmArgs\b|Extra inputs are not permitted",
            "TensorRT-LLM does not know a key under `config:`",
            "correct it in `args` of the server config",
        ),
        Failure(
            r"No module named '?tensorrt_llm",
            "the interpreter has no TensorRT-LLM",
            "use the container runner with NVIDIA's release image",
        ),
    ),
    body={"ignore_eos": True},
    token_prompts=True,
    counters={
        "running": ("trtllm_num_requests_running",),
        "waiting": ("trtllm_num_requests_waiting",),
        "kv_usage": ("trtllm_kv_cache_utilization",),
        "prompt_tokens": ("trtllm_prompt_tokens_total",),
        "cached_tokens": ("trtllm_prompt_cached_tokens_total",),
        "generation_tokens": ("trtllm_generation_tokens_total",),
        "requests": ("trtllm_request_success_total",),
        "prefix_hits": ("trtllm_prompt_cache_hit_tokens_total",),
        "spec_draft_tokens": (
            "trtllm_spec_decode_num_draft_tokens_total",
            "trtllm_spec_decode_drafted_tokens_total",
        ),
        "spec_accepted_tokens": (
            "trtllm_spec_decode_num_accepted_tokens_total",
            "trtllm_spec_decode_accepted_tokens_total",
        ),
        "ttft": ("trtllm_time_to_first_token_seconds",),
        "queue_time": ("trtllm_request_queue_time_seconds",),
        "e2e": ("trtllm_e2e_request_latency_seconds",),
    },
    version=version_at("/version"),
    effective=effective,
    owned_by="tensorrt_llm",
    metrics="/prometheus/metrics",
    metrics_prefix="trtllm_",
    notes={
        "key": "trtllm-serve asks for no key",
        "metrics": "/metrics is JSON that each read drains: read /prometheus/metrics instead",
        "stream": "the role chunk has no content; chunks with empty text may carry tokens",
    },
)
