"""A command on a pseudo-terminal, and what a person would see on it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

_PART = re.compile(r"\x1b7|\x1b8|\x1b\[K|\x1b\[[0-9;]*m|\r|\n|[^\x1b\r\n]+|\x1b")
_BEGUN = re.compile(r"(?:\x1b\[?[0-9;]*)?$")


class Screen:
    """As much of a terminal as pytest and our notes use: a cursor that can be saved, erasing to the
    end of a line, and a line break only when a character comes that does not fit."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines = [""]
        self._column = 0
        self._saved = (0, 0)

    def feed(self, text: str) -> None:
        for part in _PART.findall(text):
            if part == "\r":
                self._column = 0
            elif part == "\n":
                self._down()
            elif part == "\x1b7":
                self._saved = len(self.lines), self._column
            elif part == "\x1b8":
                assert self._saved[0] == len(self.lines), "a note went on to another line"
                self._column = self._saved[1]
            elif part == "\x1b[K":
                self.lines[-1] = self.lines[-1][: self._column]
            elif part == "\x1b":
                raise AssertionError(f"a control sequence that is not known in {text!r}")
            elif not part.startswith("\x1b"):
                for character in part:
                    self._put(character)

    def _put(self, character: str) -> None:
        if self._column == self.width:
            self._down()
            self._column = 0
        line = self.lines[-1].ljust(self._column)
        self.lines[-1] = line[: self._column] + character + line[self._column + 1 :]
        self._column += 1

    def _down(self) -> None:
        self.lines.append("")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


def watch(
    command: Sequence[str], folder: Path, width: int = 80, limit: float = 900.0
) -> tuple[int, str, list[str]]:
    """Exit status, the screen at the end, and the screens on the way there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    screen, seen, deadline = Screen(width), [""], time.monotonic() + limit
    # A character or a control sequence may come in two pieces.
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            text = rest + decoder.decode(data)
            rest = _BEGUN.search(text)[0]  # type: ignore[index]
            screen.feed(text.removesuffix(rest) if rest else text)
            seen.append(screen.text)
    finally:
        process.kill() if time.monotonic() >= deadline else None
        status = process.wait()
        os.close(ours)
    return status, screen.text, seen
