"""What a server's log tells: how far loading is, and why it failed."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llmserve.engines import Failure

# "(EngineCore pid=12) ERROR 11-23 18:42:49 [core.py:1510] " and the like, before the words.
_PREFIX = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:\[?[\d/:.,TZ +-]+\]?\s*)?(?:\[[^\]]*\]\s*)*"
    r"(?:(?:ERROR|CRITICAL|INFO|WARNING)[: ]\s*)?(?:[\d-]+ [\d:.,]+ )?(?:\[[^\]]+:\d+\] ?)?"
)
_ERROR = re.compile(
    r"^(?:[\w.]*(?:Error|Exception|Fault)\b.*:|.*\berror: |Killed$|Value error, "
    r"|Fatal Python error: )"
)
_WARNING = re.compile(r"\bWARN(?:ING)?\b")
_KEPT = 5
_LONGEST = 300


@dataclass(frozen=True)
class Diagnosis:
    """Why a server failed: one cause, one mend, and the lines of the log that say so."""

    cause: str
    mend: str
    lines: tuple[str, ...]


class LogFollower:
    """Reads what a log has gained since the last look and tells the stage of loading."""

    def __init__(self, path: Path, stages: Sequence[tuple[str, str]]) -> None:
        self._path = path
        self._stages = [(re.compile(pattern), words) for pattern, words in stages]
        self._offset = 0
        self._rest = b""
        self._stage = ""
        #: When the log last gained something (`time.monotonic()`).
        self.grown = time.monotonic()

    def new_stages(self) -> list[str]:
        """The words of the stages that came since the last look, in order, repetitions left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                fresh = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(fresh)
        if fresh:
            self.grown = time.monotonic()
        # Progress bars rewrite their line with carriage returns.
        *whole, self._rest = re.split(rb"[\r\n]", self._rest + fresh)
        found = []
        for line in whole:
            stage = self._words(line.decode("utf-8", "replace"))
            if stage and stage != self._stage:
                self._stage = stage
                found.append(stage)
        return found

    def _words(self, line: str) -> str | None:
        for pattern, words in self._stages:
            if match := pattern.search(line):
                return words.format(*match.groups(default=""))
        return None


def diagnose(text: str, failures: Sequence[Failure]) -> Diagnosis | None:
    """The first of `failures` that the log of a failed start speaks of; None if none does.

    `text` is the log. Warnings are not searched: they name errors that did not happen.
    """
    lines = [line for line in text.splitlines() if not _WARNING.search(line)]
    for failure in failures:
        pattern = re.compile(failure.pattern)
        for line in lines:
            if match := pattern.search(line):
                what = match.groupdict().get("what") or ""
                own = _bare(line)
                others = [other for other in root_lines(text) if other != own]
                return Diagnosis(
                    failure.cause.replace("{what}", what.strip()),
                    failure.mend,
                    (own, *others[: _KEPT - 1]),
                )
    return None


def root_lines(text: str) -> list[str]:
    """The lines of a log that name errors, each once, in order, without their prefixes."""
    seen: dict[str, None] = {}
    for line in text.splitlines():
        bare = _bare(line)
        if _ERROR.match(bare) and not _WARNING.search(line):
            seen.setdefault(bare)
    return list(seen)


def last_lines(text: str) -> list[str]:
    """The end of a log, for a failure that nobody knows yet."""
    return [_bare(line) for line in text.splitlines() if line.strip()][-_KEPT:]


def _bare(line: str) -> str:
    words = _PREFIX.sub("", line, count=1).strip()
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
