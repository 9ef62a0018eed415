"""The truth log: when every token was due and when it really left.

A CSV file, one row an event, times in seconds of `time.monotonic()` (the same clock in every
process of a machine):

| column | meaning |
|---|---|
| `request` | the request's id, as in the response |
| `token` | output tokens that were sent with this event included; 0: the request's arrival |
| `due` | when the schedule wanted the event (arrival: when its last byte had come) |
| `before` | just before `send` of the event's bytes |
| `after` | just after `send` returned: on loopback the receiver's kernel has them by then |

The kernel stamps a loopback packet inside `send`, so a right client sees an arrival between
`before` and `after`. Rows are kept as tuples while there is anything to be done and written when
the server is idle or stops.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

HEADER = ("request", "token", "due", "before", "after")
_Row = tuple[str, int, float, float, float]


class TruthLog:
    """An append-only log file."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", newline="")
        self._rows: list[_Row] = []
        self._file.write(",".join(HEADER) + "\n")
        self._file.flush()
        self.add = self._rows.append

    def flush(self, limit: int | None = None) -> None:
        """Write the oldest `limit` rows (None: all)."""
        rows = self._rows[:limit]
        del self._rows[: len(rows)]
        self._file.writelines(f"{r},{n},{d:.7f},{b:.7f},{a:.7f}\n" for r, n, d, b, a in rows)
        self._file.flush()

    @property
    def pending(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        self.flush()
        self._file.close()


@dataclass(frozen=True)
class Event:
    """One row of the log; `due`, `before` and `after` in seconds."""

    request: str
    token: int
    due: float
    before: float
    after: float


def read_truth(path: Path) -> Iterator[Event]:
    """The rows of a log, in the order in which they happened."""
    with path.open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for request, token, due, before, after in rows:
            yield Event(request, int(token), float(due), float(before), float(after))
