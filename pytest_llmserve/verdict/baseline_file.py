"""Baseline files: `<root>/<hardware>/<model>/<server>/<test>.json`, reviewed like code.

Plain JSON by `schemas/baseline.schema.json`, runs appended and never changed, keys in a stable
order and each array of numbers on one line, so that a diff shows the runs that came. A file is
replaced whole under a lock, so that two writers at once lose nothing and a reader never sees
half a file. A file that cannot be read for what it is, is reported and left as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.verdict.hardware import safe

SCHEMA = "llmserve-baseline/1"
#: Larger files are refused unread: about 2,000 runs.
MOST_BYTES = 16 << 20
#: How long a writer waits for another one, seconds.
LOCK_TIMEOUT = 60.0
#: Turns the content of an older schema version into that of the next, by the older one's name.
Migrations = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
MIGRATIONS: Migrations = {}

_MEND = (
    "restore the file from version control, or delete it and store new runs with "
    "--llmserve-update-baselines=new"
)


@dataclass(frozen=True)
class StoredRun:
    """One run of a baseline. `metrics` by dotted name; `sketch` as `sketch()` makes it."""

    id: str
    time: str
    duration: float
    metrics: Mapping[str, float]
    samples: Mapping[str, int]
    uncertified: Sequence[str]
    sketch: Mapping[str, Sequence[float]]
    fingerprint: Mapping[str, Any]
    validity: Mapping[str, str]


@dataclass(frozen=True)
class Accepted:
    """A worse run that was accepted on purpose."""

    run: str
    time: str
    reason: str
    changes: Mapping[str, float]


@dataclass(frozen=True)
class LoadBaseline:
    """The runs of one load, oldest first; `origin` are the ids that drift is judged against."""

    load: Mapping[str, Any]
    origin: Sequence[str] = ()
    accepted: Sequence[Accepted] = ()
    runs: Sequence[StoredRun] = ()

    def current(self) -> Sequence[StoredRun]:
        """The runs since (and with) the last accepted one."""
        if not self.accepted:
            return self.runs
        ids = [run.id for run in self.runs]
        return self.runs[ids.index(self.accepted[-1].run) :]


@dataclass(frozen=True)
class Baseline:
    """One file: a test on one hardware, model and server."""

    test: str
    hardware: str
    model: str
    server: str
    emulated: bool
    loads: Mapping[str, LoadBaseline] = field(default_factory=dict)


def baseline_path(root: Path, hardware: str, model: str, server: str, test: str) -> Path:
    """Where the baseline of a test lies. Always below `root`; two tests never share a file,
    because its name ends in a digest of model, server and test as they are."""
    digest = hashlib.sha256(json.dumps([model, server, test]).encode()).hexdigest()[:8]
    readable = safe(test.rsplit("/", 1)[-1].replace("::", "."), 100)
    return root / safe(hardware) / safe(model) / safe(server) / f"{readable}-{digest}.json"


def read(path: Path, migrations: Migrations = MIGRATIONS) -> Baseline | None:
    """The baseline in a file, None if there is none.

    Raises ConfigError in one sentence if the file is not what it should be.
    """
    try:
        text = read_text(path, f"baseline file {path}", MOST_BYTES, _MEND)
    except FileNotFoundError:
        return None
    return decode(text, str(path), migrations)


def read_text(path: Path, what: str, most: int, mend: str) -> str:
    """The text of a file of up to `most` bytes. Raises ConfigError, or FileNotFoundError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise ConfigError(f"{what} has {size:,} bytes and may have {most:,}: {mend}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is not UTF-8 text: {mend}") from None
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be read ({error.strerror}): make it a readable file"
        ) from None


def decode(text: str, name: str, migrations: Migrations = MIGRATIONS) -> Baseline:
    """The baseline in JSON text; `name` is what errors call it. Raises ConfigError."""
    content = parse_json(text, f"baseline file {name}", _MEND)
    version = content.get("schema") if isinstance(content, dict) else None
    while isinstance(version, str) and version in migrations and isinstance(content, dict):
        content = migrations[version](content)
        version = content.get("schema")
    if version != SCHEMA:
        known = (
            f"{SCHEMA!r} and, by migration, {sorted(migrations)}" if migrations else f"{SCHEMA!r}"
        )
        raise ConfigError(
            f"baseline file {name}: schema is {_short(version)}, and this version reads {known}: "
            "upgrade pytest-llmserve, or give another --llmserve-baselines folder"
        )
    validate(content, "baseline", f"baseline file {name}", _MEND)
    return _build(content, name)


def encode(baseline: Baseline) -> str:
    """JSON text of a baseline: one-space indent, arrays of numbers on one line."""
    content = {"schema": SCHEMA, **asdict(baseline)}
    for load in content["loads"].values():
        for run in load["runs"]:
            for key in ("metrics", "samples", "sketch", "fingerprint", "validity"):
                run[key] = dict(sorted(run[key].items()))
    content["loads"] = dict(sorted(content["loads"].items()))
    text = json.dumps(content, indent=1, allow_nan=False)
    # No string of JSON holds a raw line break, so this touches arrays of numbers only.
    return re.sub(r"\[\n[-+.\deE,\s]*\]", lambda m: " ".join(m.group().split()), text) + "\n"


def update(path: Path, root: Path, change: Callable[[Baseline | None], Baseline]) -> Baseline:
    """Replace a baseline by `change` of it, alone: other writers below `root` wait.

    Raises ConfigError, leaving the file as it is, if it or its folder is not as it should be.
    """
    from filelock import FileLock, Timeout

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock", timeout=LOCK_TIMEOUT):
            changed = change(read(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, encode(changed))
            return changed
    except Timeout:
        raise ConfigError(
            f"baseline folder {root}: another run holds its lock since {LOCK_TIMEOUT:g} s: "
            f"end that run, or delete {root / '.lock'}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"baseline file {path} cannot be written ({error.strerror}): "
            "make the folder writable, or give another with --llmserve-baselines"
        ) from None


def _replace(path: Path, text: str) -> None:
    """Put the text in place at once and durably, or leave all as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def parse_json(text: str, what: str, mend: str) -> Any:
    """The value of strict JSON: no NaN, no infinity, no bottomless nesting.

    Raises ConfigError naming `what` ("baseline file …") and the `mend`.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"it holds {constant}, which is no number")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:20])

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        problem = "it is nested too deeply"
    except json.JSONDecodeError as error:
        problem = f"{error.msg} in line {error.lineno}"
    except ValueError as error:
        problem = str(error)[:100]
    raise ConfigError(f"{what} is not valid JSON ({problem}): {mend}")


@functools.cache
def schema_validator(name: str) -> Any:
    """A validator of `schemas/<name>.schema.json`."""
    from jsonschema import Draft202012Validator

    text = files("pytest_llmserve").joinpath(f"schemas/{name}.schema.json").read_text()
    return Draft202012Validator(json.loads(text))


def validate(content: Any, schema: str, what: str, mend: str) -> None:
    """ConfigError naming `what`, the key and the `mend` if the content breaks the schema."""
    from jsonschema.exceptions import best_match

    try:
        error = best_match(schema_validator(schema).iter_errors(content))
        if error is None:
            return
        problem = _problem(error)
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply: {mend}") from None
    where = ".".join(str(part) for part in error.absolute_path)
    at = f"at {where!r}, " if where else ""
    raise ConfigError(f"{what}: {at}{problem}: {mend}")


def _problem(error: Any) -> str:
    """What a JSON Schema error means, without the whole instance in it."""
    if error.validator == "type":
        kinds = error.validator_value
        kinds = kinds if isinstance(kinds, str) else " or ".join(kinds)
        return f"{_short(error.instance)} should be of type {kinds}"
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"the key {missing[0]!r} is missing"
    if error.validator == "additionalProperties" and error.validator_value is False:
        extra = sorted(set(error.instance) - set(error.schema["properties"]))
        return f"the key {_short(extra[0])} is unknown"
    return f"{_short(error.instance)} breaks {error.validator} {_short(error.validator_value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _build(content: Mapping[str, Any], name: str) -> Baseline:
    loads = {}
    for key, value in content["loads"].items():
        runs = tuple(_run(run) for run in value["runs"])
        accepted = tuple(Accepted(**entry) for entry in value["accepted"])
        ids = {run.id for run in runs}
        if len(ids) < len(runs):
            raise ConfigError(
                f"baseline file {name}: at 'loads.{key}', a run id occurs twice: {_MEND}"
            )
        for pinned in (*value["origin"], *(entry.run for entry in accepted)):
            if pinned not in ids:
                raise ConfigError(
                    f"baseline file {name}: at 'loads.{key}', run {pinned!r} is referred to and "
                    f"missing: {_MEND}"
                )
        loads[key] = LoadBaseline(value["load"], tuple(value["origin"]), accepted, runs)
    facts = {k: content[k] for k in ("test", "hardware", "model", "server", "emulated")}
    return Baseline(**facts, loads=loads)


def _run(entry: Mapping[str, Any]) -> StoredRun:
    sketches = {name: tuple(points) for name, points in entry["sketch"].items()}
    return StoredRun(**{**entry, "uncertified": tuple(entry["uncertified"]), "sketch": sketches})
