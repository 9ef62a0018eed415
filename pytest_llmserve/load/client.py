"""The transport of the load client: one thread, one poller, plain sockets.

What happens when a socket is readable is kept minimal: read, take the time, append; a C parser
looks at the bytes only to know where the answer ends. Decoding is done after the load, or in
idle time when more than `RAW_CAP` bytes wait for it, so that memory is bounded:

- an answer's header is at most `HEADER_CAP` bytes, the whole answer `BODY_CAP`; more is an error;
- finished answers are decoded at once when they hold more than twice `RAW_CAP`;
- a decoded event takes 24 bytes.

Proxies (`http_proxy` and the like) are never used: they would be measured too.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import math
import os
import socket
import ssl
import struct
import time
from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httptools

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load import decode
from pytest_llmserve.load.clock import ANCILLARY, SO_TIMESTAMPNS, Clock
from pytest_llmserve.poller import READ, WRITE, Poller

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmserve.load.decode import Answer, Read

HEADER_CAP = 64 << 10
BODY_CAP = 64 << 20
RAW_CAP = 64 << 20
#: So long before its time a request gets its connection and its bytes.
LEAD = 0.05

_READ_SIZE = 16 << 10
_READ_COST = 250  # bytes that the objects of one read take beside its data
_IDLE_SLACK = 2e-3  # idle work is begun only if no deadline is nearer than this
_READS_IDLE = 64  # decoded in one piece of idle work: well under a millisecond
_READS_AT_ONCE = 1 << 20
_CORK: int | None = getattr(socket, "TCP_CORK", None)
_DISCARD = struct.pack("ii", 1, 0)  # struct linger: what is not sent yet is not to be sent
_SPIN = 300e-6  # at most so long before a request is due the clock is looked at
_now = time.monotonic


class Exchange:
    """One request and its answer. Times are monotonic seconds, NaN until they happened."""

    __slots__ = (
        "answer",
        "conn",
        "connect",
        "deadline",
        "end",
        "error",
        "intended",
        "launched",
        "number",
        "phase",
        "reads",
        "request",
        "retried",
        "sent",
        "size",
        "status",
        "user",
        "want_output",
        "want_prompt",
    )

    def __init__(self, phase: int, user: int, number: int) -> None:
        self.phase = phase
        self.user = user
        self.number = number
        self.request = b""
        self.want_prompt = self.want_output = -1
        self.intended = self.sent = self.end = self.deadline = math.nan
        self.connect = 0.0
        self.error = decode.OK
        self.status = 0
        self.reads: list[Read] = []
        self.size = 0
        self.conn: Connection | None = None
        self.launched = self.retried = False
        self.answer: Answer | None = None


class Connection:
    """One connection: opening, idle, or carrying one exchange. Also its parser's protocol."""

    __slots__ = (
        "begun",
        "done",
        "exchange",
        "expecting",
        "fd",
        "feed",
        "limit",
        "loaded",
        "open",
        "out",
        "parser",
        "recvmsg",
        "reusable",
        "setup",
        "sock",
        "started",
        "tls",
        "used",
    )

    def __init__(self, sock: socket.socket, tls: bool) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.tls = tls
        self.recvmsg = sock.recvmsg
        self.open = False
        self.used = False
        self.loaded = False  # the kernel has a request, and holds it back
        self.expecting = False
        self.started = _now()
        self.setup = 0.0  # seconds that it took to open, until it has been used
        self.exchange: Exchange | None = None
        self.out: memoryview | None = None

    def expect(self) -> None:
        """Get ready for one answer, unless it was done ahead."""
        if self.expecting:
            return
        self.expecting = True
        self.parser = httptools.HttpResponseParser(self)
        self.feed: Callable[[bytes], None] = self.parser.feed_data
        self.limit = HEADER_CAP
        self.begun = 0
        self.done = self.reusable = False

    def load(self, request: bytes) -> None:
        """Give the kernel a request ahead of its time, to be held back until `release`.

        That leaves the kernel little more than half as much to do when the time has come, which
        counts when many users start at once. It holds back no more than one segment (tcp(7),
        TCP_CORK), so longer requests are not loaded. Raises OSError if the connection is broken.
        """
        segment = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        if _CORK is None or self.tls or len(request) >= segment:
            return
        self.sock.setsockopt(socket.IPPROTO_TCP, _CORK, 1)
        self.loaded = True
        if self.sock.send(request) != len(request):
            raise OSError(errno.ENOBUFS, "no room for a request")

    def release(self) -> None:
        """Let the request go that was loaded."""
        assert _CORK is not None
        self.sock.setsockopt(socket.IPPROTO_TCP, _CORK, 0)
        self.loaded = False

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_headers_complete(self) -> None:
        self.limit = BODY_CAP

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() >= 200:
            self.done = True
            self.reusable = self.parser.should_keep_alive()  # known only now
        else:  # 100 Continue and its like: the answer is still to come
            self.begun -= 1
            self.limit = HEADER_CAP


class Client:
    """Sends requests when they are due and records what comes back.

    `prepare` fills in an exchange's request; `on_end` is called when one has ended. Give work
    with `schedule`, then call `run` until the condition it is given turns false.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        stream: bool,
        prepare: Callable[[Exchange], None],
        on_end: Callable[[Exchange], None],
    ) -> None:
        self.poller = Poller(_SPIN)
        self.clock = Clock()
        self.exchanges: list[Exchange] = []  # all that were launched
        self.in_flight = 0
        self.ended = 0
        self.received = 0  # reads that brought data
        self.stalls = 0.0
        self.stopped = False
        self._prepare, self._on_end = prepare, on_end
        self._timeout, self._stream = timeout, stream
        self._timers: list[tuple[float, bool, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._deadlines: deque[Exchange] = deque()
        self._connections: dict[int, Connection] = {}
        self._pool: list[Connection] = []
        self._watched: dict[int, Callable[[], None]] = {}
        self._idle_work: deque[Exchange] = deque()
        self._raw: deque[Exchange] = deque()
        self._raw_size = 0
        self._decoder: decode.Decoder | None = None
        self._decoded = 0
        # Stamping is switched on system-wide by the first socket that asks for it, a little
        # later; this one asks early and for as long as the client lives.
        self._guard = socket.socket()
        _stamp(self._guard)
        parts = urlsplit(url)
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context()
        self._host = parts.hostname or ""
        self._family, self._address = _resolve(
            self._host, parts.port or (443 if self._tls else 80), url
        )

    # --- timers and the loop

    def at(self, when: float, what: Callable[[], None], *, first: bool = False) -> None:
        """Call `what` when `time.monotonic()` has reached `when`, `first` of what is due then."""
        self._timer_count += 1
        heapq.heappush(self._timers, (when, not first, self._timer_count, what))

    def watch(self, fd: int, what: Callable[[], None]) -> None:
        """Call `what` whenever `fd` is readable."""
        self._watched[fd] = what
        self.poller.register(fd, READ)

    def run(self, going: Callable[[], bool]) -> None:
        """Drive the loop while `going()` is true and nobody stopped it."""
        poll, timers = self.poller.poll, self._timers
        connections = self._connections
        left = _now()
        while going() and not self.stopped:
            now = _now()
            if now - left > self.stalls:
                self.stalls = now - left
            due, exact = now + 1.0, False
            if timers:
                due, exact = timers[0][0], not timers[0][1]
            deadlines = self._deadlines
            while deadlines and not math.isnan(deadlines[0].end):
                deadlines.popleft()
            if deadlines and deadlines[0].deadline < due:
                due, exact = deadlines[0].deadline, False
            busy = (self._idle_work or self._raw_size > RAW_CAP) and due - now > _IDLE_SLACK
            ready = poll(now if busy else due, exact=exact)
            left = _now()
            if not busy and not ready:
                self.stalls = max(self.stalls, left - due)
            for fd, mask in ready:
                conn = connections.get(fd)
                if conn is None:
                    if fd in self._watched:
                        self._watched[fd]()
                elif mask & ~WRITE and conn.open:
                    self._read(conn)
                else:
                    self._progress(conn)
            if busy and not ready:
                self._work()
            now = _now()
            while timers and timers[0][0] <= now:
                heapq.heappop(timers)[3]()
            while deadlines and deadlines[0].deadline <= now:
                late = deadlines.popleft()
                if math.isnan(late.end):
                    self._fail(late, decode.TIMEOUT)

    def _work(self) -> None:
        """One small piece of what can be done while nothing else is to do."""
        if self._idle_work:
            exchange = self._idle_work.popleft()
            if not exchange.request:
                self._prepare(exchange)
        elif self._raw:
            self._decode_some(_READS_IDLE)

    # --- sending

    def schedule(self, exchange: Exchange) -> None:
        """Send `exchange` at its `intended` time, its connection and bytes ready before."""
        ahead = exchange.intended - _now()
        if ahead <= 0:
            self._launch(exchange)
        elif ahead > LEAD:
            self.at(exchange.intended - LEAD, lambda: self._reserve(exchange))
        else:
            self._reserve(exchange)

    def prepare_in_idle_time(self, exchange: Exchange) -> None:
        """Make the bytes of an exchange that is still to be scheduled when nothing else is due."""
        self._idle_work.append(exchange)

    def _reserve(self, exchange: Exchange) -> None:
        if not exchange.request:
            self._prepare(exchange)
        conn = exchange.conn = self._connection()
        if conn is not None:
            conn.exchange = exchange
            conn.expect()
            if conn.open:
                try:
                    conn.load(exchange.request)
                except OSError:
                    self._close(conn)
        self.at(exchange.intended, lambda: self._launch(exchange), first=True)

    def _launch(self, exchange: Exchange) -> None:
        if self.stopped:
            return
        conn = exchange.conn
        loaded = conn is not None and conn.loaded
        if conn is not None and loaded:
            exchange.sent = _now()
            conn.release()
            exchange.connect += conn.setup
        elif not exchange.request:
            self._prepare(exchange)
        exchange.launched = True
        exchange.deadline = _now() + self._timeout
        self.exchanges.append(exchange)
        self._deadlines.append(exchange)
        self.in_flight += 1
        if not loaded:
            self._attach(exchange)

    def _attach(self, exchange: Exchange) -> None:
        conn = exchange.conn or self._connection()
        if conn is None:
            self._fail(exchange, decode.REFUSED)
            return
        exchange.conn, conn.exchange = conn, exchange
        if conn.open:
            self._transmit(conn, exchange)

    def _connection(self) -> Connection | None:
        return self._pool.pop() if self._pool else self._open()

    def _transmit(self, conn: Connection, exchange: Exchange) -> None:
        exchange.connect += conn.setup
        conn.out = memoryview(exchange.request)
        exchange.sent = _now()
        self._write(conn, exchange)
        conn.expect()

    def _write(self, conn: Connection, exchange: Exchange) -> None:
        assert conn.out is not None
        try:
            count = conn.sock.send(conn.out)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            count = 0
        except OSError:
            self._broken(conn, decode.RESET)
            return
        if count == len(conn.out):
            if conn.out.nbytes != len(exchange.request):
                self.poller.modify(conn.fd, READ)
            conn.out = None
        else:
            conn.out = conn.out[count:]
            self.poller.modify(conn.fd, READ | WRITE)

    # --- receiving

    def _read(self, conn: Connection) -> None:
        while True:
            try:
                if conn.tls:
                    data, stamp = conn.sock.recv(_READ_SIZE), None
                else:
                    data, ancillary, _, _ = conn.recvmsg(_READ_SIZE, ANCILLARY)
                    stamp = ancillary[0][2] if ancillary else None
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if conn.out is not None and conn.exchange is not None:
                    self._write(conn, conn.exchange)
                return
            except OSError:
                self._broken(conn, decode.RESET)
                return
            now = _now()
            exchange = conn.exchange
            if exchange is None or not exchange.launched:
                self._close(conn)  # idle: the server hung up, or spoke unasked
                return
            if not data:
                self._broken(conn, decode.RESET if conn.limit == HEADER_CAP else decode.TRUNCATED)
                return
            self.received += 1
            exchange.reads.append((data, stamp, now))
            exchange.size += len(data)
            try:
                conn.feed(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                if not conn.done:
                    self._fail(exchange, decode.MALFORMED)
                    return
                conn.begun += 1
            if conn.done:
                self._complete(conn, exchange)
                return
            if exchange.size > conn.limit:
                self._fail(exchange, decode.MALFORMED)
                return
            if not conn.tls:
                return

    def _complete(self, conn: Connection, exchange: Exchange) -> None:
        last = exchange.reads[-1]
        exchange.end = self.clock.arrival(last[1], last[2])
        exchange.status = conn.parser.get_status_code()
        exchange.conn = conn.exchange = None
        conn.used = True
        conn.setup = 0.0
        conn.expecting = False
        if conn.begun == 1 and conn.out is None and conn.reusable:
            self._pool.append(conn)
        else:
            self._close(conn)
        self._finish(exchange)

    def _broken(self, conn: Connection, error: int) -> None:
        """The connection ended or failed under an exchange, or before it was used."""
        exchange = conn.exchange
        if exchange is None or not exchange.launched:
            self._close(conn)
        elif conn.open and conn.used and not exchange.reads and not exchange.retried:
            # The server gave up an idle connection just as we used it: not its fault, not ours.
            exchange.retried = True
            self._close(conn)
            self._attach(exchange)
        else:
            self._fail(exchange, error)

    def _fail(self, exchange: Exchange, error: int) -> None:
        exchange.error = error
        exchange.end = _now()
        if exchange.conn is not None:
            self._close(exchange.conn)
        self._finish(exchange)

    def cancel(self) -> None:
        """Cut off all requests in flight; closing the connections frees them on the server."""
        for exchange in self.exchanges:
            if math.isnan(exchange.end):
                self._fail(exchange, decode.CANCELLED)

    def _finish(self, exchange: Exchange) -> None:
        self.in_flight -= 1
        self.ended += 1
        exchange.request = b""
        self._raw.append(exchange)
        self._raw_size += exchange.size + len(exchange.reads) * _READ_COST
        while self._raw_size > 2 * RAW_CAP:
            self._decode_some(_READS_AT_ONCE)
        self._on_end(exchange)

    # --- connections

    def connect_ahead(self, count: int) -> None:
        """Open connections until `count` are idle or being opened."""
        for _ in range(count - len(self._pool)):
            self._open()

    def _open(self) -> Connection | None:
        """Begin to open a connection; None if the system refuses at once."""
        try:
            sock = socket.socket(self._family, socket.SOCK_STREAM)
        except OSError:
            return None
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            _stamp(sock)
        code = sock.connect_ex(self._address)
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            return None
        if self._tls is not None and code == 0:
            code = errno.EINPROGRESS
        conn = Connection(sock, self._tls is not None)
        self._connections[conn.fd] = conn
        self.poller.register(conn.fd, WRITE)
        return conn

    def _progress(self, conn: Connection) -> None:
        """Take an opening connection further, or write what is left of a request."""
        if conn.open:
            if conn.exchange is not None and conn.out is not None:
                self._write(conn, conn.exchange)
            return
        try:
            if conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError
            if self._tls is not None and not self._handshake(conn):
                return
        except OSError:
            self._broken(conn, decode.REFUSED)
            return
        conn.open = True
        conn.setup = _now() - conn.started
        self.poller.modify(conn.fd, READ)
        if conn.exchange is None:
            self._pool.append(conn)
        elif conn.exchange.launched:
            self._transmit(conn, conn.exchange)

    def _handshake(self, conn: Connection) -> bool:
        assert self._tls is not None
        if not isinstance(conn.sock, ssl.SSLSocket):
            conn.sock = self._tls.wrap_socket(
                conn.sock, server_hostname=self._host, do_handshake_on_connect=False
            )
        try:
            conn.sock.do_handshake()
        except ssl.SSLWantReadError:
            self.poller.modify(conn.fd, READ)
            return False
        except ssl.SSLWantWriteError:
            self.poller.modify(conn.fd, WRITE)
            return False
        return True

    def _close(self, conn: Connection) -> None:
        self.poller.unregister(conn.fd)
        self._connections.pop(conn.fd, None)
        if conn.exchange is not None:
            conn.exchange.conn = None
            conn.exchange = None
        if conn in self._pool:
            self._pool.remove(conn)
        if conn.loaded:  # the server has not seen this request, and shall not
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DISCARD)
        conn.sock.close()

    # --- decoding

    def _decode_some(self, most: int) -> None:
        """Decode up to `most` reads of the oldest undecoded exchange."""
        exchange = self._raw[0]
        if self._decoder is None:
            self._decoder, self._decoded = decode.Decoder(self._stream), 0
        for read in exchange.reads[self._decoded : self._decoded + most]:
            self._decoder.feed(read)
        self._decoded += most
        if self._decoded < len(exchange.reads):
            return
        last = exchange.reads[-1] if exchange.reads else None
        exchange.answer = self._decoder.finish(exchange.error, exchange.want_output, last)
        self._raw_size -= exchange.size + len(exchange.reads) * _READ_COST
        exchange.reads = []
        self._decoder = None
        self._raw.popleft()

    def decode(self) -> None:
        """Decode every answer that is not decoded yet."""
        while self._raw:
            self._decode_some(_READS_AT_ONCE)

    def close(self) -> None:
        """Close all connections."""
        for conn in list(self._connections.values()):
            self._close(conn)
        self._guard.close()
        self.poller.close()


def _stamp(sock: socket.socket) -> None:
    if SO_TIMESTAMPNS is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


def _resolve(host: str, port: int, url: str) -> tuple[int, tuple[str, int] | tuple[object, ...]]:
    """Family and address of the server; of several the first that accepts a connection."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LoadError(
            f"the endpoint {url}: the host name {host!r} cannot be resolved "
            f"({os.strerror(error.errno) if error.errno and error.errno > 0 else error}); "
            "correct the URL"
        ) from None
    if len(found) > 1:
        for family, kind, proto, _, address in found:
            with contextlib.suppress(OSError), socket.socket(family, kind, proto) as probe:
                probe.settimeout(5.0)
                probe.connect(address)
                return family, address
    return found[0][0], found[0][4]
