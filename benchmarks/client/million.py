"""From the bytes of a million events to metrics: `python benchmarks/client/million.py`.

Makes 10,000 answers of 100 events, each event in a read of its own as it comes from a server that
streams slowly, and prints how long decoding, arranging, measuring and saving them takes (CPU
seconds), the size of the saved arrays and the peak memory of the process, the bytes included.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import struct
import tempfile
import time
from pathlib import Path

import numpy as np

from pytest_llmserve.load.assemble import arrays
from pytest_llmserve.load.calibration import CHUNK, HEAD
from pytest_llmserve.load.client import Exchange
from pytest_llmserve.load.clock import Clock
from pytest_llmserve.load.decode import Decoder
from pytest_llmserve.load.plan import LoadPlan, Workload, open_loop
from pytest_llmserve.load.record import Record, RecordInfo
from pytest_llmserve.metrics.definitions import measure

REQUESTS, EVENTS = 10_000, 100
_USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":100}}\n\n'
_END = b"".join(b"%x\r\n%s\r\n" % (len(d), d) for d in (_USAGE, b"data: [DONE]\n\n"))
_TIMESPEC = struct.Struct("@qq")


def exchange(number: int, start: float, offset: float, random: np.random.Generator) -> Exchange:
    made = Exchange(1, -1, number)
    made.intended = made.sent = start + number * 1e-3
    gaps = 0.02 + random.exponential(1e-4, EVENTS)
    times = (made.sent + 0.18 + np.cumsum(gaps)).tolist()
    made.end = times[-1]
    made.want_prompt, made.want_output = 9, EVENTS
    pieces = [HEAD + CHUNK, *[CHUNK] * (EVENTS - 2), CHUNK + _END + b"0\r\n\r\n"]
    for at, piece in zip(times, pieces, strict=True):
        nanoseconds = int((at + offset) * 1e9)
        # Bytes of their own, as each read has.
        data = bytes(bytearray(piece))
        made.reads.append((data, _TIMESPEC.pack(*divmod(nanoseconds, 10**9)), at + 5e-5))
    return made


def main() -> None:
    gc.disable()  # as it is in the client's process
    clock, random = Clock(), np.random.default_rng(1)
    start = time.monotonic() - 60.0
    clock._times[0] = start - 1.0
    took: dict[str, float] = {}
    begun = time.process_time()

    def lap(name: str) -> None:
        nonlocal begun
        took[name] = took.get(name, 0.0) + time.process_time() - begun
        begun = time.process_time()

    kept = []
    for first in range(0, REQUESTS, 1000):  # the client, too, decodes while it has time
        made = [exchange(n, start, clock.wall_offset, random) for n in range(first, first + 1000)]
        begun = time.process_time()
        for one in made:
            decoder = Decoder(stream=True)
            for read in one.reads:
                decoder.feed(read)
            one.answer = decoder.finish(0, EVENTS, one.reads[-1])
            one.reads = []
        lap("decode")
        kept += made
    begun = time.process_time()
    columns = arrays(kept, clock)
    lap("arrange")
    info = RecordInfo(start, start, start + 15.0, clock.wall_offset, "kernel", "usage", 1.0, 0.0,
                      incomplete=False, version="1")  # fmt: skip
    record = Record(info=info, **columns)
    plan = LoadPlan(open_loop(1000, lead_in=0.0), Workload(9, EVENTS), duration=15.0)
    found = measure(record, plan)
    lap("measure")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.npz")
        record.save(path)
        size = path.stat().st_size
    lap("save")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert not record.error.any()
    assert found["itl"]["n"] >= 0.99 * REQUESTS * (EVENTS - 1)
    events = len(record.event_time)
    print(json.dumps({
        "events": events,
        "CPU seconds": {name: round(seconds, 2) for name, seconds in took.items()},
        "decoded to metrics": round(sum(took.values()) - took["save"], 2),
        "saved, MB": round(size / 1e6, 1),
        "peak memory, MB": round(memory / 1e6),
        "load average": os.getloadavg()[0],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
