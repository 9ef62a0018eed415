"""Server configs as files: YAML → checked against the schema → `ServerConfig`.

Configs are data: safe YAML, no code, no shell. `${VARIABLE}` is filled in from the environment
in the values that differ from machine to machine (model, executable, interpreter, mounts,
endpoint) and nowhere else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from pytest_llmserve.engines import engine_name
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.servers import ContainerRunner, Emulation, ProcessRunner, ServerConfig

SUFFIXES = (".yaml", ".yml")

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def find_server_config(name_or_path: str, directories: Sequence[Path]) -> ServerConfig:
    """The config of that name in the first of `directories` that has it, or of that file.

    Raises ConfigError with the names there are, if there is none of this name.
    """
    if name_or_path.endswith(SUFFIXES) or "/" in name_or_path:
        return load_server_config(Path(name_or_path).expanduser())
    known = server_names(directories)
    if name_or_path in known:
        return load_server_config(known[name_or_path])
    close = get_close_matches(name_or_path, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    where = ", ".join(str(folder) for folder in directories) or "no folder at all"
    there = ", ".join(sorted(known)) or "none"
    raise ConfigError(
        f"There is no server config {name_or_path!r}{hint} Known in {where}: {there}."
    )


def server_names(directories: Iterable[Path]) -> dict[str, Path]:
    """Names of all configs in the folders and their files; an earlier folder hides a later one."""
    found: dict[str, Path] = {}
    for folder in directories:
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if path.suffix in SUFFIXES:
                found.setdefault(path.stem, path)
    return found


def load_server_config(path: Path) -> ServerConfig:
    """Read one config. Raises ConfigError: one sentence with the file, the key and the mend."""
    content = _read(path)
    _check(path, content)
    return _build(path, content)


class _Loader(yaml.SafeLoader):
    """Safe YAML that does not let a second value of the same key win in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, list | dict):
            continue  # the constructor below says that it cannot be a key
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is there twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such server config file; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must be a mapping of keys such as `engine: vllm`, "
            f"but is {'empty' if content is None else type(content).__name__}."
        )
    return content


@cache
def _schema() -> dict[str, Any]:
    text = (files("pytest_llmserve") / "schemas" / "server.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _check(path: Path, content: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(_schema())
    error = jsonschema.exceptions.best_match(validator.iter_errors(content))
    if error is not None:
        raise ConfigError(f"{path}: {_sentence(error)}")


def _sentence(error: jsonschema.ValidationError) -> str:
    """One schema error in words: the key, what is wrong with it, what would be right."""
    key = ".".join(str(part) for part in error.absolute_path)
    at = f"{key}: " if key else ""
    schema: Mapping[str, Any] = error.schema if isinstance(error.schema, Mapping) else {}
    wanted: Any = error.validator_value
    instance: Any = error.instance
    match error.validator:
        case "additionalProperties" if wanted is False:
            known = list(schema.get("properties", {}))
            wrong = next(str(name) for name in instance if name not in known)
            close = get_close_matches(wrong, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            return f"{at}there is no key {wrong!r}{hint} Known keys: {', '.join(known)}."
        case "required":
            missing = next(name for name in wanted if name not in instance)
            return f"{at}the key {missing!r} is missing; add it."
        case "type":
            kinds = [wanted] if isinstance(wanted, str) else wanted
            words = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
            quote = "; put it in quotes" if "string" in kinds else ""
            return f"{at}{_shown(instance)} must be {words}{quote}."
        case "enum":
            return f"{at}{_shown(instance)} must be one of {', '.join(map(str, wanted))}."
        case "maxProperties" | "minProperties" if key == "runner":
            return "runner: must have exactly one of the keys process, container."
        case "pattern":
            about = _PATTERNS.get(error.absolute_schema_path[-2], "in another form")
            return f"{at}{_shown(instance)} must be {about}."
    return f"{at}{error.message}."


_KINDS = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}
_PATTERNS: Mapping[Any, str] = {
    "items": "HOST:INSIDE or HOST:INSIDE:ro for a mount, or the name of a variable",
    "api_key_env": "the name of an environment variable (never the key itself)",
}


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


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
