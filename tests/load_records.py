"""Records made by hand, for the arithmetic that follows them."""

from __future__ import annotations

import numpy as np

from pytest_llmserve.load.record import ERRORS, Record, RecordInfo


def make_record(rows, *, start=0.0, ramp_end=0.0, plan_end=10.0, **info):
    """A record of rows: dicts with `intended`, `events` (times), and anything else of a row."""
    rows = sorted(rows, key=lambda row: row["intended"])

    def column(name, default, dtype):
        return np.array([row.get(name, default(row)) for row in rows], dtype=dtype)

    nan = float("nan")
    counts = [len(row["events"]) for row in rows]
    times = np.array([t for row in rows for t in row["events"]], dtype=float)
    request = np.repeat(np.arange(len(rows)), counts).astype(np.int32)
    output = column("output_tokens", lambda row: len(row["events"]), np.int32)
    share = [
        row.get(
            "tokens",
            [output[i] / max(1, counts[i])] * counts[i] if output[i] >= 0 else [1.0] * counts[i],
        )
        for i, row in enumerate(rows)
    ]
    facts = {
        "start": start, "ramp_end": ramp_end, "plan_end": plan_end, "wall_offset": 0.0,
        "timestamps": "kernel", "token_source": "usage", "cpu": 0.1, "stalls": 0.0,
        "incomplete": False, "version": "1", **info,
    }  # fmt: skip
    return Record(
        info=RecordInfo(**facts),
        phase=column("phase", lambda row: 1, np.uint8),
        user=column("user", lambda row: -1, np.int32),
        intended=column("intended", lambda row: nan, float),
        sent=column("sent", lambda row: row["intended"], float),
        first=column("first", lambda row: row["events"][0] if row["events"] else nan, float),
        last=column("last", lambda row: row["events"][-1] if row["events"] else nan, float),
        end=column("end", lambda row: row["events"][-1] if row["events"] else nan, float),
        connect=column("connect", lambda row: 0.0, float),
        status=column("status", lambda row: 200, np.int16),
        error=np.array([ERRORS.index(row.get("error", "none")) for row in rows], np.uint8),
        prompt_tokens=column("prompt_tokens", lambda row: 10, np.int32),
        output_tokens=output,
        cached_tokens=column("cached_tokens", lambda row: -1, np.int32),
        want_prompt=column("want_prompt", lambda row: 10, np.int32),
        want_output=column("want_output", lambda row: len(row["events"]), np.int32),
        events=np.array(counts, np.int32),
        event_request=request,
        event_time=times,
        event_lag=np.full(len(times), 1e-4, np.float32),
        event_tokens=np.array([t for s in share for t in s], np.float32),
        event_coalesced=np.array(
            [c for row in rows for c in row.get("coalesced", [False] * len(row["events"]))], bool
        ),
    )
