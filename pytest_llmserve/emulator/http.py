"""HTTP/1.1 over sockets that never block, for a loop that must keep exact time.

Not uvicorn, Starlette or aiohttp, on purpose: asyncio's timers are epoll's whole milliseconds, and
a token on its way through a response task, a transport and a protocol costs some 50 µs. Here an
event is one `send` of bytes that were made before, and httptools (the parser uvicorn uses)
reads the requests.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import httptools

from pytest_llmserve.errors import ServerError
from pytest_llmserve.poller import READ, WRITE, Poller

SERVER = b"llmserve-emulator (emulated)"
_LARGEST_BODY = 64 << 20
#: `SO_TIMESTAMPNS` where its number and `struct timespec` are as on x86-64 and aarch64.
_STAMPS = 35 if sys.platform == "linux" and sys.maxsize > 2**32 else None
_STAMP = struct.Struct("@qq")
_STAMP_ROOM = 64
_LONGEST_WAIT = 10_000_000_000  # ns; more is a clock that was set
_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
    405: "Method Not Allowed", 413: "Payload Too Large", 429: "Too Many Requests",
    500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A whole request. `arrival` is the monotonic time at which its last byte had come: by the
    kernel's stamp, so that of requests that come together each keeps its own time; where there is
    none, when it was read."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    arrival: float


def head(
    status: int, content_type: str, *, length: int | None = None, close: bool = False
) -> bytes:
    """Status line and headers; without `length` the body is chunked."""
    size = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
    return b"".join(
        (
            b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, "Status").encode()),
            b"date: ", formatdate(usegmt=True).encode(),
            b"\r\nserver: ", SERVER,
            b"\r\ncontent-type: ", content_type.encode(), b"\r\n", size,
            b"\r\nconnection: close" if close else b"",
            b"\r\n\r\n",
        )
    )  # fmt: skip


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def _waited(notes: list[tuple[int, int, bytes]]) -> float:
    """Seconds since data that was read just now came, as the kernel stamped it; 0 if it did not."""
    if not notes or len(notes[0][2]) != _STAMP.size:
        return 0.0
    seconds, nanoseconds = _STAMP.unpack(notes[0][2])
    lag = time.time_ns() - (seconds * 1_000_000_000 + nanoseconds)
    return lag / 1e9 if 0 < lag < _LONGEST_WAIT else 0.0


class Connection:
    """One client. At most one request is being answered at a time; later ones wait here."""

    def __init__(self, sock: socket.socket, server: HttpServer) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.open = True
        self.busy = False
        #: Called if the client goes away while its request is being answered.
        self.on_lost: Callable[[], None] | None = None
        self._server = server
        self._parser: Any = httptools.HttpRequestParser(self)
        self._backlog = bytearray()
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._keep_alive = True
        self._bodiless = False  # the answer to HEAD
        self._waited = 0.0  # seconds that the last data read lay in the kernel
        self._begin()

    # what the parser calls

    def _begin(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0

    def on_message_begin(self) -> None:
        self._begin()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > _LARGEST_BODY:
            raise ValueError("body too large")
        self._body.append(body)

    def on_message_complete(self) -> None:
        request = Request(
            method=self._parser.get_method().decode("latin-1"),
            path=self._url.decode("latin-1").split("?", 1)[0],
            headers=self._headers,
            body=b"".join(self._body),
            arrival=self._server.clock() - self._waited,
        )
        self._waiting.append((request, self._parser.should_keep_alive()))

    # reading and writing

    def readable(self) -> None:
        try:
            data, notes, _, _ = self.sock.recvmsg(1 << 18, _STAMP_ROOM)
            self._waited = _waited(notes)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # we stay with HTTP/1.1, which the protocol allows
        except httptools.HttpParserError:
            too_large = self._size > _LARGEST_BODY
            self._keep_alive = False
            self.answer(413 if too_large else 400, b"", "text/plain")
            return
        self.next()

    def next(self) -> None:
        """Hand on the next request, if the one before it has been answered."""
        while self.open and not self.busy and self._waiting:
            request, self._keep_alive = self._waiting.popleft()
            self.busy = True
            self._bodiless = request.method == "HEAD"
            self._server.handle(request, self)

    def send(self, data: bytes) -> None:
        """Write now what the socket takes; the rest follows when it takes more."""
        if self._backlog:
            self._backlog += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.drop()
            return
        if sent < len(data):
            self._backlog += data[sent:]
            self._server.poller.modify(self.fd, READ | WRITE)

    def writable(self) -> None:
        try:
            sent = self.sock.send(self._backlog)
        except BlockingIOError:
            return
        except OSError:
            self.drop()
            return
        del self._backlog[:sent]
        if not self._backlog:
            self._server.poller.modify(self.fd, READ)
            if not self.busy and not self._keep_alive:
                self.drop()

    @property
    def congested(self) -> bool:
        """Whether bytes wait because the client reads too slowly."""
        return bool(self._backlog)

    def answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """A whole response at once."""
        close = not self._keep_alive
        headers = head(status, content_type, length=len(body), close=close)
        self.send(headers if self._bodiless else headers + body)
        self.done()

    def done(self) -> None:
        """The response is complete: take the next request, or close if the client asked for it."""
        self.busy = False
        self.on_lost = None
        if self._keep_alive:
            self._server.later(self)
        elif not self._backlog:
            self.drop()

    def drop(self, *, reset: bool = False) -> None:
        """Close now, with a reset instead of an orderly end if asked for."""
        if not self.open:
            return
        self.open = False
        self._server.forget(self)
        with contextlib.suppress(OSError):
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.sock.close()
        self._parser = None  # it refers back to this object, and nobody collects cycles here
        lost, self.on_lost = self.on_lost, None
        if lost is not None:
            lost()


class HttpServer:
    """A listening socket and its connections on a Poller."""

    def __init__(
        self,
        poller: Poller,
        clock: Callable[[], float],
        handle: Callable[[Request, Connection], None],
    ) -> None:
        self.poller = poller
        self.clock = clock
        self.handle = handle
        self._connections: dict[int, Connection] = {}
        self._ready_again: list[Connection] = []
        self._listener: socket.socket | None = None

    def listen(self, host: str, port: int) -> int:
        """Open the port (0: any) and give its number. Raises ServerError if it cannot be had."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if _STAMPS is not None:  # what is accepted inherits it
                with contextlib.suppress(OSError):
                    listener.setsockopt(socket.SOL_SOCKET, _STAMPS, 1)
            listener.bind(address)
            listener.listen(4096)
        except OSError as error:
            raise ServerError(
                f"cannot listen on {host} port {port}: [Errno {error.errno}] {error.strerror}; "
                "choose another --host or --port"
            ) from None
        listener.setblocking(False)
        self.poller.register(listener.fileno(), READ)
        self._listener = listener
        return int(listener.getsockname()[1])

    def dispatch(self, fd: int, mask: int) -> None:
        """Do what a ready descriptor asks for."""
        if self._listener is not None and fd == self._listener.fileno():
            self._accept(self._listener)
            return
        connection = self._connections.get(fd)
        if connection is None:
            return
        if mask & WRITE:
            connection.writable()
        if connection.open and mask & ~WRITE:
            connection.readable()

    def later(self, connection: Connection) -> None:
        """Look at the connection's further requests once the present event is dealt with."""
        self._ready_again.append(connection)

    def continue_connections(self) -> None:
        while self._ready_again:
            self._ready_again.pop().next()

    def forget(self, connection: Connection) -> None:
        self.poller.unregister(connection.fd)
        self._connections.pop(connection.fd, None)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections.values()):
            connection.on_lost = None
            connection.drop()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            try:
                sock, _address = listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(sock, self)
            self._connections[connection.fd] = connection
            self.poller.register(connection.fd, READ)
