"""Workloads from files: traces of arrivals and collections of prompts.

A trace is JSON Lines, one request a line, with `at` (seconds) or `timestamp` (milliseconds, the
Mooncake form) and, if the trace tells lengths, `prompt_tokens` and `output_tokens` (or
`input_length` and `output_length`); or the CSV of the Azure LLM inference traces with the columns
`TIMESTAMP`, `ContextTokens` and `GeneratedTokens`.

Prompts are JSON Lines with `prompt` (text) and perhaps `output_tokens` in each line; or a JSON
list in ShareGPT's form, of which the first human turn of each conversation is taken.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: seconds from the first one; lengths are None if it has none."""

    at: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt of a collection."""

    prompt: str
    output_tokens: int | None = None


def read_trace(file: str) -> list[Arrival]:
    """The requests of a trace in order of time; ConfigError if it is none."""
    rows = list(_csv_rows(file) if file.endswith(".csv") else _json_rows(file))
    if not rows:
        raise ConfigError(f"{file}: the trace has no requests")
    rows.sort(key=lambda row: row.at)
    return [Arrival(row.at - rows[0].at, row.prompt_tokens, row.output_tokens) for row in rows]


def _json_rows(file: str) -> Iterator[Arrival]:
    for number, row in _json_lines(file):
        where = f"{file}, line {number}"
        at = row.get("at")
        if at is None and isinstance(row.get("timestamp"), int | float):
            at = row["timestamp"] / 1e3
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise ConfigError(f"{where}: write `at` (seconds) or `timestamp` (milliseconds) here")
        yield Arrival(
            float(at),
            _length(where, row, "prompt_tokens", "input_length"),
            _length(where, row, "output_tokens", "output_length"),
        )


def _csv_rows(file: str) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(_text(file).splitlines()), 2):
        try:
            # Python reads at most microseconds; the traces have 100 ns.
            at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
            yield Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, ValueError, TypeError, AttributeError):
            raise ConfigError(
                f"{file}, line {number}: an Azure trace has the columns TIMESTAMP, ContextTokens "
                "and GeneratedTokens, filled in every line"
            ) from None


def read_samples(file: str) -> list[Sample]:
    """The prompts of a collection in order; ConfigError if it is none."""
    samples = _sharegpt(file) if file.endswith(".json") else _prompt_lines(file)
    found = [sample for sample in samples if sample.prompt.strip()]
    if not found:
        raise ConfigError(f"{file}: there are no prompts in it")
    return found


def _prompt_lines(file: str) -> Iterator[Sample]:
    for number, row in _json_lines(file):
        where = f"{file}, line {number}"
        if not isinstance(row.get("prompt"), str):
            raise ConfigError(f"{where}: write the text of the prompt as `prompt` here")
        yield Sample(row["prompt"], _length(where, row, "output_tokens", "output_length"))


def _sharegpt(file: str) -> Iterator[Sample]:
    try:
        conversations = json.loads(_text(file))
        for conversation in conversations:
            turns = conversation.get("conversations") or conversation.get("conversation") or ()
            human = [turn["value"] for turn in turns if turn.get("from") in ("human", "user")]
            if human and isinstance(human[0], str):
                yield Sample(human[0])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{file}: ShareGPT's form is a JSON list of objects with `conversations`, a list of "
            "objects with `from` and `value`"
        ) from None


def _json_lines(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, line {number}: write one JSON object on each line")
        yield number, row


def _length(where: str, row: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{where}: {name} is {value!r}, write a whole number from 1 up")
        return value
    return None


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); correct the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text") from None
