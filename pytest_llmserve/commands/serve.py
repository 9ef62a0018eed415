"""`llmserve serve`: a server in the foreground until Ctrl-C: emulated, or that of a config."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmserve.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from pytest_llmserve.servers import ServerConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_LOOK = 0.5  # seconds between two looks at whether the server is still there


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command; its work is in the namespace as `run`."""
    parser = subparsers.add_parser(
        "serve",
        help="serve in the foreground: the emulated engine, or a server config",
        description="Serve until Ctrl-C. With --engine emulator, all further options go to the "
        "emulated engine (`llmserve serve --engine emulator -- --help` shows them). With --server, "
        "a server config is started as tests would start it, and imitated where it cannot run.",
        allow_abbrev=False,
    )
    parser.add_argument("--engine", metavar="NAME", help="emulator, or which engine a config needs")
    parser.add_argument("--server", metavar="NAME|FILE", help="a server config")
    parser.set_defaults(run=run, passes_on=True)


def run(options: argparse.Namespace) -> int:
    """Serve; 0 after Ctrl-C or SIGTERM.

    Raises ConfigError for options that say nothing to serve, ServerError if the server does not
    start or ends by itself.
    """
    rest = [word for word in options.rest if word != "--"]
    if options.server:
        if rest:
            raise ConfigError(
                f"llmserve serve --server {options.server}: {rest[0]} is not an option beside it; "
                "write the engine's arguments into the server config"
            )
        return _serve_config(options.server, options.engine)
    from pytest_llmserve.engines import engine_name

    if options.engine is None or engine_name(options.engine) != "emulator":
        raise ConfigError(
            "llmserve serve: give --engine emulator, or --server NAME for any other engine"
        )
    from pytest_llmserve.emulator.__main__ import main

    return main(rest)


def _serve_config(name: str, engine: str | None) -> int:
    from pytest_llmserve.engines import get_engine
    from pytest_llmserve.launch.manager import ServerManager
    from pytest_llmserve.session import new_run_dir

    config = _chosen(name, engine)
    run_dir = new_run_dir()
    manager = ServerManager(run_dir, os.getpid())
    keep_log = False
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        server = manager.get(config, get_engine(config.engine), _say)
        if server.emulated:
            _say("EMULATED: no time it takes was measured on real hardware")
        _say(f"{server.engine} {server.version} serves {server.model} at {server.endpoint}")
        if server.api_key and not config.api_key_env:
            key = run_dir / "api-key"
            key.touch(mode=0o600)
            key.write_text(server.api_key)
            _say(f"its API key is in {key}")
        _say(f"its log is {server.log}; Ctrl-C ends it")
        while manager.alive(server):
            time.sleep(_LOOK)
        raise ServerError(manager.exit_reason(server) or f"the server {config.name} has ended")
    except KeyboardInterrupt:
        _say("ending")
        return 0
    except ServerError:
        keep_log = True
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is on its way already
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        manager.stop_all()
        if not keep_log:
            shutil.rmtree(run_dir, ignore_errors=True)


def _chosen(name: str, engine: str | None) -> ServerConfig:
    """The config, or the one that imitates it where it cannot run or emulation is asked for."""
    from pytest_llmserve.engines import engine_name, normalise_model
    from pytest_llmserve.resolve import emulate, missing
    from pytest_llmserve.server_files import find_server_config

    config = find_server_config(name, (Path("suites/servers"), Path("servers")))
    model, notice = normalise_model(config.model)
    config = replace(config, model=model)
    if notice:
        _say(notice)
    wanted = "auto" if engine in (None, "auto") else engine_name(str(engine))
    if config.engine == "attach":
        raise ConfigError(f"server config {config.name} is of a server that runs already")
    if wanted not in ("auto", "emulator", config.engine):
        raise ConfigError(
            f"--engine {engine}, but server config {config.name} is for {config.engine}: leave it "
            f"out, or name a config for {wanted}"
        )
    lacks = missing(config) if wanted == "auto" and config.engine != "emulator" else None
    if not lacks and wanted != "emulator":
        return config
    imitation = emulate(config)
    if imitation is None:
        raise ConfigError(
            f"server config {config.name} cannot be imitated, because it has no emulation section"
            + (f", and cannot run: {lacks}" if lacks else "")
        )
    if lacks:
        _say(f"{config.name} is EMULATED: {lacks}")
    return imitation


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"llmserve: {text}", file=sys.stderr, flush=True)
