"""Being scheduled as soon as something arrives, on a machine that others keep busy.

The client needs little processor time, but at once. Where the user may (root, CAP_SYS_NICE, or
`rtprio` in limits.conf), it runs in Linux's lowest real-time priority while it drives a load:
measured with four busy processes on its core that brings the 99th percentile of a wake-up's
delay from 4 ms to 0.1 ms. Elsewhere it asks for short slices, which Linux since 6.12 grants to
anyone (EEVDF: `sched_runtime` of `sched_setattr(2)`); that helps a little and costs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The shortest slice that Linux grants, in ns.
_SLICE = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


#: With so few cores nobody gets one to himself.
_FEW_CORES = 4


def core_for_drivers() -> int | None:
    """The core for calls into a device's driver while a load runs; None if there are few cores.

    Such a call can take milliseconds in the kernel, and a kernel without preemption gives the core
    to nobody meanwhile, real-time priority or not. So telemetry keeps to this core and the client
    off it: both take the last of the cores that they may use.
    """
    if sys.platform != "linux":
        return None
    cores = os.sched_getaffinity(0)
    return max(cores) if len(cores) >= _FEW_CORES else None


def keep_to(core: int) -> None:
    """Let the calling thread use this core only."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {core})


def keep_off(core: int) -> None:
    """Let the calling thread, and those it starts, use all its cores but this one."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {core})


class _Attributes(ctypes.Structure):
    """`struct sched_attr` (include/uapi/linux/sched/types.h), version 0."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


@contextlib.contextmanager
def scheduled_soon() -> Iterator[None]:
    """While it is entered, this process runs soon after it wakes, as far as that is allowed."""
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        _ask_for_short_slices()
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def _ask_for_short_slices() -> None:
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    size = ctypes.sizeof(_Attributes)
    wish = _Attributes(size=size, nice=nice, runtime=_SLICE)
    # A kernel that does not know it refuses or ignores it: nothing is lost.
    ctypes.CDLL(None).syscall(number, 0, ctypes.byref(wish), 0)
