"""Server configs: what to serve and how, as data.

A config comes from a YAML file (`suites/servers/NAME.yaml`, checked against
`schemas/server.schema.json`) or from the arguments of `@pytest.mark.llmserve(...)` and of the
fixture factory. Two configs with the same `key` are the same server, which is started once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ProcessRunner:
    """The server is a child process.

    `executable` replaces the engine's own program (for vLLM: `vllm`); `interpreter` runs the
    engine as a module of that Python instead, because engines live in environments of their
    own. Both may start with `~` or be relative to the file that the config came from.
    """

    executable: str | None = None
    interpreter: str | None = None


@dataclass(frozen=True)
class ContainerRunner:
    """The server is a container.

    `runtime` is `docker`, `podman` or None (the first one found). `mounts` are `HOST:INSIDE[:ro]`;
    `options` go to `run` verbatim. `env` names variables to hand over from the environment of
    pytest, so that secrets stay off the command line.
    """

    image: str
    runtime: str | None = None
    mounts: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Emulation:
    """How the emulated engine imitates this server where the real one cannot run.

    `hardware` and `model` name files of the emulator; `weights` and `kv` are precisions
    (`bf16 fp8 nvfp4 int4` and `bf16 fp8`); `options` are further settings of the emulator.
    """

    hardware: str = "dgx-spark"
    model: str = "qwen3-8b"
    weights: str = "nvfp4"
    kv: str = "fp8"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerConfig:
    """One server, as the user wrote it. Time-outs are in seconds.

    `args` are the engine's own options, verbatim (`{"max-num-seqs": 64}`), and `env` variables
    for it. `gpus` is how many GPUs it needs (0: it runs on the CPU). `hardware` is the machine it
    is meant for. `ready_timeout` bounds the whole start, `stall_timeout` (None: no bound) how long
    the log may stay silent in it. `endpoint` is set for engine `attach` only. `source` is the file
    it came from.
    """

    name: str
    engine: str
    model: str = ""
    served_model_name: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    runner: ProcessRunner | ContainerRunner = field(default_factory=ProcessRunner)
    host: str = "127.0.0.1"
    port: int | None = None
    gpus: int = 1
    hardware: str | None = None
    ready_timeout: float = 900.0
    stall_timeout: float | None = None
    stop_timeout: float = 30.0
    endpoint: str | None = None
    api_key_env: str | None = None
    emulation: Emulation | None = None
    source: str | None = None

    @property
    def key(self) -> str:
        """16 hex digits that are equal for configs that make the same server."""
        from dataclasses import asdict

        plain = asdict(self)
        for irrelevant in ("name", "source", "ready_timeout", "stall_timeout", "stop_timeout"):
            plain.pop(irrelevant)
        text = json.dumps(plain, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Server:
    """A server that answers: what the `llm_server` fixture gives.

    `endpoint` is the base URL without a trailing slash or `/v1`; `model` is the name to put into
    requests; `engine` the engine's name; `version` and `effective` (the arguments in force) are
    as the engine itself reports them and empty where it does not say. `emulated` is true if
    there is no real engine behind it. `log` is the server's log file, if we started it.
    """

    config: ServerConfig
    endpoint: str
    model: str
    engine: str
    version: str = ""
    effective: Mapping[str, Any] = field(default_factory=dict)
    emulated: bool = False
    pid: int | None = None
    log: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def local(self) -> bool:
        """Whether the endpoint is on this machine's loopback."""
        from urllib.parse import urlsplit

        host = urlsplit(self.endpoint).hostname or ""
        return host in ("localhost", "::1") or host.startswith("127.")
