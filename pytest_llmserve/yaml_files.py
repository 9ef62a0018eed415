"""Files that users write: YAML → checked against a JSON Schema → plain values, or one sentence.

Safe YAML, no code. What is wrong is told with the file, the place or key, and the mend.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from pytest_llmserve.errors import ConfigError

SUFFIXES = (".yaml", ".yml")


def names(directories: Iterable[Path]) -> dict[str, Path]:
    """Names of all such files in the folders; an earlier folder hides a later one."""
    found: dict[str, Path] = {}
    for folder in directories:
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if path.suffix in SUFFIXES:
                found.setdefault(path.stem, path)
    return found


def is_path(name_or_path: str) -> bool:
    """Whether this names a file, and not what is found by its name."""
    return name_or_path.endswith(SUFFIXES) or "/" in name_or_path


def find(name_or_path: str, directories: Sequence[Path], what: str) -> Path:
    """The file of that name in the first of `directories` that has it, or that file.

    Raises ConfigError with the names there are, if there is none of this name. `what` says what it
    is a name of ("server config").
    """
    if is_path(name_or_path):
        return Path(name_or_path).expanduser()
    known = names(directories)
    if name_or_path in known:
        return known[name_or_path]
    close = get_close_matches(name_or_path, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    where = ", ".join(str(folder) for folder in directories) or "no folder at all"
    there = ", ".join(sorted(known)) or "none"
    raise ConfigError(f"There is no {what} {name_or_path!r}{hint} Known in {where}: {there}.")


def read(path: Path, schema: str, what: str) -> dict[str, Any]:
    """The content of a file that the schema of that name describes.

    Raises ConfigError: one sentence with the file, the key and the mend.
    """
    content = _read(path, what)
    _check(path, content, schema)
    return content


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


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such {what} file; check the path.") from None
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
def _schema(name: str) -> dict[str, Any]:
    text = (files("pytest_llmserve") / "schemas" / name).read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _check(path: Path, content: dict[str, Any], schema: str) -> None:
    validator = jsonschema.Draft202012Validator(_schema(schema))
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
