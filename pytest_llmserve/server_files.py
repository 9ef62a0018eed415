"""Server configs as files: YAML → checked against the schema → `ServerConfig`.

Configs are data: safe YAML, no code, no shell. `${VARIABLE}` is filled in from the environment
in the values that differ from machine to machine (model, executable, interpreter, mounts,
endpoint) and nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_llmserve.engines import engine_name
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.servers import ContainerRunner, Emulation, ProcessRunner, ServerConfig
from pytest_llmserve.yaml_files import find, read

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def find_server_config(name_or_path: str, directories: Sequence[Path]) -> ServerConfig:
    """The config of that name in the first of `directories` that has it, or of that file.

    Raises ConfigError with the names there are, if there is none of this name.
    """
    return load_server_config(find(name_or_path, directories, "server config"))


def load_server_config(path: Path) -> ServerConfig:
    """Read one config. Raises ConfigError: one sentence with the file, the key and the mend."""
    return _build(path, read(path, "server.schema.json", "server config"))


def _build(path: Path, content: dict[str, Any]) -> ServerConfig:
    plain = dict(content)
    plain.pop("description", None)
    runner = _runner(path, plain.pop("runner", {"process": {}}))
    emulation = plain.pop("emulation", None)
    for key in ("model", "endpoint"):
        if key in plain:
            plain[key] = _fill(path, key, plain[key])
    plain["env"] = {name: str(value) for name, value in plain.get("env", {}).items()}
    try:
        plain["engine"] = engine_name(plain["engine"])
    except ConfigError as error:
        raise ConfigError(f"{path}: engine: {error}") from None
    if "endpoint" in plain:
        plain["endpoint"] = _endpoint(path, plain["endpoint"])
        plain.setdefault("gpus", 0)
    return ServerConfig(
        name=path.stem,
        runner=runner,
        emulation=None if emulation is None else Emulation(**emulation),
        source=str(path),
        **plain,
    )


def _runner(path: Path, section: Mapping[str, Any]) -> ProcessRunner | ContainerRunner:
    kind, given = next(iter(section.items()))
    at = f"runner.{kind}"
    if kind == "process":
        words = {
            key: _program(path, _fill(path, f"{at}.{key}", value)) for key, value in given.items()
        }
        if len(words) == 2:
            raise ConfigError(
                f"{path}: {at}: executable and interpreter exclude each other; keep one of them."
            )
        return ProcessRunner(**words)
    mounts = []
    for number, mount in enumerate(given.get("mounts", ())):
        host, _, inside = _fill(path, f"{at}.mounts.{number}", mount).partition(":")
        mounts.append(f"{_located(path, host)}:{inside}")
    return ContainerRunner(
        image=given["image"],
        runtime=given.get("runtime"),
        mounts=tuple(mounts),
        env=tuple(given.get("env", ())),
        options=tuple(given.get("options", ())),
    )


def _fill(path: Path, key: str, value: str) -> str:
    """`value` with each `${NAME}` replaced by that variable of the environment."""

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        if not _VARIABLE_NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: {key}: ${{{name}}} is not the name of a variable; write ${{NAME}}."
            )
        if not os.environ.get(name):
            raise ConfigError(
                f"{path}: {key}: the environment variable {name} is not set; "
                f"set it (export {name}=…), or write its value into the file."
            )
        return os.environ[name]

    return _VARIABLE.sub(replacement, value)


def _program(path: Path, value: str) -> str:
    """A bare name is looked up on PATH later; anything with a slash is a place."""
    return _located(path, value) if "/" in value else value


def _located(path: Path, value: str) -> str:
    """`~` and relative places, seen from the config's folder. Links are kept: the `python` of a
    virtual environment is one, and what it points to is another environment's."""
    return str(path.parent.absolute() / Path(value).expanduser())


def _endpoint(path: Path, value: str) -> str:
    from urllib.parse import urlsplit

    try:
        url = urlsplit(value)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"{path}: endpoint: {value!r} must be a URL such as http://127.0.0.1:8000."
        )
    return value.rstrip("/").removesuffix("/v1")
