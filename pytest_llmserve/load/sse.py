"""Server-sent events from bytes that may be cut anywhere (WHATWG HTML, 9.2.6)."""

from __future__ import annotations

#: The most bytes of one event; a longer one is not an event.
EVENT_CAP = 4 << 20


class EventTooLongError(Exception):
    """An event did not end within `EVENT_CAP` bytes."""


class EventStream:
    """Gives the data of each event as soon as the blank line after it has been fed.

    Comments, event names, ids and retry times are skipped, as are events without data. Lines
    may end in LF, CRLF or CR.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._started = False

    def one(self, body: bytes) -> bytes | None:
        """The data of these bytes if they are just one event of one line, as nearly all are.

        If they are not, None: then they are still to be fed.
        """
        if (
            body[-2:] == b"\n\n"
            and body[:6] == b"data: "
            and self._started
            and not self._rest
            and body.find(b"\n") == len(body) - 2
            and b"\r" not in body
        ):
            return body[6:-2]
        return None

    def feed(self, body: bytes) -> list[bytes]:
        """The data of the events that these bytes completed.

        Raises EventTooLongError when an event goes on for more than `EVENT_CAP` bytes.
        """
        text = self._rest + body if self._rest else body
        if not self._started and len(text) >= 3:
            self._started = True
            text = text.removeprefix(b"\xef\xbb\xbf")
        held = b""
        if b"\r" in text:
            if text.endswith(b"\r"):  # the LF that may follow belongs to it
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = text.split(b"\n\n")
        self._rest = rest + held
        if len(self._rest) > EVENT_CAP:
            raise EventTooLongError
        return [data for block in blocks if (data := _data(block)) is not None]

    def finish(self) -> list[bytes]:
        """The data of an event whose blank line never came, for servers that leave it out."""
        rest, self._rest = self._rest.replace(b"\r", b"\n"), b""
        data = _data(rest.strip(b"\n")) if self._started else None
        return [] if data is None else [data]


def _data(block: bytes) -> bytes | None:
    if block.startswith(b"data:") and b"\n" not in block:
        return block[6:] if block.startswith(b" ", 5) else block[5:]
    lines = [
        line[6:] if line.startswith(b" ", 5) else line[5:]
        for line in block.split(b"\n")
        if line.startswith(b"data:") or line == b"data"
    ]
    return b"\n".join(lines) if lines else None
