"""Framing and meaning of answers, wherever the bytes are cut."""

from __future__ import annotations

import itertools
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_server import DONE, HEAD, LAST, chunk, delta, event, text, usage

from pytest_llmserve.load.clock import nanoseconds, nanoseconds_of
from pytest_llmserve.load.decode import Decoder
from pytest_llmserve.load.record import ERRORS


def decode(*parts, stream=True, error="none", want=3):
    decoder = Decoder(stream)
    reads = [(part, struct.pack("@qq", 1, i), float(i)) for i, part in enumerate(parts)]
    for read in reads:
        decoder.feed(read)
    answer = decoder.finish(ERRORS.index(error), want, reads[-1] if reads else None)
    return answer, ERRORS[answer.error]


WHOLE = (
    HEAD
    + chunk(delta(role="assistant", content=""))
    + chunk(b": ping\n\n")
    + chunk(delta(content="a"))
    + chunk(delta(reasoning="b") + delta(content=""))
    + chunk(delta(tool_calls=[{"index": 0}])[:9])
    + chunk(delta(tool_calls=[{"index": 0}])[9:])
    + chunk(usage(7, 3, prompt_tokens_details={"cached_tokens": 2}))
    + chunk(DONE)
    + LAST
)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=6))
def test_the_same_answer_however_it_is_cut(places):
    edges = [0, *sorted(places), len(WHOLE)]
    parts = [WHOLE[a:b] for a, b in itertools.pairwise(edges)]
    answer, error = decode(*[part for part in parts if part])
    assert error == "none"
    assert (answer.status, answer.prompt_tokens, answer.output_tokens) == (200, 7, 3)
    assert answer.cached_tokens == 2
    assert len(answer.reads) == 3


def test_every_single_split_point():
    for place in range(1, len(WHOLE)):
        answer, error = decode(WHOLE[:place], WHOLE[place:])
        assert (error, len(answer.reads), answer.output_tokens) == ("none", 3, 3)


def test_each_event_has_the_time_of_the_read_that_ended_it():
    first = chunk(text("a"))
    answer, _ = decode(HEAD, first[:8], first[8:], chunk(text("b")) + chunk(DONE), LAST)
    assert list(answer.reads) == [2.0, 3.0]
    assert list(answer.stamps) == [1_000_000_002, 1_000_000_003]
    assert list(answer.places) == [2, 3]
    assert (answer.end_read, answer.end_stamp) == (3.0, 1_000_000_003)


@pytest.mark.parametrize(
    ("payload", "counts"),
    [
        (text("a"), True),
        (text(""), False),
        (delta(content="a"), True),
        (delta(content=""), False),
        (delta(content=None), False),
        (delta(role="assistant"), False),
        (delta(reasoning="a"), True),
        (delta(reasoning_content="a"), True),
        (delta(tool_calls=[{"index": 0, "function": {"name": "f"}}]), True),
        (delta(tool_calls=[]), False),
        (usage(1, 1), False),
        (event('{"choices": [{"text": "a"}]}  '), True),
        (event('{"choices": [{"text": "a", "logprobs": {"x": [1]}}], "unheard": {}}'), True),
    ],
)
def test_what_counts_as_output(payload, counts):
    answer, _ = decode(HEAD + chunk(payload) + chunk(usage(1, 1)) + chunk(DONE) + LAST, want=1)
    assert len(answer.reads) == counts


def plain(body: bytes, status="200 OK", kind="application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


ANSWER = json.dumps(
    {"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
).encode()


def test_one_whole_answer_is_one_event_at_its_end():
    raw = plain(ANSWER)
    answer, error = decode(raw[:40], raw[40:90], raw[90:], stream=False)
    assert (error, list(answer.reads), answer.output_tokens) == ("none", [2.0], 3)


@pytest.mark.parametrize(
    ("raw", "transport", "error"),
    [
        (plain(b'{"error": {"message": "no"}}', "400 Bad Request"), "none", "http_status"),
        (plain(b"", "302 Found\r\nLocation: http://example.com/"), "none", "http_status"),
        (plain(b"", "204 No Content"), "none", "http_status"),
        (HEAD + chunk(event({"error": {"code": 500}})) + chunk(DONE) + LAST, "none", "http_status"),
        (
            HEAD + chunk(text()) + chunk(event({"object": "error"})) + chunk(DONE) + LAST,
            "none",
            "http_status",
        ),
        (HEAD + chunk(text()) + LAST, "none", "truncated"),
        (HEAD + LAST, "none", "truncated"),
        (HEAD + chunk(text()), "truncated", "truncated"),
        (HEAD + chunk(text()), "reset", "reset"),
        (HEAD + chunk(text()) + chunk(DONE), "reset", "none"),
        (HEAD + chunk(text()), "timeout", "timeout"),
        (HEAD + chunk(b"<html>hello</html>\n\n") + LAST, "none", "malformed"),
        (HEAD + chunk(event("{not json")) + chunk(DONE) + LAST, "none", "malformed"),
        (HEAD + chunk(event("5")) + chunk(DONE) + LAST, "none", "malformed"),
        (HEAD + chunk(event('{"choices": "x"}')) + chunk(DONE) + LAST, "none", "malformed"),
        (plain(ANSWER), "none", "malformed"),
        (HEAD + chunk(text()) + chunk(usage(1, 9)) + chunk(DONE) + LAST, "none", "wrong_length"),
        (HEAD + b"zz\r\nwrong", "malformed", "malformed"),
        (b"", "refused", "refused"),
    ],
)
def test_what_went_wrong_is_named(raw, transport, error):
    assert decode(*([raw] if raw else []), error=transport)[1] == error


@pytest.mark.parametrize(
    ("raw", "transport", "error"),
    [
        (plain(ANSWER[:-5]), "none", "malformed"),
        (plain(ANSWER)[:-5], "truncated", "truncated"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + ANSWER, "truncated", "none"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + ANSWER[:-5], "truncated", "truncated"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + plain(ANSWER), "none", "none"),
    ],
)
def test_one_whole_answer_can_break_too(raw, transport, error):
    assert decode(raw, stream=False, error=transport)[1] == error


def test_a_stream_that_ends_with_the_connection():
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text() + usage(1, 3)
    assert decode(raw + DONE, error="truncated")[1] == "none"
    assert decode(raw, error="truncated")[1] == "truncated"


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_break_the_decoder(junk, stream):
    decode(junk, stream=stream)
    decode(HEAD + chunk(junk or b"x") + LAST, stream=stream)


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**62)), max_size=20))
def test_stamps_are_read_one_by_one_as_all_at_once(times):
    stamps = [None if t is None else struct.pack("@qq", *divmod(t, 10**9)) for t in times]
    assert nanoseconds_of(stamps).tolist() == [nanoseconds(stamp) for stamp in stamps]
