"""The process runner: which program, with which environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_llmserve.engines import FILES, Engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.servers import ProcessRunner, ServerConfig


def program_words(config: ServerConfig, engine: Engine) -> list[str]:
    """The words before the engine's arguments: a program, or a Python and a module.

    Raises ServerError, with what to set, if there is no such program on this machine.
    """
    runner = config.runner
    assert isinstance(runner, ProcessRunner)
    where = config.source or f"the server config {config.name}"
    if not (engine.program or engine.module):
        raise ServerError(
            f"{where}: {engine.name} is not started by pytest: start it with its own tools, and "
            "give its URL as --llmserve-endpoint, or with engine attach as endpoint."
        )
    if runner.interpreter:
        if not engine.module:
            raise ServerError(
                f"{where}: runner.process.interpreter: {engine.name} is not a Python program; "
                f"set runner.process.executable to its `{engine.program}` instead."
            )
        return [
            _found(runner.interpreter, f"{where}: runner.process.interpreter"),
            "-m",
            engine.module,
        ]
    if runner.executable:
        return [_found(runner.executable, f"{where}: runner.process.executable")]
    if engine.program and (found := _beside_python(engine.program) or shutil.which(engine.program)):
        return [found]
    if engine.module and not engine.program:
        if importlib.util.find_spec(engine.module.partition(".")[0]) is None:
            raise ServerError(
                f"{where}: this Python has no module {engine.module}; install {engine.name}, or "
                "set runner.process.interpreter to the Python of an environment that has it."
            )
        return [sys.executable, "-m", engine.module]
    raise ServerError(
        f"{where}: there is no program `{engine.program}` on PATH; install {engine.name}, or set "
        "runner.process.executable (or interpreter) to where it is."
    )


def process_command(config: ServerConfig, engine: Engine, port: int, files: str) -> list[str]:
    """The whole command line. `files` is the folder that holds the engine's files."""
    words = engine.command(config, port)
    return [*program_words(config, engine), *(word.replace(FILES, files) for word in words)]


def process_environment(
    config: ServerConfig,
    engine: Engine,
    port: int,
    inherited: Mapping[str, str],
    gpus: Sequence[str] = (),
) -> dict[str, str]:
    """The server's environment: ours without pytest's own variables, then the engine's, then the
    config's. It sees the `gpus` that it got and no others."""
    variables = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(("PYTEST_", "COV_CORE_"))
    }
    if engine.module.startswith("pytest_llmserve."):
        # Our own module runs from where we are, installed or not.
        root = str(Path(__file__).parents[2])
        known = variables.get("PYTHONPATH", "")
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, known)))
    variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return variables | server_variables(config, engine, port)


def server_variables(config: ServerConfig, engine: Engine, port: int) -> dict[str, str]:
    """The variables that we, the engine and the config add, for whichever runner."""
    # Engines written in Python log at once, and leave a stack where they crash in native code.
    ours = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    engine_own = engine.environment(config)
    filled = {name: value.replace("{port}", str(port)) for name, value in engine_own.items()}
    return ours | filled | dict(config.env)


def _beside_python(program: str) -> str | None:
    """The program of the environment that runs pytest, whether it is activated or not."""
    return shutil.which(program, path=str(Path(sys.executable).parent))


def _found(program: str, where: str) -> str:
    found = shutil.which(str(Path(program).expanduser()))
    if found is None:
        there = "is not executable" if Path(program).expanduser().exists() else "is not there"
        raise ServerError(f"{where}: {program} {there}; correct the path.")
    return found
