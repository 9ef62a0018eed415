from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.load.sse import EVENT_CAP, EventStream, EventTooLongError


def feed(*parts: bytes) -> list[bytes]:
    stream = EventStream()
    return [data for part in parts for data in stream.feed(part)] + stream.finish()


def cut(text: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


STREAM = (
    b': a comment\n\ndata: {"a": 1}\n\nevent: x\nid: 3\nretry: 5\ndata:no space\n\n\n'
    b"data: two\ndata: lines\n\ndata\n\ndata:  kept\n\n: ping\ndata: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"no space", b"two\nlines", b"", b" kept", b"[DONE]"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_pair_of_split_points(end, mark):
    text = mark + STREAM.replace(b"\n", end)
    for first in range(len(text) + 1):
        for second in range(first, min(first + 4, len(text) + 1)):
            assert feed(text[:first], text[first:second], text[second:]) == EVENTS


lines = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)


@given(
    st.lists(st.lists(lines, min_size=1, max_size=3), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 1000), max_size=8),
)
def test_any_events_come_through_however_they_are_cut(events, end, places):
    text = "".join("".join(f"data: {line}{end}" for line in event) + end for event in events)
    whole = ["\n".join(event).encode() for event in events]
    assert feed(*cut(text.encode(), places)) == whole


def test_an_event_is_given_with_the_bytes_that_end_it():
    stream = EventStream()
    assert stream.feed(b"data: x\n") == []
    assert stream.feed(b"\ndata: y\n\nda") == [b"x", b"y"]


def test_an_event_without_its_blank_line_is_not_lost():
    assert feed(b"data: a\n\ndata: [DONE]\n") == [b"a", b"[DONE]"]
    assert feed(b": only a comment") == []


def test_a_line_without_end_is_refused():
    stream = EventStream()
    stream.feed(b"d" * EVENT_CAP)
    with pytest.raises(EventTooLongError):
        stream.feed(b"d")
