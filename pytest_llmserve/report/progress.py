"""One line that lives on a terminal while a server starts or a load runs; nothing elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from pytest_llmserve.load.control import Progress
    from pytest_llmserve.load.plan import LoadPlan
    from pytest_llmserve.servers import Server


@contextmanager
def live(config: pytest.Config, title: str) -> Generator[Callable[[str], None], None, None]:
    """Show `title`, the elapsed time and whatever text is handed over, on one line of the terminal.

    The line goes when the block ends. Without a terminal, and in pytest-xdist workers, the
    function it gives does nothing.
    """
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not reporter.isatty:
        yield lambda text: None
        return
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    start = time.monotonic()

    def write(line: str) -> None:
        if capture is None:
            reporter.rewrite(line, erase=True)
            return
        with capture.global_and_fixture_disabled():
            reporter.rewrite(line, erase=True)

    def tell(text: str) -> None:
        line = f"{title} · {time.monotonic() - start:.0f} s · {text}"
        write(line[: shutil.get_terminal_size().columns - 1])

    reporter.ensure_newline()
    tell("…")
    try:
        yield tell
    finally:
        write("")
        write("")


@contextmanager
def live_load(
    config: pytest.Config, server: Server, plan: LoadPlan
) -> Generator[Callable[[Progress], None], None, None]:
    """The line of a load: phase, time left, requests in flight and done, output tokens so far."""
    title = describe_load(plan) + (" · emulated" if server.emulated else "")
    with live(config, title) as tell:
        yield lambda p: tell(
            f"{p.phase}{'' if p.remaining is None else f', {p.remaining:.0f} s left'}, "
            f"{p.in_flight} in flight, {p.requests} done, {p.tokens} tokens"
        )


def describe_load(plan: LoadPlan) -> str:
    """A load in a few words: "30 users", "5 requests/s (poisson)"."""
    arrivals = plan.arrivals
    if arrivals.kind == "closed":
        return f"{arrivals.users} user{'s' if arrivals.users > 1 else ''}"
    if arrivals.kind == "trace":
        return f"{arrivals.rate:.3g} requests/s from a trace"
    return f"{arrivals.rate:g} requests/s ({arrivals.arrivals})"
