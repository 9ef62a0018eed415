"""Ollama. Source: its docs (api.md, openai.md, faq.md). By contract, not run here.

It takes its settings from variables (`env` of the config), loads a model at its first request,
has no metrics and cannot be told to ignore the end of a text, so output lengths are not fixed.
"""

from __future__ import annotations

from pytest_llmserve.engines import Engine, Failure, version_at
from pytest_llmserve.engines.options import option_words
from pytest_llmserve.servers import ServerConfig


def command(config: ServerConfig, port: int) -> list[str]:
    """Arguments after `ollama`; the address goes by OLLAMA_HOST, see `environment`."""
    return ["serve", *option_words(config.args)]


def environment(config: ServerConfig) -> dict[str, str]:
    """`{port}` is filled in by the launcher. Nothing sets OLLAMA_NUM_PARALLEL: that is a choice."""
    return {"OLLAMA_HOST": f"{config.host}:{{port}}", "OLLAMA_KEEP_ALIVE": "-1"}


ENGINE = Engine(
    name="ollama",
    program="ollama",
    module="",
    command=command,
    environment=environment,
    health="/api/version",
    stages=((r"Listening on", "engine ready"),),
    failures=(
        Failure(
            r"[Aa]ddress already in use",
            "the port is taken by another program",
            "leave `port` out of the server config, so that a free one is chosen",
        ),
    ),
    body={},
    token_prompts=False,
    counters={},
    version=version_at("/api/version"),
    needs_gpu=False,
    owned_by="library",
    metrics="",
    notes={
        "key": "Ollama asks for no key",
        "parallel": "OLLAMA_NUM_PARALLEL is 1 unless `env` sets it, so that users queue",
        "length": "the end of a text cannot be ignored: output may be shorter than asked for",
    },
)
