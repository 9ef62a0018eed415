"""Readiness polling with timers finer than a millisecond.

`epoll_wait` takes whole milliseconds, and asyncio and libuv inherit that: a token that is due
in 0.3 ms leaves up to 1 ms late. An epoll descriptor is itself pollable, so waiting for it
with `select(2)`, whose time-out is in microseconds, gives both scale and precision. Both ends
that must keep exact time use it: the load client and the emulated engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import sys
import time

READ: int = select.POLLIN
WRITE: int = select.POLLOUT

_PR_SET_TIMERSLACK = 29
# Sleep until this long before a deadline and spin for the rest: a wake-up costs about this much on
# bare metal.
_SPIN = 60e-6
_FORGET = 0.05  # how fast a late wake-up is forgotten
# From here on whole milliseconds are good enough for the first part of a wait.
_COARSE = 2e-3


def tighten_timers() -> None:
    """Ask Linux for 1 ns of timer slack instead of 50 µs in this thread; elsewhere do nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


class Poller:
    """A set of file descriptors to wait on, for at most a deadline.

    Descriptors are registered once with a mask of `READ` and `WRITE`; `poll` returns the
    (descriptor, mask) pairs that are ready. Error and hang-up conditions come back as bits of
    the mask that were not asked for, as from epoll.

    Create it early: its own descriptor must be below 1024, as `select(2)` knows no other.
    Without epoll (macOS, the BSDs) it is made of `poll(2)`, which waits whole milliseconds; the
    last one before a deadline is then slept away in short pieces.

    `spin` is the longest to look at the clock before a deadline, in seconds. Virtual machines may
    wake up 0.2 ms late; how late this one does is learned, up to that bound. Who has few deadlines
    can afford it.
    """

    def __init__(self, spin: float = _SPIN) -> None:
        #: Seconds spent looking instead of sleeping: processor time that work could have had.
        self.spun = 0.0
        self._spin = self._spin_at_most = spin
        self._set = select.epoll() if hasattr(select, "epoll") else _PollSet()

    def register(self, fd: int, mask: int) -> None:
        self._set.register(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        self._set.modify(fd, mask)

    def unregister(self, fd: int) -> None:
        """Forget a descriptor; one that is closed already is forgotten by the kernel."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._set.unregister(fd)

    def poll(self, deadline: float | None, *, exact: bool = True) -> list[tuple[int, int]]:
        """Wait until something is ready or `time.monotonic()` reaches `deadline` (None: for ever).

        The last tens of microseconds before the deadline are spent looking instead of sleeping,
        because a sleep would overshoot them. If it need not be `exact`, that is saved, and the
        wait ends up to a millisecond or so late.
        """
        if deadline is None:
            return self._set.poll()
        if not exact:
            return self._set.poll(max(0.0, deadline - time.monotonic()))
        wait = deadline - time.monotonic() - self._spin
        if wait >= _COARSE:  # one call does while the deadline is far away
            ready = self._set.poll(wait - wait % 1e-3 - 1e-3)
            if ready:
                return ready
            wait = deadline - time.monotonic() - self._spin
        if wait > 0:
            self._sleep(wait)
        begun = now = time.monotonic()
        ready = self._set.poll(0)
        if wait > 0 and not ready:
            late = min(max(now - deadline + 2 * self._spin, _SPIN), self._spin_at_most)
            self._spin = max(late, self._spin + (late - self._spin) * _FORGET)
        while not ready and now < deadline:
            ready = self._set.poll(0)
            now = time.monotonic()
        self.spun += now - begun
        return ready

    def _sleep(self, wait: float) -> None:
        if isinstance(self._set, _PollSet):
            self._set.sleep(wait)
        else:
            select.select([self._set], (), (), wait)

    def close(self) -> None:
        self._set.close()


class _PollSet:
    """`poll(2)` with the methods of an epoll object that `Poller` uses."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify
        self.unregister = self._poll.unregister

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        return self._poll.poll(None if timeout is None else timeout * 1e3)

    def sleep(self, wait: float) -> None:
        """Wait until something is ready or about `wait` seconds have passed, never longer."""
        end = time.monotonic() + wait
        if self._poll.poll(int(wait * 1e3)):
            return
        while time.monotonic() < end and not self._poll.poll(0):
            time.sleep(min(1e-4, max(0.0, end - time.monotonic())))

    def close(self) -> None:
        pass
