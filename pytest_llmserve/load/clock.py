"""The client's clocks: kernel receive times brought to `time.monotonic()`.

The kernel stamps arriving data with CLOCK_REALTIME. Both clocks are slewed alike, so their
difference is constant but for steps (an administrator, a first NTP sync, a resumed machine);
it is therefore sampled all through a load, and each stamp is mapped by the sample that fits.
"""

from __future__ import annotations

import struct
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmserve.load.record import Array

#: `SO_TIMESTAMPNS` where its number and `struct timespec` are as on x86-64 and aarch64, else None.
SO_TIMESTAMPNS: int | None = 35 if sys.platform == "linux" and sys.maxsize > 2**32 else None
#: Room for one timestamp in the ancillary data of `recvmsg`.
ANCILLARY = 64

_timespec = struct.Struct("@qq").unpack
# A stamp this far after the read is a clock that stepped, not the granularity of sampling.
_TOLERANCE = 50e-6


def nanoseconds(stamp: bytes | None) -> int:
    """Unix time in ns of a `struct timespec` from the kernel; 0 for none."""
    if stamp is None or len(stamp) != 16:
        return 0
    seconds, rest = _timespec(stamp)
    return int(seconds) * 1_000_000_000 + int(rest)


def nanoseconds_of(stamps: Sequence[bytes | None]) -> Array:
    """`nanoseconds` of many, as int64."""
    try:
        times = np.frombuffer(b"".join(stamps), np.int64)  # type: ignore[arg-type]
        parts = times.reshape(len(stamps), 2)
        return np.asarray(parts[:, 0] * 1_000_000_000 + parts[:, 1])
    except (TypeError, ValueError):  # one is missing, or not of this size
        return np.array([nanoseconds(stamp) for stamp in stamps], np.int64)


class Clock:
    """Samples of the offset between the real-time and the monotonic clock, and the mapping."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._offsets: list[int] = []
        self.sample()

    @property
    def wall_offset(self) -> float:
        """Unix time − monotonic time in seconds, as first sampled."""
        return self._offsets[0] / 1e9

    def sample(self) -> None:
        """Read both clocks; of three tries the one that was interrupted least counts."""
        best, offset = 1 << 62, 0
        for _ in range(3):
            before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
            if after - before < best:
                best, offset = after - before, wall - (before + after) // 2
        self._times.append(time.monotonic())
        self._offsets.append(offset)

    def arrival(self, stamp: bytes | None, read: float) -> float:
        """The arrival of one read as far as it is known now: at most `read`, `read` if unknown."""
        nanos = nanoseconds(stamp)
        if not nanos:
            return read
        arrival = (nanos - self._offsets[-1]) / 1e9
        return min(arrival, read) if read - 60.0 < arrival < read + _TOLERANCE else read

    def arrivals(self, stamps: Array, reads: Array) -> tuple[Array, Array]:
        """Arrival times and lags (read − arrival) of reads, in seconds.

        `stamps`: int64 Unix ns, 0 for none; `reads`: float64 monotonic seconds. Without a stamp
        the arrival is the read and the lag NaN. Of the two samples around a read the one that
        gives the smaller possible lag is believed.
        """
        times, offsets = np.asarray(self._times), np.asarray(self._offsets, dtype=np.int64)
        at = np.clip(np.searchsorted(times, reads) - 1, 0, len(times) - 1)
        after = np.minimum(at + 1, len(times) - 1)
        lags = reads - (stamps - offsets[at]) / 1e9
        others = reads - (stamps - offsets[after]) / 1e9
        swap = (others > -_TOLERANCE) & ((lags < -_TOLERANCE) | (others < lags - _TOLERANCE))
        lags = np.where(swap, others, lags)
        known = (stamps > 0) & (lags > -_TOLERANCE)
        lags = np.where(known, np.maximum(lags, 0.0), np.nan)
        return np.where(known, reads - np.nan_to_num(lags), reads), lags
