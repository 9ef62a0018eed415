"""One record from those of several processes: the raw rows together, nothing averaged."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np

from pytest_llmserve.load.record import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmserve.load.record import Array, RecordInfo

#: Clocks that differ by less are those of one machine: the rest is how finely it can be seen.
_SAME_CLOCK = 1e-3
_TIMES = ("intended", "sent", "first", "last", "end", "event_time")


def merge(records: Sequence[Record]) -> Record:
    """The record of a plan that was driven in shards, on the clock of the first.

    Monotonic clocks of different machines have nothing in common, so their times are compared
    through Unix time; the merged times are then as good as those machines' clocks agree.
    """
    if len(records) == 1:
        return records[0]
    first = records[0].info
    shifts = [_shift(one.info, first) for one in records]
    columns: dict[str, Array] = {}
    for one in fields(Record):
        if one.name == "info":
            continue
        moved = [
            getattr(record, one.name) + shift if one.name in _TIMES else getattr(record, one.name)
            for record, shift in zip(records, shifts, strict=True)
        ]
        columns[one.name] = np.concatenate(moved)
    rows = np.cumsum([0, *(len(record.phase) for record in records[:-1])])
    columns["event_request"] = np.concatenate(
        [record.event_request + row for record, row in zip(records, rows, strict=True)]
    )
    return Record(info=_info([one.info for one in records], shifts), **_in_order(columns))


def _shift(info: RecordInfo, first: RecordInfo) -> float:
    """What is to be added to times of one clock to have them on the other."""
    shift = info.wall_offset - first.wall_offset
    return shift if abs(shift) > _SAME_CLOCK else 0.0


def _in_order(columns: dict[str, Array]) -> dict[str, Array]:
    """Rows in order of their intended times, events grouped by them."""
    order = np.argsort(columns["intended"], kind="stable")
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    request = place[columns["event_request"]]
    events = np.argsort(request, kind="stable")
    ordered = {
        name: values[events if name.startswith("event_") else order]
        for name, values in columns.items()
    }
    ordered["event_request"] = request[events]
    return ordered


def _info(infos: Sequence[RecordInfo], shifts: Sequence[float]) -> RecordInfo:
    first = infos[0]
    pairs = list(zip(infos, shifts, strict=True))
    return replace(
        first,
        start=min(one.start + shift for one, shift in pairs),
        timestamps="kernel" if all(one.timestamps == "kernel" for one in infos) else "user",
        token_source="usage" if all(one.token_source == "usage" for one in infos) else "events",
        cpu=sum(one.cpu for one in infos),
        spun=sum(one.spun for one in infos),
        decode_cpu=sum(one.decode_cpu for one in infos),
        stalls=max(one.stalls for one in infos),
        incomplete=any(one.incomplete for one in infos),
        shards=len(infos),
    )
