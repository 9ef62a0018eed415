"""The emulated engine, which runs anywhere and says so everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pytest_llmserve.engines import Engine, Failure, Fetch, version_at
from pytest_llmserve.engines.options import option_words
from pytest_llmserve.engines.vllm import COUNTERS
from pytest_llmserve.servers import Emulation, ServerConfig

#: The variable in which the launcher hands over the key.
API_KEY = "LLMSERVE_EMULATOR_API_KEY"

# Options of the real engines that mean the same to the emulator: their names, without dashes or
# underscores → ours. Everything else in `args` is for the real engine alone.
_SHARED = {
    "maxnumseqs": "max-num-seqs",
    "maxbatchsize": "max-num-seqs",  # TensorRT-LLM
    "maxrunningrequests": "max-num-seqs",  # SGLang
    "maxnumbatchedtokens": "max-num-batched-tokens",
    "maxnumtokens": "max-num-batched-tokens",  # TensorRT-LLM
    "chunkedprefillsize": "max-num-batched-tokens",  # SGLang
    "maxmodellen": "max-model-len",
    "maxseqlen": "max-model-len",  # TensorRT-LLM
    "contextlength": "max-model-len",  # SGLang
    "maxnumqueuedreqs": "max-num-queued-reqs",
    "blocksize": "block-size",
    "pagesize": "block-size",  # SGLang
    "enableprefixcaching": "enable-prefix-caching",
    "enableprompttokensdetails": "enable-prompt-tokens-details",
    "numgpublocksoverride": "num-gpu-blocks-override",
    "gpumemoryutilization": "gpu-memory-utilization",
    "speculativeconfig": "speculative-config",
    "seed": "seed",
}


def command(config: ServerConfig, port: int) -> list[str]:
    """Arguments after `python -m pytest_llmserve.emulator`.

    From `config.emulation`, and from `config.args` what means the same to every engine; the
    former's `options` win.
    """
    emulation = config.emulation or Emulation()
    name = config.served_model_name or config.model or emulation.model
    words = ["--host", config.host, "--port", str(port), "--served-model-name", name]
    words += ["--model", emulation.model, "--hardware", emulation.hardware]
    words += ["--weights", emulation.weights, "--kv", emulation.kv]
    options = shared(config.args) | {_plain(k): v for k, v in emulation.options.items()}
    return [*words, *option_words(options, repeated=("fault",)), "--api-key-env", API_KEY]


def shared(args: Mapping[str, Any]) -> dict[str, Any]:
    """What of a real engine's options the emulator understands, in its own spelling."""
    found: dict[str, Any] = {}
    for name, value in args.items():
        ours = _SHARED.get(_plain(name).replace("-", ""))
        if ours == "speculative-config" and isinstance(value, Mapping):
            if "num_speculative_tokens" not in value:
                continue
            value = json.dumps(dict(value))
        if ours is not None and value is not None:
            found[ours] = value
    return found


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def effective(fetch: Fetch) -> Mapping[str, Any]:
    """All settings in force."""
    answer = fetch("/server_info")
    config = answer.get("config") if isinstance(answer, Mapping) else None
    return config if isinstance(config, Mapping) else {}


ENGINE = Engine(
    name="emulator",
    program="",
    module="pytest_llmserve.emulator",
    command=command,
    health="/health",
    stages=(
        (r"Loading weights", "loading weights (emulated)"),
        (r"KV cache size", "KV cache allocated (emulated)"),
        (r"Listening on", "opening the port"),
    ),
    failures=(
        Failure(
            r"error: unrecognized arguments: (?P<what>.*)",
            "the emulated engine does not know the option {what}",
            "correct `options` under `emulation` of the server config",
        ),
        Failure(
            r"error: (?P<what>argument \S+: .*)",
            "the emulated engine refuses an option ({what})",
            "correct `emulation` in the server config",
        ),
        Failure(
            r"\[Errno 98\]|[Aa]ddress already in use",
            "the port is taken by another program",
            "leave `port` out of the server config, so that a free one is chosen",
        ),
        Failure(
            r"error: (?P<what>No available memory for the cache blocks.*|To serve at least one .*)",
            "the model does not fit on the emulated hardware ({what})",
            "correct `emulation` in the server config",
        ),
        Failure(
            r"error: (?P<what>.*)",
            "the emulated engine cannot start ({what})",
            "correct `emulation` in the server config",
        ),
        Failure(
            r"crash-at-load \(emulated fault\)",
            "the emulated engine was told to crash while loading",
            "take the fault crash-at-load out of `emulation.options`",
        ),
    ),
    body={"ignore_eos": True},
    token_prompts=True,
    counters=COUNTERS,  # its own account has their names in every dialect
    version=version_at("/version"),
    effective=effective,
    needs_gpu=False,
    api_key=API_KEY,
    owned_by="pytest-llmserve-emulator",
    metrics="/emulator/metrics",
    metrics_prefix="vllm:",
    notes={"emulated": "no time it takes was measured on the hardware it imitates"},
)
