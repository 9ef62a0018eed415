"""vLLM (0.15 to 0.32 and on).

Sources: docs.vllm.ai (`vllm serve`, production metrics), vllm/entrypoints and vllm/v1/metrics of
release 0.32; the failures are lines of real logs of its CPU build, the GPU ones of its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pytest_llmserve.engines import Engine, Failure, Fetch, version_at
from pytest_llmserve.engines.models import hub_name
from pytest_llmserve.engines.options import given, option_words
from pytest_llmserve.servers import ProcessRunner, ServerConfig

# Options whose parser takes a list as one JSON word, and the one that is repeated instead; all
# other lists are `nargs="+"`.
_JSON_LISTS = ("allowed-origins", "allowed-methods", "allowed-headers")
_REPEATED = ("middleware",)

# What of /server_info decides performance; our name → (section, field) of vLLM's config.
_EFFECTIVE = {
    "model": ("model_config", "model"),
    "dtype": ("model_config", "dtype"),
    "quantization": ("model_config", "quantization"),
    "max_model_len": ("model_config", "max_model_len"),
    "enforce_eager": ("model_config", "enforce_eager"),
    "load_format": ("load_config", "load_format"),
    "kv_cache_dtype": ("cache_config", "cache_dtype"),
    "block_size": ("cache_config", "block_size"),
    "num_gpu_blocks": ("cache_config", "num_gpu_blocks"),
    "gpu_memory_utilization": ("cache_config", "gpu_memory_utilization"),
    "enable_prefix_caching": ("cache_config", "enable_prefix_caching"),
    "max_num_seqs": ("scheduler_config", "max_num_seqs"),
    "max_num_batched_tokens": ("scheduler_config", "max_num_batched_tokens"),
    "enable_chunked_prefill": ("scheduler_config", "enable_chunked_prefill"),
    "async_scheduling": ("scheduler_config", "async_scheduling"),
    "tensor_parallel_size": ("parallel_config", "tensor_parallel_size"),
    "pipeline_parallel_size": ("parallel_config", "pipeline_parallel_size"),
    "data_parallel_size": ("parallel_config", "data_parallel_size"),
    "device": ("device_config", "device"),
}


def command(config: ServerConfig, port: int) -> list[str]:
    """Arguments after `vllm`, or after `python -m vllm.entrypoints.openai.api_server`."""
    model = hub_name(config.model)
    as_module = isinstance(config.runner, ProcessRunner) and config.runner.interpreter
    words = ["--model", model] if as_module else ["serve", model]
    words += ["--host", config.host, "--port", str(port)]
    if config.served_model_name and not given(config.args, "served-model-name"):
        words += ["--served-model-name", config.served_model_name]
    return words + option_words(config.args, json_lists=_JSON_LISTS, repeated=_REPEATED)


def environment(config: ServerConfig) -> dict[str, str]:
    """Quiet telemetry; and on loopback, /server_info, which tells the arguments in force.

    The development endpoints that come with it can stop the server, so a server that listens
    to others does without them, and its effective arguments stay unknown but for the length.
    """
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if config.host in ("127.0.0.1", "localhost", "::1"):
        variables["VLLM_SERVER_DEV_MODE"] = "1"
    return variables


def effective(fetch: Fetch) -> Mapping[str, Any]:
    """The arguments in force, flat; only the maximum length if the server tells no more."""
    answer = fetch("/server_info?config_format=json")
    sections = answer.get("vllm_config") if isinstance(answer, Mapping) else None
    if isinstance(sections, Mapping):
        return _in_force(sections)
    models = fetch("/v1/models")
    first = models["data"][0] if isinstance(models, Mapping) and models.get("data") else {}
    length = first.get("max_model_len") if isinstance(first, Mapping) else None
    return {} if length is None else {"max_model_len": length}


def _in_force(sections: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, (section, key) in _EFFECTIVE.items():
        values = sections.get(section)
        if isinstance(values, Mapping) and key in values:
            found[name] = values[key]
    speculation = sections.get("speculative_config")
    if isinstance(speculation, Mapping):
        found["speculative_config"] = {
            key: speculation[key]
            for key in ("method", "model", "num_speculative_tokens")
            if speculation.get(key) is not None
        }
    return found


#: Our names of server metrics → those of vLLM, newest first.
COUNTERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "running": ("vllm:num_requests_running",),
        "waiting": ("vllm:num_requests_waiting",),
        "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "prompt_tokens": ("vllm:prompt_tokens_total",),
        "cached_tokens": ("vllm:prompt_tokens_cached_total",),
        "generation_tokens": ("vllm:generation_tokens_total",),
        "requests": ("vllm:request_success_total",),
        "preemptions": ("vllm:num_preemptions_total",),
        "prefix_queries": (
            "vllm:prefix_cache_queries_total",
            "vllm:gpu_prefix_cache_queries_total",
        ),
        "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
        "spec_drafts": ("vllm:spec_decode_num_drafts_total",),
        "spec_draft_tokens": ("vllm:spec_decode_num_draft_tokens_total",),
        "spec_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens_total",),
        "ttft": ("vllm:time_to_first_token_seconds",),
        "queue_time": ("vllm:request_queue_time_seconds",),
        "e2e": ("vllm:e2e_request_latency_seconds",),
    }
)

ENGINE = Engine(
    name="vllm",
    program="vllm",
    module="vllm.entrypoints.openai.api_server",
    command=command,
    environment=environment,
    health="/health",
    stages=(
        (r"non-default args:", "reading the model's config"),
        (r"Initializing a V1 LLM engine|Initializing an? V\d", "starting the engine"),
        (r"Starting to load model", "loading weights"),
        (r"Loading safetensors checkpoint shards:\s+(\d+)%", "loading weights, {0} %"),
        (r"Loading weights took|Model loading took|Initializing model took", "weights loaded"),
        (r"torch\.compile takes|Compiling a graph|Dynamo bytecode transform", "compiling"),
        (r"Available KV cache memory|KV cache size:", "KV cache allocated"),
        (r"[Cc]apturing CUDA graphs?", "capturing CUDA graphs"),
        (r"Graph capturing finished", "CUDA graphs captured"),
        (r"init engine .* took", "engine ready"),
        (r"Starting vLLM (API )?server", "opening the port"),
    ),
    failures=(
        Failure(
            r"error: unrecognized arguments: (?P<what>.*)",
            "this vLLM does not know the argument {what}",
            "correct it in `args` of the server config, or run a vLLM that has it",
        ),
        Failure(
            r"error: (?P<what>argument \S+: .*)",
            "vLLM refuses an argument ({what})",
            "correct the value in `args` of the server config",
        ),
        Failure(
            r"\[Errno 98\]|[Aa]ddress already in use",
            "the port is taken by another program",
            "leave `port` out of the server config, so that a free one is chosen",
        ),
        Failure(
            r"Free memory on device .* is less than|is less than desired CPU memory utilization",
            "less memory is free than --gpu-memory-utilization asks for",
            "end what else uses the memory, or lower `gpu-memory-utilization` in `args`",
        ),
        Failure(
            r"No available memory for the cache blocks|requested memory for kv \(-",
            "the weights leave no memory for the KV cache",
            "raise `gpu-memory-utilization` in `args`, or serve a smaller or quantised model",
        ),
        Failure(
            r"on kv cache allocation is less than requested memory for kv",
            "the KV cache asked for is larger than the memory that is left beside the weights",
            "lower `kv-cache-memory-bytes` (or VLLM_CPU_KVCACHE_SPACE), or raise "
            "`gpu-memory-utilization` in `args`",
        ),
        Failure(
            r"To serve at least one request with the model's max seq len \((?P<what>\d+)\)",
            "the KV cache cannot hold one request of {what} tokens",
            "lower `max-model-len`, raise `gpu-memory-utilization`, or set `kv-cache-dtype: fp8`",
        ),
        Failure(
            r"User-specified max_model_len \((?P<what>\d+)\) is greater than the derived",
            "max-model-len {what} is longer than the model allows",
            "lower `max-model-len` in `args`, or leave it out",
        ),
        Failure(
            r"Invalid repository ID or local directory|HFValidationError"
            r"|Repo id must be in the form",
            "the model is neither a directory here nor a name on the Hugging Face hub",
            "correct `model` in the server config",
        ),
        Failure(
            r"LocalEntryNotFoundError|outgoing traffic has been disabled|OfflineModeIsEnabled"
            r"|Cannot find an appropriate cached snapshot",
            "the model is not in the local cache, and the hub cannot be asked",
            "download it once with network access (`hf download MODEL`), or give a directory",
        ),
        Failure(
            r"GatedRepoError|401 Client Error|RepositoryNotFoundError",
            "the hub does not give this model: it does not exist, or asks for a licence and token",
            "check the name, accept the licence on the hub, and set HF_TOKEN",
        ),
        Failure(
            r"Cannot find any model weights|no safetensors|No such file .*\.safetensors",
            "the model directory holds no weights",
            "give the directory that has them, or `load-format: dummy` in `args`",
        ),
        Failure(
            r"CUDA out of memory|OutOfMemoryError",
            "the GPU ran out of memory",
            "lower `gpu-memory-utilization` or `max-num-seqs` in `args`, or end other GPU programs",
        ),
        Failure(
            r"Fatal Python error: Illegal instruction",
            "vLLM used an instruction that this CPU lacks or a virtual machine forbids (AMX?)",
            "set `dtype: float32` in `args`, which takes other kernels, or another build of vLLM",
        ),
        Failure(
            r"Fatal Python error: (?P<what>Segmentation fault|Bus error|Aborted)",
            "vLLM crashed in native code ({what})",
            "read the stack in the log below that line",
        ),
        Failure(
            r"Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver",
            "vLLM finds no GPU",
            "check `nvidia-smi`; in a container, that the GPU is handed to it",
        ),
        Failure(
            r"No module named '?vllm",
            "the interpreter has no vLLM",
            "set `runner: {process: {interpreter: …}}` to the Python of an environment with vLLM",
        ),
        Failure(
            r"PackageNotFoundError: No package metadata was found for vllm",
            "the `vllm` command does not work with this build, which is installed under "
            "another name",
            "set `runner: {process: {interpreter: …}}` to its Python, which runs it as a module",
        ),
        Failure(
            r"Value error, (?P<what>.*?)(?: \[type=|$)",
            "vLLM refuses the config ({what})",
            "correct `args` or `model` in the server config",
        ),
        Failure(
            r"Worker proc \S+ died unexpectedly",
            "a worker process of vLLM was killed or crashed",
            "look for the out-of-memory killer in `dmesg`, and above that line in the log",
        ),
        Failure(
            r"EngineDeadError|EngineCore encountered",
            "vLLM's engine process crashed",
            "read the stack trace in the log above that line",
        ),
        Failure(
            r"Engine core initialization failed",
            "vLLM's engine process failed while starting",
            "read the stack trace in the log above that line",
        ),
    ),
    body={"ignore_eos": True},
    token_prompts=True,
    counters=COUNTERS,
    version=version_at("/version"),
    effective=effective,
    api_key="VLLM_API_KEY",
    owned_by="vllm",
    metrics_prefix="vllm:",
)
