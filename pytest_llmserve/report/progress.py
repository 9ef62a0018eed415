"""What goes on while a server starts or a load runs: where it is and how long it will take.

On a terminal a note to the right of what pytest wrote, gone when it is over. Elsewhere, as in the
log of a CI job, a line now and then if it takes long. A pytest-xdist worker has neither: it leaves
its note in a file of the run's folder, and the controller shows it (`Board`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_llmserve.report.console import Console, columns
from pytest_llmserve.report.text import clean

if TYPE_CHECKING:
    import pytest

    from pytest_llmserve.load.control import Progress
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.servers import Server

#: Seconds after which a line is written where there is no terminal, and between two of them.
FIRST, EVERY = 10.0, 30.0
#: Columns that a note needs at least; with fewer it goes to a line of its own.
_ROOM = 24
#: Seconds between two looks of the controller, and after which a worker's note is an old one.
_LOOK, _OLD = 0.5, 10.0
_FOLDER, _SERVERS = "progress", "servers"


class Note(Protocol):
    """Shows facts on what goes on, the most telling first, and takes them away at the end."""

    def show(self, facts: Sequence[str]) -> None: ...

    def end(self) -> None: ...


@contextmanager
def live(config: pytest.Config, title: str) -> Generator[Callable[[str], None], None, None]:
    """Show `title`, the text handed over and the elapsed time until the block ends."""
    note = _note_of(config)
    start = time.monotonic()
    said = "…"

    def tell(text: str) -> None:
        nonlocal said
        said = text
        with lock:
            note.show([title, *text.split(" · "), f"{time.monotonic() - start:.0f} s"])

    lock, over = threading.Lock(), threading.Event()

    def keep() -> None:
        # A stage of a start may last for minutes: the time goes on.
        while not over.wait(1.0):
            tell(said)

    ticking = threading.Thread(target=keep, daemon=True)
    tell(said)
    ticking.start()
    try:
        yield tell
    finally:
        over.set()
        ticking.join()
        note.end()


@contextmanager
def live_load(
    config: pytest.Config, server: Server, plan: LoadPlan
) -> Generator[Callable[[Progress], None], None, None]:
    """The note of a load: time left, phase, requests in flight and done, output tokens so far."""
    title = describe_load(plan) + (", emulated" if server.emulated else "")
    with live(config, title) as tell:
        yield lambda p: tell(
            f"{_left(p, plan)}{p.phase} · {p.in_flight} in flight · {p.requests} done · "
            f"{p.tokens} tokens"
        )


def describe_load(plan: LoadPlan) -> str:
    """A load in a few words: "30 users", "5 requests/s (poisson)"."""
    arrivals = plan.arrivals
    if arrivals.kind == "closed":
        return f"{arrivals.users} user{'s' if arrivals.users > 1 else ''}"
    if arrivals.kind == "trace":
        return f"{arrivals.rate:.3g} requests/s from a trace"
    return f"{arrivals.rate:g} requests/s ({arrivals.arrivals})"


def _left(progress: Progress, plan: LoadPlan) -> str:
    """How long the load will go on, as far as the plan says: the drain is over when it is over."""
    if progress.remaining is None:
        return ""
    if progress.phase == "drain":
        return f"at most {progress.remaining:.0f} s left · "
    later = plan.duration if progress.phase == "ramp" else 0.0
    return f"{progress.remaining + later:.0f} s left · "


def _note_of(config: pytest.Config) -> Note:
    told = getattr(config, "workerinput", {})
    if "llmserve_run_dir" in told:
        return _Left(Path(told["llmserve_run_dir"], _FOLDER, str(told["workerid"])))
    return note_on(config)


def note_on(config: pytest.Config) -> Note:
    """Where a process that reports shows its notes."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return _Nowhere()
    capture = config.pluginmanager.get_plugin("capturemanager")
    free = config.getoption("capture", "no") == "no"
    if reporter.isatty and os.environ.get("TERM") != "dumb":
        return _Beside(reporter, capture, free)
    if config.get_verbosity() < 0:
        return _Nowhere()
    gathers = config.pluginmanager.has_plugin("dsession")
    return _Now(reporter, capture, "" if config.get_verbosity() > 0 and not gathers else "\n")


class _Nowhere:
    def show(self, facts: Sequence[str]) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass
class _Beside:
    """On a terminal, to the right of what pytest wrote: the cursor is where it was, so that what
    is written next takes the note's place. With `free` output (-s) nobody knows where the cursor
    is: the note begins on a line of its own, without an empty one."""

    reporter: Any
    capture: Any
    free: bool
    _fresh: bool = field(default=False, init=False)

    def show(self, facts: Sequence[str]) -> None:
        writer = self.reporter._tw
        begin = ""
        with _uncaptured(self.capture):  # where the width can be asked for too
            console = Console.of(self.reporter)
            width = columns(self.reporter)
            used = 0 if self.free else writer.width_of_current_line % width + 2
            if self.free and not self._fresh:
                # As many blanks as there are columns end on a new line, but for an empty one.
                begin = " " * width + "\r"
            elif width - used <= _ROOM:
                self.reporter.ensure_newline()
                if writer.width_of_current_line:
                    writer.line()
                used = 0
            self._fresh = True
            text = "  " * bool(used) + _fitting(
                [console.fitting(f) for f in facts], width - used - 1
            )
            _raw(self.reporter, f"{begin}\x1b7{text}\x1b[K\x1b8")

    def end(self) -> None:
        with _uncaptured(self.capture):
            _raw(self.reporter, "\x1b[K")
        self._fresh = False


@dataclass
class _Now:
    """Where there is no terminal: a line after `FIRST` seconds, and another every `EVERY`.

    pytest goes on where the line ends (`end_of_line`); with -v it begins a new one itself.
    """

    reporter: Any
    capture: Any
    end_of_line: str
    _due: float = field(default=0.0, init=False)

    def show(self, facts: Sequence[str]) -> None:
        now = time.monotonic()
        self._due = self._due or now + FIRST
        if now < self._due:
            return
        self._due = now + EVERY
        text = Console.of(self.reporter).fitting("llmserve: " + ", ".join(map(clean, facts)))
        with _uncaptured(self.capture):
            self.reporter.ensure_newline()
            lead = "\n" if self.reporter._tw.width_of_current_line else ""
            self.reporter._tw.write(lead + text + self.end_of_line, flush=True)

    def end(self) -> None:
        self._due = 0.0


@dataclass(frozen=True)
class _Left:
    """In a file, for the controller."""

    path: Path

    def show(self, facts: Sequence[str]) -> None:
        self.path.parent.mkdir(exist_ok=True)
        _replace(self.path, [clean(fact) for fact in facts])

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


class Board:
    """Shows the workers' notes in the controller of pytest-xdist.

    A thread looks for them and shows them; `paused` keeps it silent while pytest writes.
    """

    def __init__(self, run_dir: Path, note: Note) -> None:
        self._folder = run_dir / _FOLDER
        self._note = note
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._shown = False
        self._thread: threading.Thread | None = None

    def begin(self) -> Sequence[str]:
        """What the workers said before the first test: a line on each server (`tell_servers`)."""
        path = self._folder / _SERVERS
        return path.read_text(encoding="utf-8").split("\n") if path.exists() else ()

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """No note is there, and none comes, while this is entered."""
        with self._lock:
            self._clear()
            yield
        if self._thread is None and self._folder.is_dir():
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Take away what is shown, for good."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._clear()

    def _look(self) -> None:
        while not self._over.wait(_LOOK):
            facts = self._newest()
            with self._lock:
                if facts:
                    self._note.show(facts)
                    self._shown = True
                else:
                    self._clear()

    def _newest(self) -> list[str]:
        """Loads never overlap on a machine, so there is at most one note that counts."""
        found: list[tuple[float, Path]] = []
        for path in self._folder.glob("gw*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime < _OLD:
                    found.append((path.stat().st_mtime, path))
        with contextlib.suppress(OSError):
            if found:
                newest = max(found)[1]
                facts = newest.read_text(encoding="utf-8").split("\n")
                return [f"{newest.name}: {facts[0]}", *facts[1:]]
        return []

    def _clear(self) -> None:
        if self._shown:
            self._note.end()
            self._shown = False


def tell_servers(run_dir: Path, lines: Sequence[str]) -> None:
    """Leave the lines on the servers of a run, for the controller to show."""
    (run_dir / _FOLDER).mkdir(exist_ok=True)
    _replace(run_dir / _FOLDER / _SERVERS, lines)


def _replace(path: Path, lines: Sequence[str]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text("\n".join(lines), encoding="utf-8")
    part.replace(path)


def _fitting(facts: Sequence[str], room: int) -> str:
    """The first facts that fit, cut if not even one does."""
    text = clean(facts[0])
    for fact in facts[1:]:
        if len(text) + len(fact) + 2 > room:
            break
        text += f", {clean(fact)}"
    return text[: max(room, 0)]


def _raw(reporter: Any, text: str) -> None:
    """Write what pytest's writer shall not count as part of its line."""
    file = reporter._tw._file
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(text.encode(encoding, "replace").decode(encoding))
    file.flush()


def _uncaptured(capture: Any) -> Any:
    return capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()
