"""From the raw bytes of an answer to its events: everything the hot path left for later."""

from __future__ import annotations

from array import array
from typing import Any

import httptools
import msgspec

from pytest_llmserve.load.clock import nanoseconds, nanoseconds_of
from pytest_llmserve.load.record import ERRORS
from pytest_llmserve.load.sse import EventStream, EventTooLongError

OK, REFUSED, HTTP_STATUS, RESET, TRUNCATED, MALFORMED, TIMEOUT, WRONG_LENGTH, CANCELLED = range(
    len(ERRORS)
)

#: One `recvmsg`: bytes, the kernel's stamp (`struct timespec`) or None, monotonic time of the read.
Read = tuple[bytes, bytes | None, float]


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None

    @property
    def output(self) -> bool:
        return bool(
            self.content
            or self.reasoning
            or self.reasoning_content
            or self.tool_calls
            or self.function_call
            or self.refusal
        )


class _Choice(msgspec.Struct):
    text: Any = None
    delta: _Delta | None = None
    message: _Delta | None = None

    @property
    def output(self) -> bool:
        part = self.delta or self.message
        return bool(self.text) or (part is not None and part.output)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Answer:
    """One answer, decoded.

    Per event that carried output: `stamps` (Unix ns, 0 for none), `reads` (monotonic seconds),
    `places` (index of the read it came in) and `totals` (output tokens so far as the event
    itself says, -1 if it does not). Counts are -1 where the server gave none. `end_stamp` and
    `end_read` are of the read that ended the answer.
    """

    __slots__ = (
        "cached_tokens",
        "end_read",
        "end_stamp",
        "error",
        "output_tokens",
        "places",
        "prompt_tokens",
        "reads",
        "stamps",
        "status",
        "totals",
    )

    def __init__(self) -> None:
        self.status = 0
        self.error = OK
        self.prompt_tokens = self.output_tokens = self.cached_tokens = -1
        self.stamps = array("q")
        self.reads = array("d")
        self.places = array("i")
        self.totals = array("i")
        self.end_stamp = 0
        self.end_read = float("nan")


class Decoder:
    """Decodes one answer, read by read.

    `stream` says whether server-sent events were asked for. The transport's own verdict (`error`:
    an index into ERRORS) stands unless the answer was complete before the connection failed.
    """

    def __init__(self, stream: bool) -> None:
        self.answer = Answer()
        self._stream = stream
        self._events = EventStream()
        self._body: list[bytes] = []
        self._data: list[bytes] = []  # events of the read being fed
        self._parser = httptools.HttpResponseParser(self)
        self._stamps: list[bytes | None] = []
        self._place = -1
        self._end: Read | None = None  # the read that ended the answer, as far as it is known
        self._done = self._ended = self._failed = self._broken = self._until_eof = False
        self._events_follow = False  # the body is server-sent events
        self._body_seen = self._heard = False  # any body, any event in it

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_eof = False

    def on_message_begin(self) -> None:
        self._until_eof = True

    def on_headers_complete(self) -> None:
        self._events_follow = self._stream and self._parser.get_status_code() == 200

    def on_body(self, body: bytes) -> None:
        if self._ended:
            return  # a second response that nobody asked for
        if self._events_follow:
            self._body_seen = True
            data = self._events.one(body)
            if data is None:
                self._data += self._events.feed(body)
            else:
                self._data.append(data)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._ended = True

    def feed(self, read: Read) -> None:
        """Take the next read."""
        self._place += 1
        if self._broken or self._ended:
            return
        try:
            self._parser.feed_data(read[0])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, EventTooLongError):
            self._broken = not self._ended
        if self._data:
            self._take(self._data, read)
            self._data.clear()
        if not self._done:
            self._end = read

    def _take(self, events: list[bytes], read: Read) -> None:
        for data in events:
            if self._done:
                return
            self._heard = True
            if data.startswith(b"[DONE]"):
                self._done = True
                self._end = read
                return
            try:
                chunk = _decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                self._broken = True
                return
            self._count(chunk, read)

    def _count(self, chunk: _Chunk, read: Read) -> None:
        answer, usage = self.answer, chunk.usage
        if chunk.error or chunk.object == "error":
            self._failed = True
        total = -1
        if usage is not None:
            if usage.completion_tokens is not None:
                total = answer.output_tokens = usage.completion_tokens
            if usage.prompt_tokens is not None:
                answer.prompt_tokens = usage.prompt_tokens
            if (
                usage.prompt_tokens_details
                and usage.prompt_tokens_details.cached_tokens is not None
            ):
                answer.cached_tokens = usage.prompt_tokens_details.cached_tokens
        for choice in chunk.choices or ():
            if choice.text or choice.output:
                self._stamps.append(read[1])
                answer.reads.append(read[2])
                answer.places.append(self._place)
                answer.totals.append(total)
                return

    def finish(self, error: int, want_output: int, last: Read | None) -> Answer:
        """The answer, judged. `error` is the transport's verdict, `last` the last read."""
        answer = self.answer
        if last is not None:
            answer.status = self._parser.get_status_code()
            if self._stream and answer.status == 200 and not self._done and not self._broken:
                self._take(self._events.finish(), last)
            elif not self._stream and answer.status == 200 and (self._ended or self._until_eof):
                self._whole(b"".join(self._body), last)
        answer.stamps = array("q", nanoseconds_of(self._stamps).tobytes())
        if self._end is not None:
            answer.end_stamp, answer.end_read = nanoseconds(self._end[1]), self._end[2]
        answer.error = self._judge(error, want_output)
        return answer

    def _whole(self, body: bytes, last: Read) -> None:
        try:
            self._count(_decode(body), last)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._broken = True
        else:
            self._done = True

    def _judge(self, error: int, want_output: int) -> int:
        answer = self.answer
        complete = self._done or self._ended
        if error and not (complete and error in (RESET, TRUNCATED)):
            return error
        if answer.status != 200 or self._failed:
            return HTTP_STATUS
        if self._broken:
            return MALFORMED
        if not self._done:
            return MALFORMED if self._body_seen and not self._heard else TRUNCATED
        if answer.output_tokens >= 0 and answer.output_tokens != want_output:
            return WRONG_LENGTH
        return OK
